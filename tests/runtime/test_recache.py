"""Switching prompts: what is replayed for any plan, and the video after it, against torch and to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps.errors import InputError
from forcingkv.models.generate import next_latents
from forcingkv.models.kv import advance, attend_cache, empty_cache
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import Bundle, Session, positions
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.rebuild import replayed
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.roles import Role
from forcingkv.runtime.positions import chunk_noise
from forcingkv.runtime.spec import Schedule
from forcingkv.runtime.text import encode_words
from tests.conftest import headmap_of, random_model, roles, small_spec
from tests.runtime.lanes import ONNX, TORCH, On
from tests.runtime.videos import BUNDLES, OTHER, PROMPT, assert_same, differ, video_of

Bundles = Callable[[str], Path]


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    retained = Retained(2, 0.34, 1) if draw(st.booleans()) else None

    def group(retained: Retained | None) -> tuple[Role, ...]:
        return roles(draw(st.integers(0, 7)), draw(st.integers(1 if retained else 0, 8)), retained)

    policy = Policy("any", "", {"static": group(None), "dynamic": group(retained)})
    spec = small_spec(ar_start=draw(st.integers(0, 3)), frames_per_chunk=draw(st.integers(1, 4)))
    static = draw(st.lists(st.lists(st.integers(0, 2)), min_size=4, max_size=4))
    return build_plan(spec, spec.geometry(), policy, headmap_of(spec, static))


@given(plans(), st.integers(0, 20))
def test_what_is_replayed_for_any_plan(plan: CachePlan, made: int) -> None:
    chunks, frames = replayed(plan, made), plan.spec.frames_per_chunk
    assert list(chunks) == sorted(set(chunks)), "each once, in their order"
    if any(entry.role.name != "sink" for entry in plan.entries):
        assert not made or chunks[-1] == made - 1, "up to the newest, where anything of it is kept"
    if made <= plan.phases[-1].first_chunk:
        assert chunks == tuple(range(made)), "all, while the cache still fills"
    known = [chunk * frames + frame for chunk in chunks for frame in range(frames)]
    for entry in plan.entries:
        assert plan.entry_shape(entry, len(chunks)) == plan.entry_shape(entry, made), "the phase that comes"
        if entry.role.name != "retained":
            held, again = (entry.role.spans(plan, entry.group, n, None) for n in (made, len(chunks)))
            assert [known[span.frame] for span in again] == [span.frame for span in held], "the same frames"


@given(plans())
def test_what_is_replayed_was_held_before_and_does_not_grow(plan: CachePlan) -> None:
    """A video keeps latents of no other chunks."""
    most = len(replayed(plan, 1000))
    for made in range(20):
        assert {*replayed(plan, made + 1)} <= {*replayed(plan, made), made}
        assert len(replayed(plan, made)) <= most


@pytest.mark.parametrize("name", BUNDLES)
def test_the_same_prompt_again_changes_nothing(on: On, bundles: Bundles, name: str) -> None:
    """The passes that made the caches are run again, on the same latents: nothing can differ.

    While they are few: later a rebuild takes fewer passes than there were, so early frames are known only
    through the sink.
    """
    with on.open(bundles(name)) as session:
        wanted = video_of(session, 8)
        few = max(made for made in range(9) if replayed(session.plan, made) == tuple(range(made)))
        assert few >= session.plan.phases[-1].first_chunk
        for at in range(few + 1):
            video = session.generate(PROMPT, seed=7, chunks=8)
            found = list(islice(video, at))
            assert video.switch(PROMPT) == at
            assert_same([*found, *video], wanted)


def in_torch(session: Session, at: int, old: list[np.ndarray], chunks: int) -> list[np.ndarray]:
    """Latents of the chunks from `at` on, of a video under OTHER whose first latents are given."""
    plan, spec = session.plan, session.spec
    model, schedule = random_model(spec), spec.schedule
    text = torch.from_numpy(encode_words(spec, OTHER))
    prompt, cache, made = model.prompt(text), empty_cache(plan, text, 1), []
    for chunk in range(chunks):
        first = chunk * spec.frames_per_chunk
        tables = positions.rotary(spec, plan.geometry, first, spec.frames_per_chunk)
        cosines, sines = map(torch.from_numpy, tables)
        attend = attend_cache(plan, cache)

        def run(latents: torch.Tensor, timestep: float) -> tuple[torch.Tensor, list[KeysValues]]:
            time = torch.from_numpy(positions.time_features(spec, np.array([[timestep]])))
            return model(latents, time, (cosines, sines), prompt, attend)  # noqa: B023

        if chunk < at:
            latents = torch.from_numpy(old[chunk])
        else:
            shape = old[0].shape
            noise = [torch.from_numpy(chunk_noise(7, chunk, step, shape)) for step in range(3)]
            latents = noise[0]
            for step, timestep in enumerate(schedule.later.timesteps):
                sigma, following = schedule.later.sigmas[step : step + 2]
                flow, _ = run(latents, timestep)
                latents = next_latents("fresh", latents, flow, sigma, following, noise[step + 1])
            made.append(latents.numpy())
        _, new = run(latents, schedule.context_timestep)
        cache, _ = advance(plan, cache, new, chunk=chunk)
    return made


@pytest.mark.parametrize("name", ["full", "window"])
def test_a_switch_is_the_new_prompt_on_the_old_latents(on: On, bundles: Bundles, name: str) -> None:
    """As if the video had been made under the new prompt, with those latents, from its start."""
    with on.open(bundles(name)) as session, torch.no_grad():
        video = session.generate(PROMPT, seed=7, chunks=6)
        old = [chunk.latents for chunk in islice(video, 3)]
        assert video.switch(OTHER) == 3
        for chunk, wanted in zip(video, in_torch(session, 3, old, 6), strict=True):
            np.testing.assert_allclose(chunk.latents, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_switch_that_redraws_all_is_the_new_prompt_from_the_start(
    on: On, bundles: Bundles, name: str
) -> None:
    """From the first pass on nothing of the old latents is left: a video of the new prompt on other noise."""
    opened = Bundle.open(bundles(name))
    model = opened.manifest.model
    drawing = replace(model, schedule=replace(model.schedule, redraw_from=0))
    passes = len(model.schedule.later)
    at = max(made for made in range(4) if replayed(opened.plan, made) == tuple(range(made)))

    def noise(chunk: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
        return chunk_noise(7, chunk, step + (passes + 1 if chunk < at else 0), shape)

    with on.open(Bundle(opened.path, replace(opened.manifest, model=drawing), opened.headmap)) as session:
        video = session.generate(PROMPT, seed=7, chunks=6)
        shown = list(islice(video, at))
        assert video.switch(OTHER) == at
        switched = list(video)
        wanted = list(session.generate(OTHER, seed=7, chunks=6, noise=noise))
        for chunk, other in zip(switched, wanted[at:], strict=True):
            assert np.array_equal(chunk.latents, other.latents)
            # A decoder with caches remembers what was shown.
            assert name == "taehv" or np.array_equal(chunk.frames, other.frames)
        assert not np.array_equal(shown[-1].latents, wanted[at - 1].latents)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_pass_that_there_is_not_is_refused(step: int) -> None:
    with pytest.raises(InputError, match="redraw_from"):
        Schedule((1000.0, 625.0), redraw_from=step)


@pytest.mark.parametrize("name", BUNDLES)
def test_without_recache_only_the_prompt_changes(on: On, bundles: Bundles, name: str) -> None:
    with on.open(bundles(name)) as session:
        video = session.generate(PROMPT, seed=7, chunks=8)
        for _ in range(5):
            next(video)

        def state() -> dict[str, np.ndarray]:
            maker = session._memory()
            return {n: t.fetch(maker.queue_of(n)).array() for n, t in maker.state().items()}

        before = state()
        assert video.switch(OTHER, recache=False) == 5
        changed = {name for name, array in state().items() if (array != before[name]).any()}
        assert changed == {name for name in before if name.startswith("cross/")}
        first = next(video)
        video = session.generate(PROMPT, seed=7, chunks=8)
        for _ in range(5):
            next(video)
        video.switch(OTHER)
        assert differ(next(video), first), "the old prompt went on ruling"


@pytest.mark.slow
@pytest.mark.parametrize(
    "on", [ONNX, pytest.param(TORCH, marks=pytest.mark.long)], indirect=True, ids=lambda on: str(on.name)
)
def test_a_switch_late_in_a_long_video(on: On, bundles: Bundles) -> None:
    """Past frame 1,024, where public code ends; twice, and without taking more memory than early on."""
    with on.open(bundles("forcing-kv"), threads=1) as session:
        video = session.generate(PROMPT, seed=7)
        bound = 0
        for chunk in islice(video, 350):
            if chunk.index == 20:
                video.switch(OTHER)
                next(video)
                bound = len(session._memory()._passes)
        assert video.index * session.spec.frames_per_chunk > 1024
        at = video.index
        assert video.switch(PROMPT) == at
        assert video.switch(OTHER) == at
        chunk = next(video)
        assert chunk.index == at
        assert np.isfinite(chunk.latents).all()
        assert len(session._memory()._passes) == bound
        assert len(video._latents) == len(replayed(session.plan, 1000))
