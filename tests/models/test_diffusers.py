"""The model against diffusers' WanTransformer3DModel and flow-match scheduler, with the same weights.

Where the two architectures differ, and what these tests do about it:
- diffusers attends to everything at once, and has no cache: one chunk without a cache is compared, and
  a whole video under a block-causal mask of our own.
- its rotary embedding starts at frame 0 and ends at 1,024: later chunks are compared inside one pass.
- it takes one timestep a sample, or one a token: ours takes one a chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from forcingkv.models.checkpoint import build_model, weight_shapes
from forcingkv.models.generate import latent_shape, next_latents
from forcingkv.models.kv import advance, attend_cache, empty_cache
from forcingkv.models.naming import known_names
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.shipped import shipped_names
from forcingkv.runtime.spec import Decoder, ModelSpec, Schedule
from tests.conftest import small_spec

TOLERANCE = 1e-4
CHUNKS = 5


def tiny() -> ModelSpec:
    return small_spec(head_dim=16, latent_channels=4, decoder=Decoder("wan-vae"), attended_frames=3 * CHUNKS)


def two_layers() -> ModelSpec:
    return dataclasses.replace(load_spec("self-forcing"), layers=2)


def twin(spec: ModelSpec) -> tuple[Any, WanModel]:
    """A diffusers model with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, spec.patch, spec.patch),
        num_attention_heads=spec.heads,
        attention_head_dim=spec.head_dim,
        in_channels=spec.latent_channels,
        out_channels=spec.latent_channels,
        text_dim=spec.text_width,
        freq_dim=spec.time_width,
        ffn_dim=spec.ffn_width,
        num_layers=spec.layers,
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    to_wan = wan_names(spec)
    state = {to_wan[name]: tensor for name, tensor in theirs.state_dict().items()}
    return theirs, build_model(spec, state)


def wan_names(spec: ModelSpec) -> dict[str, str]:
    """Name of diffusers -> of Wan."""
    known = known_names(weight_shapes(spec))
    return {name: named.wan[0] for name, named in known.items() if not named.fused}


def text_for(spec: ModelSpec) -> Tensor:
    return torch.randn(1, spec.text_length, spec.text_width)


@pytest.mark.parametrize(
    ("spec", "resolution", "timestep"),
    [
        pytest.param(tiny(), None, 1000.0, id="tiny, noise alone"),
        pytest.param(tiny(), None, 833.3333, id="tiny"),
        pytest.param(tiny(), None, 0.0, id="tiny, clean"),
        pytest.param(two_layers(), "208x128", 833.3333, marks=pytest.mark.long, id="two layers, 1.3B width"),
    ],
)
def test_a_chunk_without_cache_equals_diffusers(
    spec: ModelSpec, resolution: str | None, timestep: float
) -> None:
    theirs, ours = twin(spec)
    plan = build_plan(spec, spec.geometry(resolution), load_policy("full"))
    latents, text = torch.randn(latent_shape(plan)), text_for(spec)
    with torch.no_grad():
        expected = theirs(latents, torch.tensor([timestep]), text).sample
        tables = positions.rotary(spec, plan.geometry, 0, spec.frames_per_chunk)
        time = torch.from_numpy(positions.time_features(spec, np.array([[timestep]])))
        cosines, sines = (torch.from_numpy(table) for table in tables)
        flow, _ = ours(latents, time, (cosines, sines), ours.prompt(text))
    torch.testing.assert_close(flow, expected, atol=TOLERANCE, rtol=0)


class Masked(WanAttnProcessor):  # type: ignore[misc]
    """Diffusers' own attention, with a mask in self-attention."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __call__(
        self, attn: Any, hidden: Tensor, text: Any = None, mask: Any = None, rotary: Any = None
    ) -> Any:
        return super().__call__(attn, hidden, text, self.mask if text is None else None, rotary)


def test_chunks_with_caches_equal_diffusers_in_one_block_causal_pass() -> None:
    spec = tiny()
    theirs, ours = twin(spec)
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    chunk_of = torch.arange(CHUNKS).repeat_interleave(plan.chunk_tokens)
    for block in theirs.blocks:
        block.attn1.set_processor(Masked(chunk_of[:, None] >= chunk_of[None, :]))
    video = torch.cat([torch.randn(latent_shape(plan)) for _ in range(CHUNKS)], 2)
    text, timesteps = text_for(spec), torch.tensor([0.0, 250.0, 625.0, 0.0, 937.5])
    with torch.no_grad():
        expected = theirs(video, timesteps[chunk_of][None], text).sample.split(spec.frames_per_chunk, 2)
        cache, prompt = empty_cache(plan, video), ours.prompt(text)
        for chunk, latents in enumerate(video.split(spec.frames_per_chunk, 2)):
            tables = positions.rotary(spec, plan.geometry, 3 * chunk, 3)
            time = torch.from_numpy(positions.time_features(spec, timesteps[None, chunk : chunk + 1].numpy()))
            cosines, sines = (torch.from_numpy(table) for table in tables)
            flow, new = ours(latents, time, (cosines, sines), prompt, attend_cache(plan, cache))
            torch.testing.assert_close(flow, expected[chunk], atol=TOLERANCE, rtol=0)
            cache, _ = advance(plan, cache, new, chunk=chunk)


def test_every_name_has_its_counterpart_in_diffusers() -> None:
    spec = tiny()
    theirs, _ = twin(spec)
    names = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    to_wan = wan_names(spec)
    assert {to_wan[name]: shape for name, shape in names.items()} == weight_shapes(spec)


def test_names_are_those_of_diffusers_own_converter() -> None:
    numbered = {name: torch.tensor(i) for i, name in enumerate(weight_shapes(tiny()))}
    converted = convert_wan_transformer_to_diffusers(dict(numbered))
    to_wan = wan_names(tiny())
    assert {to_wan[name]: int(t) for name, t in converted.items()} == {n: int(t) for n, t in numbered.items()}


WARPED = [1000, 937.5, 833.3, 625]
FEWER = {
    "causal-forcing++-2step": [1000, 833.3],
    "causal-forcing++-1step": [1000],
    "one-forcing": [1000],
}
"""Of the chunks after the first."""


NOT_WARPED_SO = {
    "krea-14b": [1000, 937, 833, 625],
    "krea-14b-served": [1000, 908.8, 714.0, 0],
    "longlive2-5b": [999, 937, 833, 624],
    "longlive2-5b-2step": [999, 833],
}
"""Steps of models that have others than Self Forcing's."""


@pytest.mark.parametrize(
    "preset", [name for name in shipped_names("forcingkv.models.presets") if not name.startswith("demo")]
)
def test_steps_of_the_presets(preset: str) -> None:
    schedule = load_spec(preset).schedule
    expected = NOT_WARPED_SO.get(preset, WARPED)
    assert [round(t, 1) for t in schedule.of_chunk(0).timesteps] == expected
    assert [round(t, 1) for t in schedule.later.timesteps] == FEWER.get(preset, expected)
    assert schedule.context_timestep == 0
    if preset not in NOT_WARPED_SO:
        table = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=5.0).timesteps
        nearest = [float((table - t).abs().min()) for t in schedule.later.timesteps]
        assert max(nearest) < 1e-3, "warped steps are entries of the shifted table"


@pytest.mark.parametrize("renoise", ["fresh", "predicted"])
def test_a_step_equals_the_flow_match_scheduler(renoise: str) -> None:
    schedule = Schedule((1000.0, 750.0, 500.0, 250.0), warp=True, shift=5.0)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(
        1000, shift=1.0, stochastic_sampling=renoise == "fresh"
    )
    theirs.set_timesteps(sigmas=list(schedule.later.sigmas[:-1]))
    np.testing.assert_allclose(theirs.sigmas, schedule.later.sigmas, atol=1e-6)
    for step, timestep in enumerate(theirs.timesteps):
        latents, flow = torch.randn(2, 1, 4, 3, 8, 12).unbind()
        torch.manual_seed(step)
        expected = theirs.step(flow, timestep, latents).prev_sample
        torch.manual_seed(step)
        noise = torch.randn_like(latents)
        sigma, following = schedule.later.sigmas[step : step + 2]
        found = next_latents(renoise, latents, flow, sigma, following, noise)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_noising_equals_the_flow_match_scheduler() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=5.0)
    clean, noise = torch.randn(2, 1, 4, 3, 8, 12).unbind()
    for timestep, sigma in zip(
        load_spec("self-forcing").schedule.later.timesteps, (1.0, 15 / 16, 5 / 6, 5 / 8), strict=True
    ):
        nearest = theirs.timesteps[(theirs.timesteps - timestep).abs().argmin()]
        expected = theirs.scale_noise(clean, nearest[None], noise)
        # A flow of noise - clean takes noisy latents to clean ones at any level.
        found = next_latents("fresh", clean + sigma * (noise - clean), noise - clean, sigma, sigma, noise)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
