"""An engine of fewer profiles than phases, stood in: shapes and profile of each chunk, and the video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Session
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.faults import DeviceError
from tests.conftest import random_model
from tests.exported import shared_bundle
from tests.models.test_chunk_lengths import frame_wise
from tests.runtime.conftest import small_bundle
from tests.runtime.engine_world import World
from tests.runtime.videos import assert_same, video_of

FULL = [0] + [1] * 19 + [2]
"""For each phase its profile: nothing cached, the window fills, the window is full."""
WINDOW = [0, 1, 2, 3, 4, 4, 4, 4, 4, 5]
"""A sink of three frames is collected first, and six more frames come behind it."""


def world_of(name: str, monkeypatch: pytest.MonkeyPatch) -> World:
    if name == "full":
        return World(small_bundle("frame-wise"), monkeypatch)
    spec, policy = frame_wise()
    return World(shared_bundle(spec, random_model(spec).state_dict(), policy), monkeypatch)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return world_of("full", monkeypatch)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(
    ("name", "profiles"), [("full", FULL), pytest.param("window", WINDOW, marks=pytest.mark.long)]
)
def test_a_frame_wise_video_is_that_of_onnx_runtime(
    name: str, profiles: list[int], cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fakes refuse shapes that a profile does not take, and compute with those that were set. The last
    phase is there on both sides of the cache."""
    world, chunks = world_of(name, monkeypatch), len(profiles) + 2
    with Session.open(Bundle.open(world.bundle.path), backend="onnxruntime", threads=1) as session:
        expected: Any = video_of(session, chunks)
    options: dict[str, Any] = {"cuda_graphs": cuda_graphs, "preflight": False, "warm": False}
    with Session.open(world.bundle, backend="tensorrt-rtx", **options) as session:
        assert_same(video_of(session, chunks), expected)
        assert_same(video_of(session, chunks), expected)  # with CUDA graphs each pass is captured now
        schedule = session.spec.schedule
    steps = {("step", phase): profile for phase, profile in enumerate(profiles)}
    assert world.tensorrt.profiles == {("prompt", 0): 0, ("decode", 0): 0, **steps}
    ran = [phase for graph, phase, *_ in world.tensorrt.executed if graph == "step"]
    phases = [*range(len(profiles)), len(profiles) - 1, len(profiles) - 1]
    once = [
        phase
        for chunk, phase in enumerate(phases)
        for _ in range(1 + len(schedule.of_chunk(chunk).timesteps))
    ]
    assert ran[: len(once)] == once
    assert world.left == {}


def test_every_phase_is_run_once_when_a_session_opens_whatever_its_profile(world: World) -> None:
    """TensorRT-RTX compiles for shapes as it meets them, not for profiles."""
    with Session.open(world.bundle, backend="tensorrt-rtx", preflight=False, warm=True):
        ran = [phase for graph, phase, *_ in world.tensorrt.executed if graph == "step"]
    assert ran == [*range(21)]


def with_step(world: World, **changes: Any) -> Bundle:
    """The bundle with another record of the engine of `step`."""
    manifest = world.bundle.manifest
    engines = tuple(replace(e, **changes) if e.graph == "step" else e for e in manifest.engines)
    return Bundle(world.bundle.path, replace(manifest, engines=engines), world.bundle.headmap)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"profiles": None}, "has 3 optimization profiles; expected 21, as the manifest says"),
        ({"profiles": (0, 20)}, "has 3 optimization profiles; expected 2, as the manifest says"),
        ({"phases": 22}, "was built for 22 phases of the cache; expected 21"),
    ],
)
def test_an_engine_of_other_profiles_than_its_record_says_is_refused(
    world: World, changes: dict[str, Any], words: str
) -> None:
    world.reset(computes=False)
    with pytest.raises(InputError, match=rf"step\.engine {words}.* export it again"):
        Session.open(with_step(world, **changes), backend="tensorrt-rtx", preflight=False)
    assert world.left == {}


def test_shapes_that_a_profile_does_not_take_are_refused_before_anything_runs(world: World) -> None:
    """A record that names other phases than the engine has profiles for: no pass runs with wrong shapes."""
    world.reset(computes=False)
    words = r"could not set cache\.0\.all\.recent\.\w+ to .* for step in phase 1"
    with pytest.raises(DeviceError, match=words):
        Session.open(with_step(world, profiles=(0, 2, 20)), backend="tensorrt-rtx", preflight=False)
    assert world.tensorrt.executed == []
    assert world.left == {}
