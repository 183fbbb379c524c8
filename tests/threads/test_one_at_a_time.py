"""A session in two threads at once: the second is refused at once, and the first goes on undisturbed."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Chunk, InUseError, Session, Video
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from forcingkv.runtime.positions import chunk_noise
from tests.runtime.videos import OTHER, PROMPT, assert_same, open_with, python, video_of
from tests.threads.gates import Gate, GatedLane

Bundles = Callable[[str], Path]
CHUNKS = 5
AT_ONCE = 1.0
"""Seconds within which wrong use is refused."""


class World:
    """A session that can be held, its video under way, a state of it, and what the rest of it must be."""

    def __init__(self, folder: Path, room: Path) -> None:
        self.session, lane = open_with(folder, GatedLane)
        self.gate: Gate = lane.gate
        self.room, self.state = room, room / "state"
        self.alone = video_of(self.session, CHUNKS)
        self.video, self.found = self.begun()
        self.video.save(self.state)

    def begun(self) -> tuple[Video, list[Chunk]]:
        video = self.session.generate(PROMPT, seed=7, chunks=CHUNKS)
        return video, [next(video)]

    def uses(self) -> dict[str, Callable[[], Any]]:
        """Everything that touches the session's memory."""
        return {
            "next": lambda: next(self.video),
            "switch": lambda: self.video.switch(OTHER),
            "save": lambda: self.video.save(self.room / "another"),
            "generate": lambda: self.session.generate(OTHER, seed=8),
            "restore": lambda: self.session.restore(self.state),
            "pass_timer": lambda: self.session.pass_timer(3),
        }


@pytest.fixture
def world(bundles: Bundles, tmp_path: Path) -> Iterator[World]:
    world = World(bundles("forcing-kv"), tmp_path)
    with world.session:
        yield world


USES = ("next", "switch", "save", "generate", "restore")


@pytest.mark.parametrize("first", USES)
def test_while_one_is_at_it_all_others_are_refused(world: World, first: str) -> None:
    uses = world.uses()
    with world.gate.holding(uses[first]) as done:
        began = time.perf_counter()
        for name, use in uses.items():
            ended = first == "generate" and name in ("next", "switch", "save")
            with pytest.raises(RuntimeError, match=r"with sibling\(\)") as refused:
                use()
            assert isinstance(refused.value, InUseError) != ended
            assert ("began another" if ended else "in use by another thread") in str(refused.value)
        assert time.perf_counter() - began < AT_ONCE
        assert not done.done()
        assert world.video.index == 1
    result = done.result()
    assert not (world.room / "another").exists() or first == "save"
    if first == "next":
        assert_same([*world.found, result, *world.video], world.alone)
    elif first == "save":
        assert_same([*world.found, *world.video], world.alone)
        assert_same(world.session.restore(world.room / "another"), world.alone[1:])
    elif first == "restore":
        assert_same(result, world.alone[1:])
    elif first == "generate":
        made = [next(result) for _ in range(3)]
        assert_same(
            made, [next(again) for again in [world.session.generate(OTHER, seed=8)] for _ in range(3)]
        )
    else:
        assert result == 1
        switched = [*world.found, *world.video]
        world.video, _ = world.begun()
        world.video.switch(OTHER)
        assert_same([*world.found, *world.video], switched)


def test_what_cannot_be_used_at_all_is_refused_as_such_by_whoever_comes_second(world: World) -> None:
    """A wrong prompt, a video that ended: the session's being in use is not what is wrong with them."""
    before, (world.video, _) = world.video, world.begun()
    with world.gate.holding(lambda: next(world.video)) as done:
        with pytest.raises(RuntimeError, match="began another"):
            next(before)
        with pytest.raises(InputError, match="'f'"):
            world.video.switch("a f")
    assert_same([done.result()], world.alone[1:2])


def test_a_sibling_may_be_made_and_used_while_the_session_is_at_work(world: World) -> None:
    with world.gate.holding(lambda: next(world.video)) as done, world.session.sibling() as sibling:
        assert_same(video_of(sibling, CHUNKS), world.alone)
    assert_same([*world.found, done.result(), *world.video], world.alone)


@pytest.mark.parametrize("first", USES)
def test_closing_waits_for_nobody_and_what_is_at_work_is_finished(world: World, first: str) -> None:
    maker = weakref.ref(world.session._memory())
    with world.gate.holding(world.uses()[first]) as done:
        began = time.perf_counter()
        world.session.close()
        world.session.close()
        assert time.perf_counter() - began < AT_ONCE
        for use in (*world.uses().values(), world.session.sibling):
            with pytest.raises(RuntimeError, match="closed"):
                use()
        assert maker() is not None
        assert not done.done()
    if first == "next":
        assert_same([done.result()], world.alone[1:2])
    elif first == "save":
        with Session.open(world.session.bundle, threads=1) as fresh:
            assert_same(fresh.restore(world.room / "another"), world.alone[1:])
    else:
        done.result()
    del done
    assert maker() is None, "it is given back by whoever was at work"
    with pytest.raises(RuntimeError, match="closed"):
        next(world.video)


def test_frames_that_went_with_the_memory_are_not_handed_out(bundles: Bundles) -> None:
    """On a GPU they would be memory that is somebody else's by then."""
    opened, lane = open_with(bundles("forcing-kv"), GatedLane)
    opened._frames = opened._memory()._frames_on = "device"
    video = opened.generate(PROMPT, seed=7)
    next(video)
    with lane.gate.holding(lambda: next(video)) as done:
        opened.close()
    with pytest.raises(RuntimeError, match="closed"):
        done.result()


def test_an_error_on_the_way_out_is_not_hidden_by_a_session_that_is_at_work(world: World) -> None:
    """`with Session.open(...)` in a task that is cancelled, while its thread makes a chunk."""

    def leave() -> None:
        with world.session:
            raise KeyError("the reason")

    with world.gate.holding(lambda: next(world.video)), pytest.raises(KeyError, match="the reason"):
        leave()
    assert world.session._maker is None


def test_the_weights_stay_while_a_sibling_is_made_of_a_session_that_is_closed(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()

    class Slow(OnnxLane):
        def tensor(self, *given: Any, **named: Any) -> Any:
            gate.pass_through()
            return super().tensor(*given, **named)

    session, lane = open_with(bundles("forcing-kv"), Slow)
    weights = [weakref.ref(graph) for graph in lane._graphs.values()]
    expected = video_of(session, 3)
    with gate.holding(session.sibling) as done:
        session.close()
        assert all(graph() for graph in weights)
    sibling = done.result()
    del done
    assert_same(video_of(sibling, 3), expected)
    sibling.close()
    assert not any(graph() for graph in weights)


def test_what_a_session_calls_cannot_use_it(bundles: Bundles) -> None:
    """The same thread, in the middle of a chunk."""
    with Session.open(bundles("forcing-kv"), threads=1) as session, ExitStack() as siblings:
        expected, refused = video_of(session, 2), []

        def noise(chunk: int, step: int, shape: tuple[int, ...]) -> Any:
            for use in (lambda: next(video), lambda: session.generate(PROMPT, seed=1)):
                with pytest.raises(InUseError, match=r"at work in this very thread: .*noise source"):
                    use()
                refused.append((chunk, step))
            if (chunk, step) == (1, 0):
                siblings.enter_context(session.sibling())
            return chunk_noise(7, chunk, step, shape)

        video = session.generate(PROMPT, seed=1, chunks=2, noise=noise)
        assert_same(video, expected)
        assert len(refused) == 2 * 2 * len(session.spec.schedule.later)

        def closing(chunk: int, step: int, shape: tuple[int, ...]) -> Any:
            session.close()
            return chunk_noise(7, chunk, step, shape)

        last = session.generate(PROMPT, seed=1, noise=closing)
        assert_same([next(last)], expected[:1])
        with pytest.raises(RuntimeError, match="closed"):
            next(last)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, SystemExit])
def test_an_interruption_leaves_the_session_free(bundles: Bundles, interruption: type[BaseException]) -> None:
    def noise(chunk: int, step: int, shape: tuple[int, ...]) -> Any:
        if (chunk, step) == (1, 1):
            raise interruption
        return chunk_noise(7, chunk, step, shape)

    with Session.open(bundles("forcing-kv"), threads=1) as session:
        expected = video_of(session, 3)
        video = session.generate(PROMPT, seed=7, noise=noise)
        next(video)
        with pytest.raises((interruption, RuntimeError)):
            next(video)
        with ThreadPoolExecutor(1) as pool:
            assert_same(pool.submit(video_of, session, 3).result(), expected)


def test_a_restore_that_is_interrupted_ends_the_video_before_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its caches are another video's by then."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world.gate, "pass_through", interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.session.restore(world.state)
    with pytest.raises(RuntimeError, match="this video ended"):
        next(world.video)
    assert_same(world.session.restore(world.state), world.alone[1:])


def test_one_thread_after_the_other_may_use_a_session(bundles: Bundles) -> None:
    """As pools do: each call in whichever thread is free."""
    with Session.open(bundles("taehv"), threads=1) as session:
        expected, made = video_of(session), list[Chunk]()
        video = session.generate(PROMPT, seed=7, chunks=7)
        for _ in expected:
            thread = threading.Thread(target=lambda: made.append(next(video)))
            thread.start()
            thread.join()
        assert_same(made, expected)
        assert next(video, None) is None


def together(*doings: Callable[[], Any]) -> list[Any]:
    """What each gives or raises, in a thread of its own, all begun at the same moment."""
    barrier = threading.Barrier(len(doings))

    def run(doing: Callable[[], Any]) -> Any:
        barrier.wait()
        return doing()

    with ThreadPoolExecutor(len(doings)) as pool:
        futures = [pool.submit(run, doing) for doing in doings]
        return [future.exception() or future.result() for future in futures]


def test_two_users_of_one_session_never_see_each_other(bundles: Bundles) -> None:
    """As a web server's pool of threads has it, where everybody takes the one session there is."""
    with Session.open(bundles("forcing-kv"), threads=1) as session:
        alone = {seed: video_of(session, seed=seed) for seed in (1, 2)}
        for _ in range(8):
            seeds = (1, 2)
            ended = together(
                *(lambda seed=seed: video_of(session, seed=seed) for seed in seeds)  # type: ignore[misc]
            )
            for seed, result in zip(seeds, ended, strict=True):
                if isinstance(result, Exception):
                    assert isinstance(result, RuntimeError)
                    assert "sibling()" in str(result)
                else:
                    assert_same(result, alone[seed])


def test_threads_that_share_a_video_get_each_chunk_once(bundles: Bundles) -> None:
    with Session.open(bundles("forcing-kv"), threads=1) as session:
        expected = video_of(session, 12)
        video, made = session.generate(PROMPT, seed=7, chunks=12), list[Chunk]()

        def take() -> None:
            while True:
                try:
                    made.append(next(video))
                except StopIteration:
                    return
                except InUseError:
                    time.sleep(0)

        assert together(*[take] * 4) == [None] * 4
        assert_same(sorted(made, key=lambda chunk: chunk.index), expected)


def test_a_timer_does_not_disturb_a_later_video(bundles: Bundles) -> None:
    with Session.open(bundles("forcing-kv"), threads=1) as session:
        expected = video_of(session, 3)
        timer = session.pass_timer(2)
        assert timer.denoise() > 0
        video = session.generate(PROMPT, seed=7, chunks=3)
        made = [next(video)]
        for use in (timer.denoise, timer.fill, timer.decode):
            with pytest.raises(RuntimeError, match="began another"):
                use()
        assert_same([*made, *video], expected)


FORKED = """
import hashlib, os, sys
from forcingkv.runtime import Session

def digest(session):
    made = hashlib.sha256()
    for chunk in session.generate("a b c", seed=7, chunks=4):
        made.update(chunk.frames.tobytes() + chunk.latents.tobytes())
    return made.hexdigest()

for threads in (1, 2):
    session = Session.open(sys.argv[1], threads=threads)
    before = digest(session)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, digest(session).encode())
        session.close()
        os._exit(0)  # as multiprocessing does; the usual exit waits in ONNX Runtime for ever
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == before
    assert os.waitpid(child, 0)[1] == 0
    assert digest(session) == before
    session.close()
print("the same")
"""


def test_a_session_goes_on_in_a_forked_process(bundles: Bundles) -> None:
    assert python(FORKED, bundles("forcing-kv")).strip() == "the same"


def test_frames_are_the_callers_own(bundles: Bundles) -> None:
    """A chunk that one thread shows is not written to by the next, which another makes."""
    with Session.open(bundles("forcing-kv"), threads=1) as session:
        video = session.generate(PROMPT, seed=7)
        first = next(video)
        kept = first.frames.copy(), first.latents.copy()
        with ThreadPoolExecutor(1) as pool:
            for _ in range(4):
                pool.submit(next, video).result()
        np.testing.assert_array_equal(first.frames, kept[0])
        np.testing.assert_array_equal(first.latents, kept[1])
