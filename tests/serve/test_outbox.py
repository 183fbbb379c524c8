"""What is on its way to a client, and comes again after a loss."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from forcingkv.serve.messages import (
    ChunkEvent,
    EndedEvent,
    Event,
    Paused,
    Playing,
    Queued,
    Saved,
    Seconds,
    Started,
)
from forcingkv.serve.outbox import MOST_ANSWERS, Outbox

STARTED = Started(
    session="s", key="k", bundle="b", prompt="a", seed=0, chunks=None, next_chunk=0, frames="rgb24", width=4,
    height=4, fps=8.0,
)  # fmt: skip


def chunk(number: int) -> ChunkEvent:
    took = Seconds(denoise=0.0, clean=0.0, decode=0.0, total=0.0)
    return ChunkEvent(
        chunk=number, first_frame=3 * number, frames=3, seconds=took, every=0.0, kv_bytes={}, prompt="a",
        given=False, parts=1, bytes=1,
    )  # fmt: skip


def queued(place: int) -> Queued:
    return Queued(session="s", key="k", place=place, wait_seconds=None)


def with_box(ahead: int, what: Callable[[Outbox], Awaitable[None]]) -> None:
    async def run() -> None:
        await what(Outbox(ahead, asyncio.Event()))

    asyncio.run(run())


async def told(box: Outbox, reader: int) -> list[Any]:
    """All that a client hears now: numbers of chunks, and kinds of other events."""
    found: list[Any] = []
    while True:
        try:
            one = await asyncio.wait_for(box.get(reader), 0.01)
        except TimeoutError:
            return found
        assert one is not None
        box.said(one)
        found.append(one.event.chunk if isinstance(one.event, ChunkEvent) else one.event.type)


def put(box: Outbox, *events: Event) -> None:
    for event in events:
        box.put(event, (b"x",) if isinstance(event, ChunkEvent) else ())


def test_no_more_chunks_are_made_than_may_be_on_their_way() -> None:
    async def run(box: Outbox) -> None:
        reader = box.attach()
        put(box, STARTED, chunk(0))
        assert box.has_room
        box.promise()  # the second is being made
        assert not box.has_room
        put(box, chunk(1))
        assert not box.has_room
        assert await told(box, reader) == ["started", 0, 1]
        box.acknowledge(0)
        assert box.has_room
        box.acknowledge(7)  # never sent
        assert (box.size, box.has_room) == (0, True)

    with_box(2, run)


def test_what_a_lost_client_may_have_missed_comes_again() -> None:
    """Answers too: a state that was saved has a name that nobody else knows."""

    async def run(box: Outbox) -> None:
        reader = box.attach()
        put(box, STARTED, chunk(0), Saved(state="a", chunk=1), chunk(1), Paused(), chunk(2), Playing())
        assert await told(box, reader) == ["started", 0, "saved", 1, "paused", 2, "playing"]
        box.acknowledge(0)
        reader = box.attach(after=0)
        assert await told(box, reader) == ["started", "saved", 1, "paused", 2, "playing"]
        reader = box.attach(after=1)  # it had more than it acknowledged
        assert await told(box, reader) == ["started", "paused", 2, "playing"]
        box.acknowledge(2)
        reader = box.attach(after=2)
        assert await told(box, reader) == ["started", "playing"]

    with_box(9, run)


def test_who_waits_and_comes_back_hears_its_place() -> None:
    async def run(box: Outbox) -> None:
        reader = box.attach()
        put(box, queued(3), queued(2))
        assert await told(box, reader) == ["queued"]
        reader = box.attach(after=-1)
        assert await told(box, reader) == ["queued"]
        put(box, STARTED)
        reader = box.attach(after=-1)
        assert await told(box, reader) == ["started"]

    with_box(4, run)


def test_it_is_said_which_chunk_comes_next() -> None:
    async def run(box: Outbox) -> None:
        reader = box.attach()
        put(box, STARTED, chunk(0), chunk(1))
        await told(box, reader)
        box.acknowledge(1)
        for after in (-1, 1, 2**53):
            reader = box.attach(after=after)
            one = await box.get(reader)
            assert one is not None
            assert isinstance(one.event, Started)
            assert one.event.next_chunk == 2

    with_box(4, run)


def test_the_end_comes_again_and_is_heard_once_all_chunks_are_there() -> None:
    async def run(box: Outbox) -> None:
        reader = box.attach()
        put(box, STARTED, chunk(0), EndedEvent(reason="stopped", chunks=1, message="."))
        assert await told(box, reader) == ["started", 0, "ended"]
        assert not box.heard_the_end
        box.detach(reader)
        reader = box.attach(after=0)
        assert await told(box, reader) == ["started", "ended"]
        assert box.heard_the_end

    with_box(4, run)


def test_answers_that_nobody_acknowledges_stay_few() -> None:
    async def run(box: Outbox) -> None:
        reader = box.attach()
        put(box, STARTED, chunk(0), *[Paused()] * 1000)
        assert len(await told(box, reader)) == 1002
        again = await told(box, box.attach(after=-1))
        assert again == ["started", 0, *["paused"] * MOST_ANSWERS]

    with_box(4, run)


def test_how_long_a_client_takes_nothing_is_counted_while_it_is_there() -> None:
    async def run(box: Outbox) -> None:
        reader = box.attach()
        put(box, chunk(0))
        first = box.full
        assert first is not None
        time.sleep(0.02)
        box.detach(reader)
        box.attach(after=-1)
        assert box.full is not None
        assert box.full > first

    with_box(1, run)
