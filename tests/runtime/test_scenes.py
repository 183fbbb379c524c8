"""Scenes with cuts: what of a scene stays in the window, and videos that are cut, saved and gone on with."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.scenes import KEPT, Scene
from forcingkv.runtime.schedule import FilledBy
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.conftest import small_bundle
from tests.runtime.lanes import On
from tests.runtime.test_schedule import with_schedule
from tests.runtime.videos import OTHER, PROMPT, assert_same, differ

SPEC = small_spec(
    layers=1,
    frames_per_chunk=2,
    attended_frames=8,
    sink_frames=2,
    scene_frames=2,
    scene_offset=8.0,
    recache="cut",
)
CUTS = {2: OTHER, 5: PROMPT}
CHUNKS = 9


def plan_of(spec: ModelSpec) -> CachePlan:
    return build_plan(spec, spec.geometry(), load_policy("full"))


def scene_of(plan: CachePlan) -> Scene:
    (scene,) = (role for role in plan.layers[0][0].roles if isinstance(role, Scene))
    return scene


def rolled(plan: CachePlan, passes: int, cuts: list[int]) -> list[int]:
    """As LongLive 2 rolls its window, frame by frame: what is kept in front, what is pinned, and the rest."""
    size, sink = plan.spec.frames_per_chunk, plan.spec.sink_frames
    room = plan.spec.attended_frames - sink - size
    window: list[int] = []
    pinned: list[int] = []
    for done in range(passes):
        if done in cuts:
            pinned = [done * size + n for n in range(plan.spec.scene_frames)]
        window += [frame for frame in range(done * size, (done + 1) * size) if frame >= sink]
        while len(window) > room:
            front = len(pinned) if window[: len(pinned)] == pinned else 0
            del window[front]
    return window


@given(
    st.integers(1, 3).flatmap(lambda size: st.tuples(st.just(size), st.integers(2, 5))),
    st.lists(st.integers(1, 30), max_size=8, unique=True).map(sorted),
    st.integers(0, 34),
)
def test_a_scene_s_first_frames_stay_where_the_window_ends(
    sizes: tuple[int, int], cuts: list[int], passes: int
) -> None:
    size, whole = sizes
    pinned = replace(SPEC, frames_per_chunk=size, sink_frames=size, scene_frames=size)
    plan = plan_of(replace(pinned, attended_frames=size * (whole + 2)))
    group, scene = plan.layers[0][0], scene_of(plan)
    assert scene.frames_held(plan, group, passes, cuts) == rolled(plan, passes, cuts)


@given(st.lists(st.integers(1, 20), max_size=6, unique=True).map(sorted), st.integers(0, 24))
def test_what_is_told_makes_one_window_of_the_one_before(cuts: list[int], chunk: int) -> None:
    for positions in ("absolute", "relative"):
        plan = plan_of(replace(SPEC, positions=positions))  # type: ignore[arg-type]
        group, scene = plan.layers[0][0], scene_of(plan)
        before, after = (scene.frames_held(plan, group, count, cuts) for count in (chunk, chunk + 1))
        tokens, size = plan.frame_tokens, plan.spec.frames_per_chunk
        there = np.repeat([*before, *range(chunk * size, (chunk + 1) * size)], tokens)
        kept = scene.told(plan, group, chunk, cuts)[KEPT]
        stays, old = kept < 0, np.maximum(kept, -1 - kept)
        assert there[old].tolist() == np.repeat(after, tokens).tolist()
        assert len(kept) == len(scene.told(plan, group, chunk)[KEPT]), "lengths are those without cuts"
        if positions == "relative":
            assert (stays == (old == np.arange(len(old)))).all()
        else:
            assert not stays.any()


def test_recent_frames_stay_recent_where_a_scene_leaves_no_room_for_them() -> None:
    narrow = plan_of(replace(SPEC, attended_frames=6))
    assert [role.name for role in narrow.layers[0][0].roles] == ["sink", "recent"]
    assert [role.name for role in plan_of(SPEC).layers[0][0].roles] == ["sink", "scene"]


@pytest.fixture(scope="module")
def bundle() -> Path:
    weights = random_model(SPEC).state_dict()
    return shared_bundle(SPEC, weights, load_policy("full"), verify=False)  # whole videos are compared below


def cut_video(session: Session, cuts: dict[int, str] = CUTS) -> list[np.ndarray]:
    video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
    for chunk, prompt in cuts.items():
        video.switch(prompt, at=chunk)
    return [chunk.latents.copy() for chunk in video]


@pytest.mark.parametrize("context", ["clean", "last"])
def test_a_session_makes_the_video_that_torch_makes(bundle: Path, on: On, context: FilledBy) -> None:
    def text(prompt: str) -> torch.Tensor:
        return torch.from_numpy(encode_words(SPEC, prompt))

    opened = with_schedule(Bundle.open(bundle), replace(SPEC.schedule, context=context))
    with on.open(opened) as session:
        made, plan = cut_video(session), session.plan
        plain = cut_video(session, {})
    scenes = {chunk: text(prompt) for chunk, prompt in CUTS.items()}
    noise = seeded_noise(plan, 7)
    known = generate(random_model(SPEC), plan, text(PROMPT), noise, CHUNKS, scenes=scenes)
    for mine, wanted in zip(made, known, strict=True):
        np.testing.assert_allclose(mine, wanted.latents.numpy(), atol=2e-5, rtol=0)
    apart = [float(np.abs(a - b).max()) for a, b in zip(made, plain, strict=True)]
    assert max(apart[:2]) == 0, "before the first cut"
    assert min(apart[2:]) > 1e-4


def test_the_first_frames_of_a_scene_are_seen_and_positions_jump(bundle: Path) -> None:
    """Each of the two changes a video that is cut."""
    with Session.open(bundle) as session:
        made = cut_video(session)
    for changes in ({"scene_offset": 0.0}, {"scene_frames": 0}):
        other = replace(SPEC, **changes)  # type: ignore[arg-type]
        text = {c: torch.from_numpy(encode_words(SPEC, p)) for c, p in CUTS.items()}
        plan = plan_of(other)
        first = torch.from_numpy(encode_words(SPEC, PROMPT))
        known = generate(random_model(SPEC), plan, first, seeded_noise(plan, 7), CHUNKS, scenes=text)
        apart = [float(np.abs(a - b.latents.numpy()).max()) for a, b in zip(made, known, strict=True)]
        assert max(apart) > 1e-3, changes


def test_it_goes_on_to_the_bit_when_restored(bundle: Path, on: On, tmp_path: Path) -> None:
    with on.open(bundle) as session:
        whole = session.generate(PROMPT, seed=7, chunks=CHUNKS)
        for chunk, prompt in CUTS.items():
            whole.switch(prompt, at=chunk)
        known = list(whole)
        for saved_after in (2, 4, 7):
            video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
            for chunk, prompt in CUTS.items():
                video.switch(prompt, at=chunk)
            list(islice(video, saved_after))
            video.save(tmp_path / str(saved_after))
        for saved_after in (2, 4, 7):
            assert_same(session.restore(tmp_path / str(saved_after)), known[saved_after:])


def test_a_video_after_one_that_was_cut_knows_nothing_of_it(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        before = cut_video(session, {})
        cut_video(session)
        after = cut_video(session, {})
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_a_replay_ends_scenes(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
        video.switch(OTHER, at=2)
        video.switch(PROMPT, at=6, recache="replay")
        list(islice(video, 5))
        assert session._memory().cache.cuts == (2,)
        list(video)
        assert session._memory().cache.cuts == ()


def test_cuts_that_cannot_be_made_are_refused(bundle: Path) -> None:
    with Session.open(small_bundle("full")) as session:
        video = session.generate(PROMPT, seed=7, chunks=3)
        with pytest.raises(InputError, match="was not trained with scenes"):
            video.switch(OTHER, recache="cut")
        list(video)
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=7, chunks=3)
        next(video)
        with pytest.raises(InputError, match=r"fade is 2, and a cut begins another scene at once"):
            video.switch(OTHER, fade=2)
        list(video)
    opened = Bundle.open(bundle)
    uneven = replace(SPEC, attended_frames=7, positions="relative")
    other = Bundle(opened.path, replace(opened.manifest, model=uneven), None)
    with pytest.raises(InputError, match="has 3 frames, no whole chunks of 2"), _unexported(other) as session:
        session.generate(PROMPT, seed=7, chunks=3).switch(OTHER, at=1)


def _unexported(bundle: Bundle) -> Session:
    """On torch, which needs no graphs for another window."""
    return Session.open(bundle, backend="torch")


def test_frames_of_a_scene_differ_from_those_without(bundle: Path) -> None:
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=7, chunks=4)
        video.switch(OTHER, at=2)
        cut = list(video)
        other = session.generate(PROMPT, seed=7, chunks=4)
        other.switch(OTHER, at=2, recache="none")
        assert differ(cut[2], list(other)[2])
