"""Streams of `fake_cuda`: work waits in them until somebody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.runtime.fake_cuda import FakeCuda

__all__ = ["EventOptions", "FakeCudaError", "FakeEvent", "FakeStream", "Misuse", "Owned"]


class FakeCudaError(Exception):
    """What cuda-core raises for a status of the driver."""


class Misuse(BaseException):
    """A mistake that no test may pass over."""


@dataclass
class EventOptions:
    """As in cuda.core."""

    timing_enabled: bool = False
    blocking_sync: bool = False
    ipc_enabled: bool = False


@dataclass
class StreamOptions:
    """As in cuda.core."""

    nonblocking: bool = True
    priority: int | None = None


class Owned:
    """Something that is given back once: when it is closed, or else when Python drops it."""

    def __init__(self, cuda: FakeCuda, kind: str) -> None:
        self.cuda, self.kind, self.closed = cuda, kind, False
        self.device = cuda.here
        cuda.live[kind] += 1

    def close(self) -> None:
        if not self.closed:
            self.cuda.called(f"{type(self).__name__.removeprefix('Fake')}.close", self.device)
        self._end()

    def _end(self) -> None:
        if not self.closed:
            self.closed = True
            self.cuda.live[self.kind] -= 1
            self._free()

    def _free(self) -> None:
        """What else giving it back does."""

    def __del__(self) -> None:
        if hasattr(self, "closed") and not self.closed:
            self.cuda.dropped[self.kind] += 1
            self._end()


class FakeStream(Owned):
    """A stream. Work waits in it until somebody waits for it."""

    def __init__(self, cuda: FakeCuda, options: StreamOptions | None = None) -> None:
        super().__init__(cuda, "stream")
        self.priority = options.priority if options else None
        self.handle = 0x1000 + len(cuda.calls)
        cuda.streams[self.handle] = self
        self._work: deque[Callable[[], object]] = deque()
        self.capturing: list[Callable[[], object]] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is work to do."""
        return bool(self._work)

    def put(self, work: Callable[[], object]) -> None:
        """Take work, to be done when it is waited for."""
        if self.closed:
            raise Misuse("work is put into a stream that was closed")
        if self.capturing is not None:
            self.capturing.append(work)
            return
        self._work.append(work)
        if not self.cuda.late:
            self.drain()

    def drain(self, until: Callable[[], bool] = lambda: False) -> None:
        """Do the work, in order, up to some point."""
        while self._work and not until():
            self._work.popleft()()
            self.cuda.clock += 1

    def idle(self, what: str) -> None:
        """Refuse what a capturing stream refuses."""
        if self.capturing is not None:
            raise FakeCudaError(f"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: {what}")

    def record(self, event: FakeEvent | None = None, options: EventOptions | None = None) -> FakeEvent:
        self.cuda.called("Stream.record", self.device)
        self.idle("record")
        event = event or FakeEvent(self.cuda, options or EventOptions())
        event.place(self)
        return event

    def wait(self, event: FakeEvent) -> None:
        self.cuda.called("Stream.wait", self.device)
        stream, number = event.stream, event.number
        self.put(lambda: stream.drain(lambda: event.reached >= number) if stream else None)

    def sync(self) -> None:
        self.cuda.called("Stream.sync", self.device)
        self.idle("sync")
        self.drain()

    def close(self) -> None:
        """Memory is given back before streams are: work that is left would use what is gone."""
        if self.busy and self.cuda.fail_at is None and self.cuda.lost is None:
            raise Misuse("a stream is closed while there is work to do")
        super().close()

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def create_graph_builder(self) -> FakeBuilder:
        self.cuda.called("Stream.create_graph_builder", self.device)
        return FakeBuilder(self)


class FakeEvent(Owned):
    """An event. `reached` counts up to `number` as its places in streams are come to."""

    def __init__(self, cuda: FakeCuda, options: EventOptions) -> None:
        super().__init__(cuda, "event")
        self.options, self.number, self.reached, self.time = options, 0, 0, 0
        self.stream: FakeStream | None = None
        self.handle = id(self)
        cuda.events.add(self)

    def place(self, stream: FakeStream) -> None:
        self.stream, self.number = stream, self.number + 1
        stream.put(lambda number=self.number: self._reach(number))

    def _reach(self, number: int) -> None:
        self.reached, self.time = number, self.cuda.clock

    @property
    def is_done(self) -> bool:
        self.cuda.called("Event.is_done")
        return self.reached == self.number

    def sync(self) -> None:
        self.cuda.called("Event.sync")
        if self.stream:
            self.stream.drain(lambda: self.reached == self.number)

    def __sub__(self, other: FakeEvent) -> float:
        self.cuda.called("Event.__sub__")
        for event in (self, other):
            if not event.options.timing_enabled or event.reached != event.number:
                raise RuntimeError("One or both events have not completed, or take no time")
        return float(self.time - other.time)


class FakeBuilder(Owned):
    """Captures what is put into a stream."""

    def __init__(self, stream: FakeStream) -> None:
        super().__init__(stream.cuda, "builder")
        self.stream = stream
        self._captured: list[Callable[[], object]] = []

    def begin_building(self, mode: str = "relaxed") -> FakeBuilder:
        self.cuda.called("GraphBuilder.begin_building")
        self.stream.idle("begin_building")
        self.stream.capturing = self._captured
        return self

    def end_building(self) -> FakeBuilder:
        self.cuda.called("GraphBuilder.end_building")
        self.stream.capturing = None
        return self

    def complete(self) -> FakeGraph:
        self.cuda.called("GraphBuilder.complete")
        return FakeGraph(self.cuda, self._captured)

    def _free(self) -> None:
        self.stream.capturing, self._captured = None, []


class FakeGraph(Owned):
    """Work to be launched as a whole."""

    def __init__(self, cuda: FakeCuda, work: list[Callable[[], object]]) -> None:
        super().__init__(cuda, "graph")
        self._work = work

    def launch(self, stream: FakeStream) -> None:
        self.cuda.called("Graph.launch", self.device)
        self.cuda.trace.append(("launch", stream.handle))
        for work in self._work:
            stream.put(work)

    def _free(self) -> None:
        self._work = []
