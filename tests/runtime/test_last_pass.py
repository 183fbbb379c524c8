"""Sessions whose cache is filled by the last denoising pass (`Schedule.context`), against loops by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from forcingkv.headmaps.errors import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.kv import advance, attend_cache, empty_cache
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import Bundle, Chunk, Session, positions
from forcingkv.runtime.backends import Pass, Tensor
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.graph_records import latent_shape
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.positions import chunk_noise
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.spec import Recache
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.engine_world import World
from tests.runtime.lanes import ONNX, TORCH, On
from tests.runtime.test_schedule import FALLING, FOUR, in_torch, relative, with_schedule
from tests.runtime.videos import OTHER, POLICIES, PROMPT, assert_same, video_of

Bundles = Callable[[str], Path]

TWO = Schedule((1000.0, 625.0), context="last")
SCHEDULES = {
    "two steps": TWO,
    "one step": replace(TWO, denoising_steps=(1000.0,)),
    "one step, four in the first chunk": replace(TWO, denoising_steps=(1000.0,), first=FOUR),
    "by chunk": replace(TWO, by_chunk=FALLING),
}


REMEMBERING = ("memrope", "reward-forcing", "memflow", "deep-forcing")
"""Policies whose roles take keys as they leave, or score by queries: those of last passes then."""


def last_of(path: Path, schedule: Schedule = TWO) -> Bundle:
    return with_schedule(Bundle.open(path), schedule)


def run_alone(
    plan: Any, model: Any, latents: torch.Tensor, chunk: int, timestep: float, attend: Any
) -> tuple[torch.Tensor, list[KeysValues]]:
    spec = plan.spec
    tables = positions.rotary(spec, plan.geometry, chunk * spec.frames_per_chunk, spec.frames_per_chunk)
    prompt = model.prompt(torch.from_numpy(encode_words(spec, PROMPT)))
    time = torch.from_numpy(positions.time_features(spec, np.array([[timestep]])))
    flow, made = model(latents, time, tuple(map(torch.from_numpy, tables)), prompt, attend)
    return flow, made


@torch.no_grad()
def by_hand(opened: Bundle, chunks: int) -> list[np.ndarray]:
    """Latents of a video under `full`: no role and no plan, but a list of what the last passes made."""
    plan, spec, model = opened.plan, opened.plan.spec, random_model(opened.plan.spec)
    window = (spec.attended_frames - spec.frames_per_chunk) * plan.frame_tokens
    kept: list[list[torch.Tensor]] = [[torch.zeros(1, spec.heads, 0, spec.head_dim)] * 2 for _ in plan.layers]
    shape, videos = latent_shape(plan), []

    def attend(layer: int, queries: torch.Tensor, current: KeysValues) -> torch.Tensor:
        keys, values = (torch.cat(pair, 2) for pair in zip(kept[layer], current, strict=True))
        return F.scaled_dot_product_attention(queries, keys, values)

    for chunk in range(chunks):
        timesteps = spec.schedule.denoising_steps
        latents = torch.from_numpy(chunk_noise(7, chunk, 0, shape))
        for step, timestep in enumerate(timesteps):
            flow, made = run_alone(plan, model, latents, chunk, timestep, attend)
            x0 = latents - timestep / 1000 * flow
            if step + 1 < len(timesteps):
                level = timesteps[step + 1] / 1000
                fresh = torch.from_numpy(chunk_noise(7, chunk, step + 1, shape))
                latents = (1 - level) * x0 + level * fresh
        kept = [
            [torch.cat(pair, 2)[:, :, -window:] for pair in zip(old, new, strict=True)]
            for old, new in zip(kept, made, strict=True)
        ]
        videos.append(x0.numpy())
    return videos


@pytest.mark.parametrize("steps", [(1000.0, 625.0), (1000.0,)], ids=["two steps", "one step"])
def test_the_cache_holds_what_the_last_pass_made(on: On, bundles: Bundles, steps: tuple[float, ...]) -> None:
    """Longer than the window: what leaves it is gone."""
    opened = last_of(bundles("full"), replace(TWO, denoising_steps=steps))
    wanted = by_hand(opened, 7)
    with on.open(opened) as session:
        for chunk in video_of(session, 7):
            assert relative(chunk.latents, wanted[chunk.index]) < 1e-5, chunk.index
    clean = in_torch(with_schedule(opened, Schedule(steps)), 2)
    assert relative(clean[0], wanted[0]) < 1e-5, "nothing is cached yet"
    assert relative(clean[1], wanted[1]) > 1e-3, "the clean pass makes another cache"


@pytest.mark.parametrize(
    "name",
    ["forcing-kv", "longlive"]
    + [
        pytest.param(name, marks=pytest.mark.long)
        for name in (*POLICIES, *REMEMBERING)
        if name != "forcing-kv"
    ],
)
def test_under_every_policy_torch_and_onnx_runtime_make_one_video(bundles: Bundles, name: str) -> None:
    opened = last_of(bundles(name))
    made = []
    for on in (ONNX, TORCH):
        with on.open(opened) as session:
            made.append(video_of(session, 10))
    for one, other, wanted in zip(*made, in_torch(opened, 10), strict=True):
        np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=1e-3)
        assert max(relative(found.latents, wanted) for found in (one, other)) < 1e-5


@pytest.mark.parametrize("kind", [*SCHEDULES][2:])
def test_so_does_every_schedule(on: On, bundles: Bundles, kind: str) -> None:
    """Numbers of passes that differ by chunk. UniPC and frames that are held: test_held_frames.py."""
    opened = last_of(bundles("forcing-kv"), SCHEDULES[kind])
    wanted = in_torch(opened, 6)
    with on.open(opened) as session:
        for chunk in video_of(session, 6):
            assert relative(chunk.latents, wanted[chunk.index]) < 1e-5, chunk.index


class Counting:
    """Counts the passes of `step`: all, and those with a place for next caches."""

    def bind(self, graph: str, phase: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Pass:
        bound, fills = super().bind(graph, phase, inputs, outputs), len(outputs) > 1  # type: ignore[misc]
        return CountedPass(self, bound, fills) if graph == "step" else bound

    passes = filling = 0


class CountedPass:
    def __init__(self, lane: Counting, bound: Pass, fills: bool) -> None:
        self._lane, self._bound, self._fills = lane, bound, fills

    def run(self) -> None:
        self._lane.passes += 1
        self._lane.filling += self._fills
        self._bound.run()


@contextmanager
def counting(on: On, opened: Bundle) -> Iterator[tuple[Session, Any]]:
    bundle = on.of(opened)
    lane = on.first(bundle, Counting)
    with Session(bundle, on.options, lane, "host") as session:
        yield session, lane


@pytest.mark.parametrize(
    ("kind", "context", "wanted"),
    [
        ("two steps", "clean", [3, 3, 3]),
        ("two steps", "last", [2, 2, 2]),
        ("one step", "last", [1, 1, 1]),
        ("one step, four in the first chunk", "last", [4, 1, 1]),
        ("by chunk", "last", [5, 4, 3]),
        ("by chunk", "clean", [6, 5, 4]),
    ],
)
def test_a_chunk_has_one_pass_fewer(
    on: On, bundles: Bundles, kind: str, context: Any, wanted: list[int]
) -> None:
    """And one of them fills the cache in any case."""
    opened = last_of(bundles("forcing-kv"), replace(SCHEDULES[kind], context=context))
    with counting(on, opened) as (session, lane):
        found = []
        for _ in session.generate(PROMPT, seed=7, chunks=3):
            found.append((lane.passes, lane.filling))
            lane.passes = lane.filling = 0
    assert found == [(passes, 1) for passes in wanted]
    assert opened.plan.spec.schedule.clean_passes == (context == "clean")


def test_it_takes_no_clean_pass_s_time_and_no_other_memory(on: On, bundles: Bundles) -> None:
    opened = last_of(bundles("forcing-kv"))
    with on.open(opened) as session, on.open(bundles("forcing-kv")) as clean:
        assert [chunk.timing.clean for chunk in video_of(session, 3)] == [0, 0, 0]
        assert session.footprint == clean.footprint
        wanted, timer = video_of(session), session.pass_timer(5)
        assert min(timer.denoise(), timer.fill()) > 0
        assert timer.cache_bytes == clean.pass_timer(5).cache_bytes
        assert_same(video_of(session), wanted)
    assert footprint(opened.manifest, opened.plan) == footprint(
        Bundle.open(bundles("forcing-kv")).manifest, opened.plan
    )


def test_a_saved_state_goes_on_to_the_bit(on: On, bundles: Bundles, tmp_path: Path) -> None:
    with on.open(last_of(bundles("forcing-kv"))) as session:
        for at in (1, 4):
            video = session.generate(PROMPT, seed=7, chunks=7)
            list(islice(video, at))
            video.save(tmp_path / str(at))
            wanted = list(video)
            assert_same(session.restore(tmp_path / str(at)), wanted)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engines_make_the_same_video_in_as_many_passes(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    """They make all outputs in every pass; those of the last one are taken. (Engines are stood in.)"""
    world = World(bundles("forcing-kv"), monkeypatch)
    with ONNX.open(last_of(bundles("forcing-kv"))) as session:
        wanted = video_of(session)
    opened = with_schedule(world.bundle, TWO)
    how: dict[str, Any] = {"backend": "tensorrt-rtx", "preflight": False, "cuda_graphs": cuda_graphs}
    with Session.open(opened, warm=False, **how) as session:
        assert_same(video_of(session), wanted)
        if not cuda_graphs:
            assert sum(graph == "step" for graph, *_ in world.tensorrt.executed) == 2 * len(wanted)
    assert world.left == {}
    world.reset()
    with Session.open(opened, **how) as session:  # warmed
        assert_same(video_of(session), wanted)
    assert world.left == {}


def given(session: Session, made: list[Chunk]) -> np.ndarray:
    return np.concatenate([chunk.latents for chunk in made], 2)


def state(session: Session) -> dict[str, np.ndarray]:
    """What the cache and the prompt's keys and values hold."""
    maker = session._memory()
    tensors = maker.state().items()
    return {n: t.fetch(maker.queue_of(n)).array() for n, t in tensors if not n.startswith("decoder/")}


def test_given_chunks_are_encoded_in_a_clean_pass(on: On, bundles: Bundles) -> None:
    """As under `clean`, to the bit: they have no denoising pass. What follows them does not."""
    path = bundles("forcing-kv")
    with on.open(last_of(path)) as session, on.open(path) as clean:
        start = given(clean, video_of(clean, 3))
        states, videos = [], []
        for one in (session, clean):
            video = one.generate(PROMPT, seed=9, chunks=6, start=start)
            list(islice(video, 3))
            states.append(state(one))
            videos.append(list(video))
    for name, array in states[1].items():
        np.testing.assert_array_equal(states[0][name], array, name)
    np.testing.assert_array_equal(videos[0][0].latents, videos[1][0].latents)
    assert (videos[0][1].latents != videos[1][1].latents).any()


@pytest.mark.parametrize("how", [pytest.param("replay", marks=pytest.mark.long), "empty-sink"])
def test_a_switch_encodes_latents_as_they_are_at_0(on: On, bundles: Bundles, how: Recache) -> None:
    """What it makes of the same latents is the cache that it makes under `clean`, to the bit."""
    path = bundles("switching")
    with on.open(last_of(path)) as session, on.open(path) as clean:
        video = session.generate(PROMPT, seed=7, chunks=8)
        made = list(islice(video, 4))
        video.switch(OTHER, recache=how)
        found = state(session)
        again = clean.generate(PROMPT, seed=7, chunks=8, start=given(session, made))
        list(islice(again, 4))
        again.switch(OTHER, recache=how)
        wanted = state(clean)
        after = [next(video).latents, next(again).latents]
        assert (next(video).latents != next(again).latents).any(), "the chunk before it was made otherwise"
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name)
    np.testing.assert_array_equal(*after)


@pytest.mark.parametrize("how", ["keep-sink", "empty-sink", "replay", "none"])
def test_switches_on_torch_and_onnx_runtime_make_one_video(
    bundles: Bundles, tmp_path: Path, how: Recache
) -> None:
    made = []
    for on in (ONNX, TORCH):
        with on.open(last_of(bundles("switching"))) as session:
            video = session.generate(PROMPT, seed=7, chunks=8)
            video.switch(OTHER, recache=how, at=2)
            first = list(islice(video, 5))
            video.switch(PROMPT, recache=how)
            video.save(tmp_path / on.name)
            rest = list(video)
            made.append([*first, *rest])
            assert_same(session.restore(tmp_path / on.name), rest)
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=1e-4)


def test_a_switch_that_draws_again_fills_the_cache_with_its_last_passes(on: On, bundles: Bundles) -> None:
    """From the first pass on, it is a video of the new prompt on other noise, as under `clean`."""
    schedule = replace(TWO, redraw_from=0)

    def noise(chunk: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
        return chunk_noise(7, chunk, step + (len(TWO.denoising_steps) + 1 if chunk < 2 else 0), shape)

    with counting(on, last_of(bundles("forcing-kv"), schedule)) as (session, lane):
        video = session.generate(PROMPT, seed=7, chunks=5)
        list(islice(video, 2))
        lane.passes = lane.filling = 0
        video.switch(OTHER, recache="replay")
        assert (lane.passes, lane.filling) == (4, 2), "two chunks, and no clean pass"
        switched = list(video)
        wanted = list(session.generate(OTHER, seed=7, chunks=5, noise=noise))[2:]
    for one, other in zip(switched, wanted, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)


@torch.no_grad()
def test_segments_are_chosen_of_the_keys_of_the_last_pass(bundles: Bundles) -> None:
    """A loop by hand that hands `advance` those keys retains what the loop in torch does."""
    opened = last_of(bundles("forcing-kv"))
    plan, spec = opened.plan, opened.plan.spec
    model = random_model(spec)
    text = torch.from_numpy(encode_words(spec, PROMPT))
    chosen = [one.indices for one in generate(model, plan, text, seeded_noise(plan, 7), 6)]
    clean = replace(plan, spec=spec.filled_by("clean"))
    other = [one.indices for one in generate(model, clean, text, seeded_noise(plan, 7), 6)]
    cache = empty_cache(plan, text, 1)
    shape = latent_shape(plan)
    for chunk in range(6):
        latents, attend = torch.from_numpy(chunk_noise(7, chunk, 0, shape)), attend_cache(plan, cache)
        flow, _ = run_alone(plan, model, latents, chunk, 1000.0, attend)
        fresh = torch.from_numpy(chunk_noise(7, chunk, 1, shape))
        latents = 0.375 * (latents - flow) + 0.625 * fresh
        _, new = run_alone(plan, model, latents, chunk, 625.0, attend)
        cache, indices = advance(plan, cache, new, chunk=chunk)
        assert (indices is None) == (chosen[chunk] is None)
        if indices is not None:
            assert torch.equal(indices, chosen[chunk])
    assert any(
        a is not None and not torch.equal(a, b) for a, b in zip(chosen, other, strict=True) if b is not None
    )


def exported(context: Any) -> Path:
    spec = small_spec(layers=1).filled_by(context)
    return shared_bundle(spec, random_model(spec).state_dict(), load_policy("full"), verify=False)


def test_graphs_are_the_same_and_the_manifest_says_which_pass(tmp_path: Path) -> None:
    """Engines too, then: what is told a pass, and whether its caches are taken, the host decides."""
    clean, last = (Bundle.open(exported(context)) for context in ("clean", "last"))
    files = [{n: r.sha256 for n, r in one.manifest.files.items()} for one in (clean, last)]
    assert files[0] == files[1]
    assert (clean.manifest.model.schedule.context, last.manifest.model.schedule.context) == ("clean", "last")
    assert clean.digest != last.digest


def test_the_state_of_another_choice_is_refused(tmp_path: Path) -> None:
    """It is of another bundle: the manifest says which pass fills the cache."""
    with ONNX.open(exported("clean")) as session:
        video = session.generate(PROMPT, seed=7, chunks=4)
        next(video)
        video.save(tmp_path)
    other = exported("last")
    with ONNX.open(other) as session, pytest.raises(InputError, match="was saved of the bundle"):
        session.restore(tmp_path)
