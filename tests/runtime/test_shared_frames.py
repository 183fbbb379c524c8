"""Frames that stay on the device: how long they are there, and when they are written to again. Times."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Session, Timing
from tests.runtime.engine_world import World
from tests.runtime.fake_cuda import FREED
from tests.runtime.videos import PROMPT, video_of

Bundles = Callable[[str], Path]


@pytest.fixture
def world(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(bundles("forcing-kv"), monkeypatch)


@pytest.fixture
def session(world: World) -> Iterator[Session]:
    with Session.open(world.bundle, backend="tensorrt-rtx", preflight=False, frames="device") as session:
        yield session


class Consumer:
    """A program with a stream of its own, which reads frames when its GPU comes to it."""

    def __init__(self, world: World) -> None:
        self._cuda = world.cuda
        device = world.cuda.Device(0)
        device.set_current()
        self.stream, self.seen = device.create_stream(), list[Any]()

    def read(self, frames: Any) -> None:
        """Put reading these frames into the stream; they are `seen` when the stream is waited for."""
        nbytes = int(np.prod(frames.shape))
        self.stream.put(lambda: self.seen.append(self._cuda.bytes_at(frames.ptr, nbytes).copy()))


def on_host(world: World) -> list[Any]:
    """The frames of the video that the tests make."""
    with Session.open(world.bundle, backend="tensorrt-rtx", preflight=False) as session:
        return [chunk.frames.ravel() for chunk in video_of(session, 6)]


WAYS: dict[str, Callable[[Any], Any]] = {
    "cuda-core's stream": lambda stream: stream,
    "the protocol": lambda stream: SimpleNamespace(__cuda_stream__=lambda: (0, stream.handle)),
    "torch's stream": lambda stream: SimpleNamespace(cuda_stream=stream.handle),
    "a handle": lambda stream: stream.handle,
    "cuda-core's event": lambda stream: stream.record(),
}


@pytest.mark.parametrize("way", WAYS)
def test_frames_are_written_to_again_when_they_were_read(world: World, session: Session, way: str) -> None:
    expected, consumer = on_host(world), Consumer(world)
    for chunk in session.generate(PROMPT, seed=7, chunks=6):
        consumer.read(chunk.frames)
        chunk.release(WAYS[way](consumer.stream))
    consumer.stream.drain()
    for found, wanted in zip(consumer.seen, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_without_release_a_late_reader_sees_a_later_chunk(world: World, session: Session) -> None:
    """What `release` is for: the fakes show it (GPU.md, B3)."""
    expected, consumer = on_host(world), Consumer(world)
    for chunk in session.generate(PROMPT, seed=7, chunks=6):
        consumer.read(chunk.frames)
    consumer.stream.drain()
    assert (consumer.seen[0] == expected[4]).all()
    assert (consumer.seen[0] != expected[0]).any()


def test_an_event_of_torch_is_waited_for_by_its_handle(world: World, session: Session) -> None:
    expected, consumer = on_host(world), Consumer(world)
    events = []
    for chunk in session.generate(PROMPT, seed=7, chunks=6):
        consumer.read(chunk.frames)
        events.append(consumer.stream.record())  # torch's own, which it keeps
        chunk.release(SimpleNamespace(cuda_event=events[-1].handle))
    consumer.stream.drain()
    for found, wanted in zip(consumer.seen, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("now", "after is str; expected a CUDA stream or event"),
        (True, "after is bool"),
        (SimpleNamespace(cuda_event=0), "an event that was not recorded"),
        (np.zeros(1), "after is ndarray"),
    ],
    ids=str,
)
def test_what_cannot_be_waited_for_is_refused(session: Session, after: object, words: str) -> None:
    chunk = next(session.generate(PROMPT, seed=7, chunks=2))
    with pytest.raises(InputError, match=words):
        chunk.release(after)
    chunk.release()


def test_a_release_that_comes_too_late_is_told(world: World, session: Session) -> None:
    consumer, video = Consumer(world), session.generate(PROMPT, seed=7, chunks=4)
    first, second = next(video), next(video)
    first.release(consumer.stream)
    first.release()
    next(video)  # lies where the first did
    for after in (consumer.stream, None):
        with pytest.raises(RuntimeError, match="the memory of these frames was given to a later chunk"):
            first.release(after)
    second.release(consumer.stream)
    again = session.generate(PROMPT, seed=7, chunks=1)
    second.release(consumer.stream)
    next(again)
    second.release(consumer.stream)  # another place


def test_shared_frames_outlive_the_session(world: World, session: Session) -> None:
    expected = on_host(world)
    chunks = video_of(session, 2)
    tensors = [chunk.frames for chunk in chunks]  # what a tensor of another library holds on to
    session.close()
    gc.collect()
    for tensor, wanted in zip(tensors, expected[: len(chunks)], strict=True):
        found = world.cuda.bytes_at(tensor.ptr, wanted.size)
        np.testing.assert_array_equal(found, wanted)
    assert world.cuda.left["device"] == 2
    assert world.left == {"device": 2, "view": 2}, "nothing but those frames"
    chunks[0].release(7)  # nobody writes there any more
    memory = world.cuda.memory[tensors[0].exporting_obj.owner.handle]
    del tensor, tensors, chunks
    gc.collect()
    assert world.left == {}
    assert (memory == FREED).all()


def test_frames_on_the_host_are_the_callers_own(world: World) -> None:
    with Session.open(world.bundle, backend="tensorrt-rtx", preflight=False) as session:
        chunks = video_of(session, 4)
        for chunk in chunks:
            chunk.release(object())


def test_on_a_cpu_nothing_can_be_waited_for(bundles: Bundles) -> None:
    with Session.open(bundles("forcing-kv"), backend="onnxruntime-cpu", frames="device") as session:
        video = session.generate(PROMPT, seed=7, chunks=2)
        chunk = next(video)
        with pytest.raises(InputError, match=r"after is int, and frames of this session lie where no stream"):
            chunk.release(7)
        chunk.release()
        next(video)
        with pytest.raises(RuntimeError, match="given to a later chunk"):
            chunk.release()


def test_a_chunk_is_handed_out_before_its_clean_pass_is_done(world: World) -> None:
    """It runs beside the decoder, and may take longer (GPU.md, C3)."""
    with Session.open(world.bundle, backend="tensorrt-rtx", preflight=False) as session:
        lane = session._memory().lane
        video = session.generate(PROMPT, seed=7, chunks=4)
        first = next(video)
        assert lane.main.stream.busy, "what comes behind the denoising passes was waited for"  # type: ignore[attr-defined]
        second = next(video)
        assert "clean" in vars(first.timing), "its time is taken when it costs nothing"
        assert first.timing.clean > 0
        assert "clean" not in vars(second.timing)
        assert second.timing.clean > 0, "asked for before, it is waited for"
        third = next(video)
    assert third.timing.clean > 0, "and taken at the latest when the session closes"
    assert world.left == {}


def test_times_are_a_record_like_any_other() -> None:
    asked = []
    timing = Timing.of(denoise=1.0, clean=lambda: asked.append(1) or 2.0, decode=3.0, total=4.0)
    assert asked == []
    assert timing == Timing(1.0, 2.0, 3.0, 4.0)
    assert repr(timing) == "Timing(denoise=1.0, clean=2.0, decode=3.0, total=4.0)"
    assert asked == [1]
    with pytest.raises(AttributeError, match="cleaned"):
        timing.cleaned  # type: ignore[attr-defined]  # noqa: B018


def test_what_clears_the_decoders_memory_is_in_its_own_queue(world: World) -> None:
    """Restarting, timing single passes and restoring: nothing of a decoder is touched beside its passes."""
    with Session.open(world.bundle, backend="tensorrt-rtx", preflight=False) as session:
        maker = session._memory()
        assert {maker.queue_of(f"decoder/{name}") for name in maker.decoder.held()} <= {maker.lane.side}
        assert maker.queue_of("decoder/any") is maker.lane.side
        assert maker.queue_of("cache/any") is maker.queue_of("cross/any") is maker.lane.main
