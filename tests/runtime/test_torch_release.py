"""Waiting for who reads frames, with torch's streams: stood in, since a CPU has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends.torch_device import CpuQueue, StreamMark, StreamQueue


class Event:
    """An event of a stream, or one of the caller's."""

    def __init__(self, of: object) -> None:
        self.of = of


class Stream:
    """Records where it stands, and what it waits for."""

    device = "cuda:0"

    def __init__(self, handle: int) -> None:
        self.handle, self.waits = handle, list[Any]()

    def record_event(self) -> Event:
        return Event(self.handle)

    def wait_event(self, event: Event) -> None:
        self.waits.append(event.of)


@pytest.fixture
def queue() -> StreamQueue:
    made = StreamQueue.__new__(StreamQueue)
    made.stream = Stream(1)
    made._module = SimpleNamespace(
        Event=Event, ExternalStream=Stream, default_stream=lambda device: Stream(0)
    )
    return made


def test_a_queue_waits_for_streams_and_events_when_it_is_told_to(queue: StreamQueue) -> None:
    ways = {
        7: Stream(7),
        8: 8,
        9: SimpleNamespace(__cuda_stream__=lambda: (0, 9)),
        0: 0,  # the default one
        10: Event(10),
        11: StreamMark(Event(11)),
    }
    gates = [queue.gate(way) for way in ways.values()]
    assert queue.stream.waits == []
    for hold in gates:
        hold()
    assert queue.stream.waits == list(ways)


@pytest.mark.parametrize("after", ["now", None, True, SimpleNamespace(cuda_event=0)], ids=str)
def test_what_cannot_be_waited_for_is_refused(queue: StreamQueue, after: object) -> None:
    with pytest.raises(InputError, match=r"after is (str|NoneType|bool|an event that was not recorded)"):
        queue.gate(after)
    with pytest.raises(InputError, match="lie where no stream can be waited for"):
        CpuQueue().gate(after)
