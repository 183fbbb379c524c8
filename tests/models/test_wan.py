"""The model: chunk by chunk equals one block-causal pass; baking changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from forcingkv.headmaps.headmap import uniform
from forcingkv.models.generate import generate, latent_shape, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.kv import advance, attend_cache, empty_cache
from forcingkv.models.wan import KeysValues, WanModel, rotate
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from tests.conftest import headmap_of, random_model, roles, small_spec

CHUNKS = 4


def tables(model: WanModel, first: int, frames: int) -> tuple[Tensor, Tensor]:
    cosines, sines = positions.rotary(model.spec, model.spec.geometry(), first, frames)
    return torch.from_numpy(cosines), torch.from_numpy(sines)


def times(model: WanModel, timesteps: list[float]) -> Tensor:
    return torch.from_numpy(positions.time_features(model.spec, np.array([timesteps])))


def test_a_full_cache_equals_one_block_causal_pass() -> None:
    spec = small_spec(attended_frames=3 * CHUNKS)
    model, plan = random_model(spec), build_plan(spec, spec.geometry(), load_policy("full"))
    frames = spec.frames_per_chunk
    video = torch.cat([torch.randn(latent_shape(plan)) for _ in range(CHUNKS)], 2)
    prompt = model.prompt(torch.randn(1, spec.text_length, spec.text_width))

    chunk_of = torch.arange(CHUNKS).repeat_interleave(plan.chunk_tokens)
    mask = chunk_of[:, None] >= chunk_of[None, :]

    def block_causal(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
        return F.scaled_dot_product_attention(queries, *current, attn_mask=mask)

    rotary = tables(model, 0, frames * CHUNKS)
    whole, _ = model(video, times(model, [0.0] * CHUNKS), rotary, prompt, block_causal)

    cache = empty_cache(plan, video)
    for chunk, latents in enumerate(video.split(frames, 2)):
        rotary = tables(model, chunk * frames, frames)
        attend = attend_cache(plan, cache)
        flow, new = model(latents, times(model, [0.0]), rotary, prompt, attend)
        torch.testing.assert_close(flow, whole.split(frames, 2)[chunk], atol=1e-5, rtol=0)
        cache, _ = advance(plan, cache, new, chunk=chunk)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4))
def test_a_baked_model_computes_what_the_original_does(static: list[list[bool]]) -> None:
    """Both groups see the same frames, so only the order of heads differs from one group of all."""
    seen = roles(sink=1, recent=2)
    split = Policy("split", "", {"static": seen, "dynamic": seen})
    whole = Policy("whole", "", {"all": seen})
    spec = small_spec()
    headmap = headmap_of(spec, [[h for h, s in enumerate(row) if s] for row in static])
    model = random_model(spec)
    baked = WanModel(spec)
    state = model.state_dict()
    baked.load_state_dict(permute_heads(state, spec, head_orders(spec, split, headmap)))
    text = torch.randn(1, spec.text_length, spec.text_width)

    plans = [build_plan(spec, spec.geometry(), policy, headmap) for policy in (whole, split)]
    videos = [
        list(generate(m, plan, text, seeded_noise(plan, 3), 3))
        for m, plan in zip((model, baked), plans, strict=True)
    ]
    for original, permuted in zip(*videos, strict=True):
        torch.testing.assert_close(permuted.latents, original.latents, atol=1e-5, rtol=0)


def test_only_policies_tell_static_and_dynamic_heads_apart() -> None:
    """With every head static, or every one dynamic, forcing-kv differs; so the labels do matter."""
    spec = small_spec()
    model, text = random_model(spec), torch.randn(1, spec.text_length, spec.text_width)
    identity = headmap_of(spec, [[]] * spec.layers).model
    videos = []
    for label in ("static", "dynamic"):
        plan = build_plan(spec, spec.geometry(), load_policy("forcing-kv"), uniform(identity, label))
        videos.append([c.latents for c in generate(model, plan, text, seeded_noise(plan, 3), 5)])
    same = [torch.equal(a, b) for a, b in zip(*videos, strict=True)]
    assert same == [True, True, True, False, False], "segments are first seen in chunk ar_start + 2"


@pytest.mark.parametrize("policy", ["full", "window"])
def test_latents_do_not_depend_on_the_chunks_that_follow(policy: str) -> None:
    spec = small_spec()
    plan = build_plan(spec, spec.geometry(), load_policy(policy))
    model, text = random_model(spec), torch.randn(1, spec.text_length, spec.text_width)
    short, long = ([c.latents for c in generate(model, plan, text, seeded_noise(plan, 0), n)] for n in (2, 6))
    assert [torch.equal(a, b) for a, b in zip(short, long[:2], strict=True)] == [True, True]


def test_timesteps_may_differ_between_chunks_of_a_pass() -> None:
    """Two chunks that cannot see each other give what two passes give."""
    spec = small_spec()
    model = random_model(spec)
    a, b = (torch.randn(1, spec.latent_channels, 3, 8, 12) for _ in range(2))
    prompt = model.prompt(torch.randn(1, spec.text_length, spec.text_width))
    rotary = tables(model, 0, 3)

    def apart(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
        parts = zip(*(x.chunk(2, 2) for x in (queries, *current)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)

    both, _ = model(
        torch.cat([a, b], 2),
        times(model, [0.0, 500.0]),
        (rotary[0].repeat(2, 1), rotary[1].repeat(2, 1)),
        prompt,
        apart,
    )
    for latents, timestep, found in zip((a, b), (0.0, 500.0), both.split(3, 2), strict=True):
        alone, _ = model(latents, times(model, [timestep]), rotary, prompt)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frame", [0, 1_023, 1_024, 5_000])
def test_rotation_at_any_frame_equals_float64(frame: int) -> None:
    """Complex multiplication in float64 with angles of their own, at the head width of Wan."""
    spec = small_spec(head_dim=128)
    rows, columns = spec.geometry().grid
    x = torch.randn(1, 2, 3 * rows * columns, spec.head_dim, generator=torch.Generator().manual_seed(0))
    tables = positions.rotary(spec, spec.geometry(), frame, 3)
    found = rotate(x, *(torch.from_numpy(table) for table in tables))

    place = [(f, r, c) for f in range(frame, frame + 3) for r in range(rows) for c in range(columns)]
    angles = np.zeros((len(place), 64))
    for token, axes in enumerate(place):
        start = 0
        for position, pairs in zip(axes, (22, 21, 21), strict=True):
            angles[token, start : start + pairs] = position / 10000 ** (2 * np.arange(pairs) / (2 * pairs))
            start += pairs
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.from_numpy(np.exp(1j * angles))
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
