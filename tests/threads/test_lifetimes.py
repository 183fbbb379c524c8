"""A session that nobody holds gives its memory back at once, without Python's collector of cycles."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forcingkv.runtime import DeviceError, Session
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from tests.runtime.engine_world import World
from tests.runtime.lanes import Failing
from tests.runtime.videos import PROMPT, assert_same, open_with, video_of

Bundles = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def unclosed(session: Session) -> None:
    """Dropped as it was opened."""


def unfinished(session: Session) -> None:
    next(session.generate(PROMPT, seed=1))


def finished(session: Session) -> None:
    assert len(video_of(session, 2)) == 2


def abandoned(session: Session) -> None:
    videos = [session.generate(PROMPT, seed=seed) for seed in (1, 2)]
    next(videos[1])


def failed(session: Session) -> None:
    def noise(*_: object) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(session.generate(PROMPT, seed=1, noise=noise))


def timed(session: Session) -> None:
    assert session.pass_timer(2).fill() > 0


def closed(session: Session) -> None:
    next(session.generate(PROMPT, seed=1))
    session.close()


WAYS = (unclosed, unfinished, finished, abandoned, failed, timed, closed)


@pytest.mark.parametrize("use", WAYS)
def test_a_session_that_is_dropped_is_freed(bundles: Bundles, use: Callable[[Session], None]) -> None:
    session = Session.open(bundles("forcing-kv"), threads=1)
    maker = session._memory()
    lane = maker.lane
    assert isinstance(lane, OnnxLane)
    held = [weakref.ref(each) for each in (session, maker, lane, *lane._graphs.values())]
    del maker, lane
    use(session)
    del session
    assert [ref() for ref in held] == [None] * 6


def test_a_session_is_freed_after_memory_ran_out(bundles: Bundles) -> None:
    session, lane = open_with(bundles("forcing-kv"), Failing)
    lane.fails_in = 3
    with pytest.raises(RuntimeError, match="as a test asked for"):
        video_of(session)
    held = [weakref.ref(each) for each in (session, session._memory(), lane, *lane._graphs.values())]
    del session, lane
    assert not any(ref() for ref in held)


def test_a_video_holds_its_session(bundles: Bundles) -> None:
    """`for chunk in Session.open(...).generate(...)`."""
    with Session.open(bundles("forcing-kv"), threads=1) as session:
        expected = video_of(session, 3)
    session = Session.open(bundles("forcing-kv"), threads=1)
    video, held = session.generate(PROMPT, seed=7, chunks=3), weakref.ref(session._memory())
    del session
    assert_same(video, expected)
    del video
    assert held() is None


@pytest.mark.parametrize("kept", ["first", "sibling"])
def test_the_weights_stay_as_long_as_any_session_on_them(bundles: Bundles, kept: str) -> None:
    first, lane = open_with(bundles("forcing-kv"), OnnxLane)
    weights = [weakref.ref(graph) for graph in lane._graphs.values()]
    expected = video_of(first, 2)
    other = first.sibling()
    del lane
    kept_session, dropped = (first, other) if kept == "first" else (other, first)
    memory = weakref.ref(dropped._memory())
    del first, other, dropped
    assert memory() is None
    assert all(graph() for graph in weights)
    assert_same(video_of(kept_session, 2), expected)
    del kept_session
    assert not any(graph() for graph in weights)


def test_a_session_may_be_dropped_by_a_thread_that_never_used_it(bundles: Bundles) -> None:
    sessions = [Session.open(bundles("forcing-kv"), threads=1)]
    memory = weakref.ref(sessions[0]._memory())
    thread = threading.Thread(target=sessions.clear)
    thread.start()
    thread.join()
    assert memory() is None


def settle(world: World) -> None:
    """Let all streams come to their ends: the fake frees nothing while any of them has work to do."""
    for stream in list(world.cuda.streams.values()):
        stream.drain()


@pytest.mark.parametrize("use", WAYS)
def test_a_session_on_engines_that_is_dropped_gives_the_gpu_back(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, use: Callable[[Session], None]
) -> None:
    """Its lane is full of cycles: it is closed, not only dropped."""
    world = World(bundles("forcing-kv"), monkeypatch)
    room = world.cuda.room
    session = Session.open(world.bundle, backend="tensorrt-rtx", preflight=False, cuda_graphs=True)
    sibling = session.sibling(preflight=False)
    settle(world)
    use(session)
    settle(world)
    del session
    assert_same(video_of(sibling, 1), video_of(sibling, 1))
    del sibling
    kinds = {kind: count for kind, count in world.cuda.left.items() if kind not in ("context", "engine")}
    assert kinds == {}
    assert world.cuda.room == room
    assert world.left == {}, "what of TensorRT's own is left has no `close`, and goes with the cycle"


def test_an_engine_is_not_freed_while_a_sibling_is_made_on_it(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(bundles("forcing-kv"), monkeypatch)
    session = Session.open(world.bundle, backend="tensorrt-rtx", preflight=False)
    expected, sessions = video_of(session, 2), [session]
    settle(world)
    made = world.tensorrt.does

    def close_meanwhile(name: str, device: int | None = None) -> bool:
        if name == "ICudaEngine.create_execution_context":
            monkeypatch.setattr(world.tensorrt, "does", made)
            thread = threading.Thread(target=sessions[0].close)
            thread.start()
            thread.join()
            assert world.cuda.live["engine"] == 3
        return made(name, device)

    monkeypatch.setattr(world.tensorrt, "does", close_meanwhile)
    with session.sibling(preflight=False) as sibling:
        assert_same(video_of(sibling, 2), expected)
    with pytest.raises(RuntimeError, match="closed"):
        session.sibling(preflight=False)
    sessions.clear()
    del session, sibling
    assert world.left == {}


def test_a_lane_that_was_closed_makes_no_sibling(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(bundles("forcing-kv"), monkeypatch)
    lane = world.lane()
    lane.close()
    with pytest.raises(DeviceError, match="the lane is closed"):
        lane.sibling()
