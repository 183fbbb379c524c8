"""asyncio: a task that is cancelled leaves its thread at work; what a session says to that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.runtime import Chunk, InUseError, Session
from tests.runtime.videos import PROMPT, assert_same, open_with, video_of
from tests.threads.gates import GatedLane

Bundles = Callable[[str], Path]


def test_a_cancelled_task_whose_thread_still_works_spoils_nothing(bundles: Bundles) -> None:
    session, lane = open_with(bundles("forcing-kv"), GatedLane)

    async def serve() -> None:
        video = session.generate(PROMPT, seed=7)
        next(video)
        lane.gate._open.clear()
        task = asyncio.create_task(asyncio.to_thread(next, video))
        await asyncio.to_thread(lane.gate._reached.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        try:
            for use in (lambda: video_of(session, 3), lambda: next(video), lambda: session.pass_timer(0)):
                with pytest.raises(InUseError, match="in use by another thread"):
                    use()
        finally:
            lane.gate._open.set()

    with session:
        expected = video_of(session, 3)
        asyncio.run(serve())  # which waits for the threads of `to_thread`
        assert_same(video_of(session, 3), expected)


def test_a_video_after_a_cancellation_is_right_or_refused(bundles: Bundles) -> None:
    """At whatever moment it comes."""

    async def serve(session: Session, pauses: int) -> list[Chunk] | None:
        task = asyncio.create_task(asyncio.to_thread(next, session.generate(PROMPT, seed=1)))
        for _ in range(pauses):
            await asyncio.sleep(0)
        task.cancel()
        try:
            return video_of(session, 3)
        except InUseError:
            return None

    with Session.open(bundles("forcing-kv"), threads=1) as session:
        expected = video_of(session, 3)
        for trial in range(12):
            made = asyncio.run(serve(session, trial % 6))
            if made is not None:
                assert_same(made, expected)
        assert_same(video_of(session, 3), expected)
