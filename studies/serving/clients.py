"""Clients of a service: one that watches, one that vanishes, one that reads nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

PROMPT, OTHER = "a 3 moving left and a 7 moving up", "a 1 moving right and a 5 moving down"


@dataclass
class Seen:
    """What a client saw."""

    first: float = 0.0
    """Seconds from `start` to the first chunk, whole."""
    frames: list[tuple[float, int]] = field(default_factory=list)
    """When a chunk arrived, and how many frames it has."""

    def rate(self, begin: float, end: float) -> float:
        """Frames a second between two moments."""
        return sum(count for at, count in self.frames if begin < at <= end) / (end - begin)


@asynccontextmanager
async def joined(port: int) -> AsyncIterator[ClientConnection]:
    """A socket that has said hello."""
    async with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=None, compression=None) as socket:
        await say(socket, "hello", protocol=1)
        await hear(socket, "welcome")
        yield socket


async def say(socket: ClientConnection, kind: str, **fields: Any) -> None:
    """Say something."""
    await socket.send(json.dumps({"type": kind} | fields))


async def hear(socket: ClientConnection, *kinds: str) -> dict[str, Any]:
    """The next event of those kinds, with its parts read; others go by."""
    while True:
        event: dict[str, Any] = json.loads(await socket.recv())
        for _ in range(event.get("parts", 0)):
            await socket.recv()
        if event["type"] in kinds:
            return event


async def watch(port: int, seconds: float, seed: int, frames: str) -> Seen:
    """Watch a video for so long."""
    seen = Seen()
    async with joined(port) as socket:
        began = time.monotonic()
        await say(socket, "start", prompt=PROMPT, seed=seed, frames=frames)
        while (now := time.monotonic()) - began < seconds:
            event = await hear(socket, "chunk")
            now = time.monotonic()
            seen.first = seen.first or now - began
            seen.frames.append((now, event["frames"]))
            await say(socket, "ack", chunk=event["chunk"])
        await say(socket, "stop")
        await hear(socket, "ended")
    return seen


async def vanish(port: int, seed: int) -> None:
    """Watch two chunks, switch the prompt, and be gone without a word."""
    async with joined(port) as socket:
        await say(socket, "start", prompt=PROMPT, seed=seed)
        await hear(socket, "chunk")
        await say(socket, "switch", prompt=OTHER)
        await hear(socket, "switched")
        socket.transport.abort()


async def read_nothing(port: int, until: asyncio.Event) -> None:
    """Begin a video, and take nothing of it."""
    async with joined(port) as socket:
        await say(socket, "start", prompt=PROMPT, seed=1, frames="rgb24")
        socket.transport.pause_reading()
        await until.wait()
        socket.transport.abort()
