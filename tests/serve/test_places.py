"""Places for sessions, and who leaves one while it is taken."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from forcingkv.serve.places import Places
from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.seat import Seat


def nothing(place: int, wait: float | None) -> None:
    """Nobody is told."""


def test_the_first_session_of_a_bundle_is_there_whoever_uses_it() -> None:
    """It is open all the time: memory for others is what it leaves."""

    async def come() -> None:
        places = Places(16, 100, 0, {"small": 10, "large": 40})
        assert places.used == 50
        assert (places.fit("small"), places.fit("large")) == (6, 2)
        held = [await places.take("small", 10, nothing) for _ in range(6)]
        assert places.used == 100
        with pytest.raises(RefusalError, match="All places are taken"):
            await places.take("small", 10, nothing)
        held.append(await places.take("large", 40, nothing))  # the one that is there
        assert places.used == 100
        for place in held:
            places.give_back(place)
        assert places.used == 50

    asyncio.run(come())


def test_large_frames_count() -> None:
    async def come() -> None:
        places = Places(16, 100, 0, {"small": 10})
        with pytest.raises(RefusalError, match="does not fit"):
            await places.take("small", 101, nothing)
        await places.take("small", 95, nothing)
        with pytest.raises(RefusalError, match="All places are taken"):
            await places.take("small", 10, nothing)

    asyncio.run(come())


def test_nobody_is_let_in_beyond_the_queue_but_who_was_promised() -> None:
    async def come() -> None:
        places = Places(1, 10, 0, {"one": 1})
        await places.take("one", 1, nothing)
        with pytest.raises(RefusalError, match="All places are taken"):
            await places.take("one", 1, nothing)
        promised = asyncio.create_task(places.take("one", 1, nothing, let_in=True))
        await asyncio.sleep(0)
        assert places.waiting == 1
        promised.cancel()

    asyncio.run(come())


def test_who_leaves_while_a_session_is_opened_leaves_nothing() -> None:
    """A thread is at it then: what it opens is given back."""
    opened, given_back = [], []

    def take() -> object:
        time.sleep(0.2)
        opened.append("a session")
        return opened[-1]

    async def leave() -> None:
        places = Places(1, 10, 1, {"one": 1})
        engine = SimpleNamespace(places=places, aside=asyncio.to_thread, size_of=lambda bundle, enlarge: 1)
        bundle = SimpleNamespace(name="one", take=take, give_back=given_back.append)
        seat = Seat(engine, bundle)  # type: ignore[arg-type]
        taking = asyncio.create_task(seat.take())
        await asyncio.sleep(0.05)
        assert places.held == 1
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert (opened, given_back, places.held) == (["a session"], ["a session"], 0)

    asyncio.run(leave())
