"""Chunks of any length: sinks collected over several of them, and windows that are no multiple of one.

Every implementation of the cache against the plainest one: keys and values of all frames are kept for ever,
and the frames that a chunk may see are picked from them by their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from forcingkv.models.generate import generate, next_latents, seeded_noise
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime import Session, positions
from forcingkv.runtime.backends import Lane
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from forcingkv.runtime.bundle import next_name
from forcingkv.runtime.footprint import kv_parts, part_notes
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.spec import ModelSpec, Schedule
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, roles, small_spec
from tests.exported import shared_bundle
from tests.runtime.videos import OTHER, PROMPT, assert_same, differ

FIRST_HAS_TWO = Schedule((1000.0,), first=(1000.0, 625.0))


def seen(chunk: int, frames: int, sink: int, recent: int) -> list[int]:
    """The frames that a chunk sees, by the words of the policy: the first ones, and the newest others."""
    past = range(chunk * frames)
    others = [frame for frame in past if frame >= sink]
    return [frame for frame in past if frame < sink] + (others[-recent:] if recent else [])


@st.composite
def windows(draw: st.DrawFn) -> tuple[CachePlan, int, int]:
    """A plan of chunks, a sink and a window of any lengths, with the frames of sink and window."""
    frames, sink, recent = draw(st.integers(1, 5)), draw(st.integers(0, 9)), draw(st.integers(0, 9))
    spec = small_spec(layers=2, frames_per_chunk=frames, attended_frames=frames + sink + recent)
    policy = Policy("any", "", {"all": roles(sink, recent)})
    return build_plan(spec, spec.geometry(), policy), sink, recent


@settings(deadline=None, max_examples=40)
@given(windows())
def test_which_frames_a_chunk_sees(drawn: tuple[CachePlan, int, int]) -> None:
    plan, sink, recent = drawn
    group, frames = plan.layers[0][0], plan.spec.frames_per_chunk
    for chunk in range(14):
        spans = [span for role in group.roles for span in role.spans(plan, group, chunk, None)]
        assert [span.frame for span in spans] == seen(chunk, frames, sink, recent)
        assert sum(plan.tokens(group, role, chunk) for role in group.roles) == plan.frame_tokens * len(spans)
        assert plan.phase(chunk) == plan.phase(min(chunk, plan.phases[-1].first_chunk))
    # `full` says the same by the model's own numbers.
    spec = small_spec(frames_per_chunk=frames, attended_frames=frames + sink + recent, sink_frames=sink)
    full = build_plan(spec, spec.geometry(), load_policy("full")).layers[0][0].roles
    assert {role.name: role.steady_tokens(plan, group) for role in full} == {
        role.name: role.steady_tokens(plan, group) for role in group.roles
    }


@settings(deadline=None, max_examples=40)
@given(windows())
def test_a_clean_pass_writes_what_no_pass_reads(drawn: tuple[CachePlan, int, int]) -> None:
    """Frame numbers stand for keys. The buffers of a session have room for what is written, and keep it."""
    plan, sink, recent = drawn
    lane: Lane = OnnxLane({})
    buffers = CacheBuffers(plan, lane, "float32")
    assert buffers.nbytes == sum(plan.buffer_bytes_by_role("float32").values())
    frames, size = plan.spec.frames_per_chunk, plan.frame_tokens
    for chunk in range(14):
        held = {name: tensor.fetch(lane.main).array() for name, tensor in buffers.held().items()}
        of_roles = [held[e.name] for e in plan.entries if e.part == "keys" and e.layer == 0]
        found = [int(one) for keys in of_roles for one in keys[0, 0, ::size, 0]]
        assert found == seen(chunk, frames, sink, recent)
        rows = plan.rows(chunk)
        own = np.arange(chunk * frames, (chunk + 1) * frames).repeat(size)
        outputs = buffers.outputs()
        made = {}
        for entry in plan.entries:
            shape, before = outputs[next_name(entry.name)].shape, held[entry.name][0, 0, :, 0]
            if entry.role.name == "sink":
                kept = rows.get("sink_held.all", np.arange(0))
                frame_of = np.concatenate([before[kept], own[rows["sink_rows.all"]]])
            else:
                taken = own[rows.get("recent_rows.all", own >= sink)]
                frame_of = np.concatenate([before, taken])[-shape[2] or len(taken) + len(before) :]
            made[entry.name] = np.broadcast_to(frame_of[:, None], shape).astype(np.float32)
        for name, array in made.items():
            outputs[next_name(name)].write(array, lane.main)
        still = {name: tensor.fetch(lane.main).array() for name, tensor in buffers.held().items()}
        assert all((held[name] == still[name]).all() for name in held)
        buffers.passes += 1


def plainly(model: WanModel, plan: CachePlan, frames_of: Any, chunks: int, seed: int) -> Iterator[np.ndarray]:
    """Latents chunk by chunk, with keys and values of all frames kept: `frames_of` says which are seen."""
    spec, size = plan.spec, plan.frame_tokens
    text = torch.from_numpy(encode_words(spec, PROMPT))
    prompt, noise, count = model.prompt(text), seeded_noise(plan, seed), spec.frames_per_chunk
    shape = (1, spec.heads, 0, spec.head_dim)
    kept = [KeysValues(torch.empty(shape), torch.empty(shape)) for _ in range(spec.layers)]
    for chunk in range(chunks):
        rotary = tuple(map(torch.from_numpy, positions.rotary(spec, plan.geometry, chunk * count, count)))

        def attend(layer: int, queries: torch.Tensor, current: KeysValues) -> torch.Tensor:
            out = []
            for group in plan.layers[layer]:
                heads = slice(group.start, group.stop)
                past = frames_of(group.label, chunk)  # noqa: B023
                rows = torch.tensor([f * size + n for f in past for n in range(size)], dtype=torch.long)
                keys, values = (
                    torch.cat([old[:, heads].index_select(2, rows), own[:, heads]], 2)
                    for old, own in zip(kept[layer], current, strict=True)  # noqa: B023
                )
                out.append(F.scaled_dot_product_attention(queries[:, heads], keys, values))
            return torch.cat(out, 1)

        def run(latents: torch.Tensor, timestep: float) -> Any:
            time = torch.from_numpy(positions.time_features(spec, np.array([[timestep]])))
            return model(latents, time, rotary, prompt, attend)  # noqa: B023

        latents, steps = noise(chunk, 0), spec.schedule.of_chunk(chunk)
        for step, timestep in enumerate(steps.timesteps):
            flow, _ = run(latents, timestep)
            levels = steps.sigmas[step : step + 2]
            latents = next_latents("fresh", latents, flow, *levels, noise(chunk, step + 1))
        _, new = run(latents, spec.schedule.context_timestep)
        kept = [
            KeysValues(*(torch.cat(pair, 2) for pair in zip(old, own, strict=True)))
            for old, own in zip(kept, new, strict=True)
        ]
        yield latents.numpy()


@settings(deadline=None, max_examples=10)
@given(windows())
def test_torch_sees_those_frames(drawn: tuple[CachePlan, int, int]) -> None:
    plan, sink, recent = drawn
    model, frames = random_model(plan.spec), plan.spec.frames_per_chunk
    text, chunks = torch.from_numpy(encode_words(plan.spec, PROMPT)), min(7, 3 + 9 // frames)
    with torch.no_grad():
        wanted = plainly(model, plan, lambda _, chunk: seen(chunk, frames, sink, recent), chunks, 3)
        found = generate(model, plan, text, seeded_noise(plan, 3), chunks)
        for chunk, latents in zip(found, wanted, strict=True):
            np.testing.assert_allclose(chunk.latents.numpy(), latents, atol=1e-5, rtol=0)


def frame_wise() -> tuple[ModelSpec, Policy]:
    """Its sink of 3 frames is that of three chunks."""
    spec = small_spec(layers=2, frames_per_chunk=1, attended_frames=21, schedule=FIRST_HAS_TWO)
    return spec, load_policy("window")


def chunks_of_four() -> tuple[ModelSpec, Policy]:
    """The counts of LingBot-World 2: a window of 18 frames, of which the first 6 are a sink."""
    counts = {"frames_per_chunk": 4, "attended_frames": 18, "sink_frames": 6}
    return small_spec(layers=1, schedule=FIRST_HAS_TWO, **counts), load_policy("full")


CASES = {
    "frame-wise, torch": (frame_wise, "torch"),
    "chunks of four, torch": (chunks_of_four, "torch"),
    "chunks of four, onnxruntime": (chunks_of_four, "onnxruntime"),
}


@pytest.fixture(scope="module", params=CASES)
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    kind, backend = CASES[request.param]
    spec, policy = kind()
    # What the graphs give is compared with torch below, through a whole video.
    options = {"target": "torch"} if kind is frame_wise else {"verify": False}
    bundle = shared_bundle(spec, random_model(spec).state_dict(), policy, **options)
    with Session.open(bundle, backend=backend) as opened:
        yield opened


def in_torch(plan: CachePlan, chunks: int) -> list[np.ndarray]:
    """The video of the loop in torch."""
    spec, model = plan.spec, random_model(plan.spec)
    text = torch.from_numpy(encode_words(spec, PROMPT))
    return [chunk.latents.numpy() for chunk in generate(model, plan, text, seeded_noise(plan, 7), chunks)]


def test_sessions_make_the_video_of_torch(session: Session, tmp_path: Path) -> None:
    """Whole, and saved and restored after any chunk, with the sink half full too."""
    chunks = session.plan.phases[-1].first_chunk + 2
    whole = list(session.generate(PROMPT, seed=7, chunks=chunks))
    for chunk, latents in zip(whole, in_torch(session.plan, chunks), strict=True):
        np.testing.assert_allclose(chunk.latents, latents, atol=1e-5, rtol=0)
    for at in (1, 2, chunks - 1):
        video = session.generate(PROMPT, seed=7, chunks=chunks)
        list(islice(video, at))
        video.save(tmp_path / str(at))
        assert_same(list(session.restore(tmp_path / str(at))), whole[at:])


def test_a_switch_with_the_sink_half_full(session: Session) -> None:
    """The clean passes are run again: under the same prompt nothing changes, under another what follows."""
    whole = list(session.generate(PROMPT, seed=7, chunks=4))
    for at in (1, 2):
        video = session.generate(PROMPT, seed=7, chunks=4)
        made = list(islice(video, at))
        video.switch(PROMPT)
        assert_same([*made, *video], whole)
        video = session.generate(PROMPT, seed=7, chunks=4)
        made = list(islice(video, at))
        video.switch(OTHER)
        rest = list(video)
        assert_same(made, whole[:at])
        assert differ(rest[0], whole[at])
        assert differ(rest[-1], whole[-1])


def test_what_a_collected_sink_takes() -> None:
    """Beside itself, while it grows, what the chunks before the last gave; on torch nothing."""
    spec, policy = chunks_of_four()
    plan = build_plan(spec, spec.geometry(), policy)
    frame = 4 * 2 * spec.dim * plan.frame_tokens * spec.layers
    taken = {name: size for name, size in kv_parts(plan, "float32").items() if size}
    assert taken == {"kv_sink": (6 + 4) * frame, "kv_recent": 2 * 8 * frame}
    assert kv_parts(plan, "float32", joined=True)["kv_sink"] == 6 * frame
    assert [phase.first_chunk for phase in plan.phases] == [0, 1, 2, 3, 4]
    assert part_notes(plan)["kv_sink"] == "two buffers: it is collected over the first chunks"
    assert part_notes()["kv_sink"] == "one buffer: written once"


def test_a_sink_that_fits_the_first_chunk_is_written_once() -> None:
    spec = small_spec(sink_frames=3)
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    assert {name for chunk in range(5) for name in plan.rows(chunk)} == {"sink_rows.all"}
    sink = next(entry for entry in plan.entries if entry.role.name == "sink")
    assert plan.buffer_shapes(sink) == [(1, spec.heads, 3 * plan.frame_tokens, spec.head_dim)]
    assert [plan.next_shape(sink, chunk)[2] // plan.frame_tokens for chunk in range(3)] == [3, 0, 0]
