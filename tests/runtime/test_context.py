"""Models that make their context anew before each chunk: sessions against the loop in torch."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from forcingkv.export import export_bundle
from forcingkv.headmaps import InputError
from forcingkv.measure.planner.speed import video_work
from forcingkv.models.context import FirstFrame
from forcingkv.models.decoders import StreamingDecoder, to_frames
from forcingkv.models.encoders import StreamingEncoder, pixels_of
from forcingkv.models.generate import generate, next_latents, seeded_noise
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import Bundle, positions
from forcingkv.runtime.context import check_context, check_held
from forcingkv.runtime.cost import chunk_flops, encoding_flops, pass_flops
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.rebuild import context_encoding
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.spec import Decoder, ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import mixed_map, random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.lanes import ONNX, TORCH, Ahead, On
from tests.runtime.videos import OTHER, PROMPT, assert_same

CHUNKS = 4
RECOMPUTED: dict[str, object] = {
    "layers": 2,
    "attended_frames": 6,
    "positions": "relative",
    "recache": "none",
    "context": "recompute",
    "context_frames": 3,
    "schedule": Schedule((1000.0, 666.0, 0.0), warp=True, shift=5.0, noise_levels="table"),
}
VAE: dict[str, object] = {
    "latent_channels": 4,
    "width": 16,
    "height": 32,
    "decoder": Decoder("wan-vae", 8, 4),
}
KINDS: dict[str, dict[str, object]] = {
    "kept": {},
    "two frames": {"attended_frames": 5, "context_frames": 2},
    "pixels again": {"context_first": "encoded"},
    "encoded": {"context_first": "encoded", **VAE},
}


def spec_of(kind: str) -> ModelSpec:
    return small_spec(**(RECOMPUTED | KINDS[kind]))


@cache
def vae_of(kind: str) -> tuple[StreamingDecoder | None, StreamingEncoder | None]:
    if spec_of(kind).decoder.kind == "pixels":
        return None, None
    pytest.importorskip("diffusers")
    from forcingkv.models.decoders.wan_vae import WanVaeDecoder
    from forcingkv.models.encoders.wan_vae import WanVaeEncoder
    from tests.models.test_decoders import small_vae

    return WanVaeDecoder(small_vae()), WanVaeEncoder(small_vae())


def recomputing(kind: str, target: str = "onnx") -> Path:
    spec, (decoder, encoder) = spec_of(kind), vae_of(kind)
    weights, policy = random_model(spec).state_dict(), load_policy("full")
    options: dict[str, Any] = {"verify": kind in ("kept", "encoded")}
    more = {"target": target} if target != "onnx" else options
    return shared_bundle(spec, weights, policy, decoder=decoder, encoder=encoder, **more)


def plan_of(spec: ModelSpec) -> CachePlan:
    return build_plan(spec, spec.geometry(), load_policy("full"))


def in_torch(kind: str, **options: Any) -> list[torch.Tensor]:
    spec = spec_of(kind)
    text, plan = torch.from_numpy(encode_words(spec, PROMPT)), plan_of(spec)
    again = FirstFrame(plan, *vae_of(kind)) if spec.context_first == "encoded" else None
    made = generate(
        random_model(spec), plan, text, seeded_noise(plan, 7), CHUNKS, first_frame=again, **options
    )
    return [chunk.latents for chunk in made]


def relative(found: Any, wanted: torch.Tensor) -> float:
    return float((torch.from_numpy(found.latents) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("on", "kind"),
    [
        *((on, kind) for on in (ONNX, TORCH) for kind in KINDS if kind != "encoded"),
        *(pytest.param(on, "encoded", marks=pytest.mark.long) for on in (ONNX, TORCH)),
    ],
    ids=lambda value: value.name if isinstance(value, On) else value,
)
def test_a_video_is_that_of_the_loop_in_torch(on: On, kind: str) -> None:
    target = "torch" if (on, kind) == (TORCH, "encoded") else "onnx"
    with on.open(recomputing(kind, target)) as session:
        chunks = list(session.generate(PROMPT, seed=7, chunks=CHUNKS))
    differences = [relative(*pair) for pair in zip(chunks, in_torch(kind), strict=True)]
    assert max(differences) < 1e-5


def test_the_context_is_the_newest_frames_at_0_and_the_chunk_lies_behind_them() -> None:
    """Against one pass over both blocks with a block-causal mask, as the makers' server has it."""
    spec = spec_of("kept")
    plan, model = plan_of(spec), random_model(spec)
    before, _ = chunks = in_torch("kept")[:2]
    text = torch.from_numpy(encode_words(spec, PROMPT))
    steps = spec.schedule.later
    noise = seeded_noise(plan, 7)
    latents, tokens = noise(1, 0), plan.chunk_tokens
    tables = positions.rotary(spec, plan.geometry, 0, 6)
    causal = torch.ones(2 * tokens, 2 * tokens, dtype=torch.bool)
    causal[:tokens, tokens:] = False

    def masked(layer: int, queries: torch.Tensor, current: KeysValues) -> torch.Tensor:
        return F.scaled_dot_product_attention(queries, current.keys, current.values, attn_mask=causal)

    for step, timestep in enumerate(steps.timesteps):
        told = np.repeat([0.0, timestep], 3)[None]
        time = torch.from_numpy(positions.time_features(spec, told))
        rotary = torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
        with torch.no_grad():
            both = torch.cat([before, latents], 2)
            flow, _ = model(both, time, rotary, model.prompt(text), masked)
        sigma, following = steps.sigmas[step : step + 2]
        latents = next_latents("fresh", latents, flow[:, :, 3:], sigma, following, noise(1, step + 1))
    assert float((latents - chunks[1]).norm() / chunks[1].norm()) < 1e-5


def test_what_goes_through_the_vae_again_is_the_ninth_newest_frame_as_a_first_one() -> None:
    spec, (decoder, encoder) = spec_of("encoded"), vae_of("encoded")
    assert decoder
    assert encoder
    plan = plan_of(spec)
    again, chunks = FirstFrame(plan, decoder, encoder), in_torch("encoded")[:2]
    size = plan.geometry.latent_height, plan.geometry.latent_width
    made = [again(chunk) for chunk in chunks][1]
    pixels, _ = decoder(torch.cat(chunks, 2), torch.ones(1), decoder.empty_state(*size))
    shown = to_frames(pixels)[3:]
    frames = torch.cat([torch.zeros(3, *shown.shape[1:], dtype=torch.uint8), shown[-9:-8]])
    wanted, _ = encoder(pixels_of(frames), torch.ones(1), encoder.empty_state(*size))
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(made, chunks[1][:, :, :1], atol=1e-2)


@pytest.mark.parametrize(("kind", "same"), [("kept", 4), ("pixels again", 2)])
def test_the_first_frame_is_made_again_from_the_third_chunk_on(kind: str, same: int) -> None:
    """What the first context begins with is the first frame of the video already."""
    pairs = zip(in_torch("kept"), in_torch(kind), strict=True)
    assert [torch.equal(one, other) for one, other in pairs] == [True] * same + [False] * (4 - same)


@pytest.mark.parametrize("made", [0, 1, 3])
@pytest.mark.parametrize("kind", ["kept", pytest.param("pixels again", marks=pytest.mark.long)])
def test_a_saved_state_goes_on_to_the_bit(on: On, kind: str, made: int, tmp_path: Path) -> None:
    with on.open(recomputing(kind)) as session:
        video = session.generate(PROMPT, seed=7, chunks=5)
        list(islice(video, made))
        video.save(tmp_path)
        wanted = list(video)
        assert_same(session.restore(tmp_path), wanted)


def test_chunks_are_not_begun_before_the_one_before_is_decoded() -> None:
    """On lanes that look ahead too: the context is made of it."""
    path = recomputing("pixels again", "torch")
    with TORCH.open(path) as session:
        wanted = list(session.generate(PROMPT, seed=7, chunks=CHUNKS))
    session, _ = TORCH.open_with(path, Ahead)
    with session:
        assert_same(session.generate(PROMPT, seed=7, chunks=CHUNKS), wanted)


def test_the_context_follows_another_prompt_and_nothing_else_is_made_anew(on: On) -> None:
    """A cache that knew the old prompt would show in the chunk that begins with the new one."""
    with on.open(recomputing("kept")) as session:
        plain = list(session.generate(PROMPT, seed=7, chunks=3))
        video = session.generate(PROMPT, seed=7, chunks=3)
        video.switch(OTHER, at=2)
        switched = list(video)
        assert_same(switched[:2], plain[:2])
        noise = positions.chunk_noise

        def shifted(chunk: int, step: int, shape: tuple[int, ...]) -> positions.Floats:
            return noise(7, chunk + 1, step, shape)

        begun = session.generate(OTHER, seed=7, chunks=2, start=plain[1].latents, noise=shifted)
        np.testing.assert_allclose(list(begun)[1].latents, switched[2].latents, atol=1e-5, rtol=0)
        for how in ("replay", "keep-sink", "empty-sink", "cut"):
            with pytest.raises(InputError, match="made anew before each chunk, under its prompt"):
                session.generate(PROMPT, seed=7, chunks=3).switch(OTHER, recache=how, at=2)


def test_no_clean_pass_is_made_and_passes_are_counted_so(on: On) -> None:
    with on.open(recomputing("kept")) as session:
        chunks = list(session.generate(PROMPT, seed=7, chunks=3))
        assert session._memory().cache.passes == 1
        assert chunks[0].timing.clean < chunks[1].timing.clean
        timer = session.pass_timer(1)
        assert timer.fill() > 0
        assert timer.denoise() > 0
    plan = plan_of(spec_of("kept"))
    step, context = pass_flops(plan, 1), encoding_flops(plan, context_encoding(plan, 1))
    assert chunk_flops(plan, 0) == 3 * pass_flops(plan, 0).total
    assert chunk_flops(plan) == 3 * step.total + context
    assert context_encoding(plan, 1) == context_encoding(plan, 9).anywhere
    video = video_work(plan, 5)
    assert [(phase.chunks, phase.passes) for phase in video.phases] == [(1, 3), (4, 12), (0, 4)]
    assert {"linear", "attention"} <= set(video.filling)
    assert sum(work.flops for work in video.filling.values()) == context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_frames": 4}, "context_frames is 4; expected 1 to 3"),
        ({"attended_frames": 21}, "attended_frames is 21; expected 6"),
        ({"positions": "absolute"}, "expected 'relative'"),
        ({"recache": "replay"}, "expected 'none'"),
        ({"context": "cache"}, "context_frames is 3; expected 0"),
    ],
)
def test_specs_that_cannot_be_run_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_spec(**(RECOMPUTED | changes))


@pytest.mark.parametrize("policy", ["window", "forcing-kv"])
def test_policies_with_a_history_are_refused(policy: str) -> None:
    spec = small_spec(**RECOMPUTED)
    with pytest.raises(InputError, match=r"the newest 3 latent frames in every head"):
        build_plan(spec, spec.geometry(), load_policy(policy), mixed_map(spec))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out, policy = tmp_path / "out", load_policy("full")
    spec = spec_of("kept")
    for target, options, message in (
        ("tensorrt", {}, "builds no engine of the pass"),
        ("onnx", {"recache": False}, "would leave out the pass"),
    ):
        with pytest.raises(InputError, match=message):
            export_bundle(spec, {}, policy, out, target=target, **options)  # type: ignore[arg-type]
    coded = spec_of("encoded")
    with pytest.raises(InputError, match=r"no encoder.*--encoder vae"):
        export_bundle(coded, {}, policy, out, decoder=vae_of("encoded")[0])
    assert not out.exists()


def test_sessions_without_what_a_context_needs_are_refused() -> None:
    kept, coded = Bundle.open(recomputing("kept")), plan_of(spec_of("encoded"))
    with ONNX.open(kept) as session:
        lane = session._memory().lane
        with pytest.raises(InputError, match=r"has no encoder.*--encoder vae"):
            check_context(lane, kept.manifest.graphs, coded)
        lane.recaches = False
        with pytest.raises(InputError, match="has no graph for the pass"):
            check_context(lane, kept.manifest.graphs, kept.plan)
    with TORCH.open(recomputing("pixels again", "torch")) as session:
        frames = np.zeros((9, 8, 12, 3), np.uint8)
        with pytest.raises(InputError, match="whose encoder is for the first frame"):
            session.generate(PROMPT, seed=7, source=frames)


def test_a_state_without_the_frame_is_refused(tmp_path: Path) -> None:
    plan = plan_of(spec_of("pixels again"))
    check_held(plan, 0, {}, "the state")
    with pytest.raises(InputError, match="context/frame is not there"):
        check_held(plan, 1, {}, "the state")


def test_the_preset_is_what_the_makers_serve() -> None:
    served, other = load_spec("krea-14b-served"), load_spec("krea-14b")
    assert (served.context, served.context_frames, served.context_first) == ("recompute", 3, "encoded")
    assert (served.layers, served.source) == (other.layers, other.source)
    np.testing.assert_allclose(served.schedule.later.timesteps, (1000, 908.843, 713.979, 0), atol=1e-3)
    assert served.passes_described.endswith(
        "before each chunk but the first a pass at 0 over the 3 newest frames, the first of them encoded"
        " again, and no clean pass"
    )
    plan = plan_of(served)
    assert [plan.tokens(plan.groups[0], plan.groups[0].roles[0], n) for n in (0, 1, 9)] == [0, 4680, 4680]
    assert plan.window_frames == 6
