"""A service in a thread of the test, and clients of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.sync.client import ClientConnection, connect

from forcingkv.serve.bundles import BundleChoice
from forcingkv.serve.listening import listening
from forcingkv.serve.run import Server, make_server, open_service
from forcingkv.serve.service import Service
from forcingkv.serve.settings import Limits, Settings

LIMITS = Limits(last_words=0.5, messages_a_second=500.0)
"""Those of users, but for waits: these tests have many clients that say no goodbye."""
PROMPT, OTHER = "a b c", "d e"
TOKEN = "0123456789abcdef"


@dataclass
class Served:
    """A service that runs."""

    port: int
    service: Service
    token: str | None = None
    server: Server | None = None

    def cut(self) -> None:
        """Cut all connections that are there, as a network that fails does."""
        assert self.server
        for connection in list(self.server.server_state.connections):
            transport = connection.transport
            if isinstance(connection, WebSocketsSansIOProtocol):
                connection.loop.call_soon_threadsafe(transport.abort)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self, **headers: str | bytes) -> httpx.Client:
        if self.token and "Authorization" not in headers:
            headers["Authorization"] = f"Bearer {self.token}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def socket(self, **options: Any) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}/v1/live", max_size=2**27, **options)

    @contextmanager
    def live(self, **options: Any) -> Iterator[Talk]:
        """A socket that has said hello."""
        with self.socket(**options) as socket:
            talk = Talk(socket)
            talk.say("hello", protocol=1, token=self.token)
            talk.welcome = talk.hear("welcome")
            yield talk


@dataclass
class Talk:
    """What a client says and hears on a socket."""

    socket: ClientConnection
    welcome: dict[str, Any] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    """Of the last event."""

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind} | fields))

    def next(self, seconds: float = 60) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.socket.recv(timeout=seconds))
        self.parts = [bytes(self.socket.recv(timeout=seconds)) for _ in range(event.get("parts", 0))]
        return event

    def hear(self, *kinds: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """The next event, which has to be of these kinds; others that are to be skipped go by."""
        while True:
            event = self.next()
            if event["type"] in kinds:
                return event
            assert event["type"] in skip, event

    def start(self, **fields: Any) -> dict[str, Any]:
        self.say("start", **({"prompt": PROMPT, "seed": 7, "frames": "rgb24"} | fields))
        return self.hear("started", skip=("queued",))

    def chunks(self, until: int | None = None) -> list[bytes]:
        """Frames of chunks, each acknowledged, until the end or up to a chunk."""
        found = []
        while True:
            event = self.hear("chunk", "ended", skip=("switched", "playing", "paused"))
            if event["type"] == "ended":
                self.ended = event
                return found
            found.append(b"".join(self.parts))
            self.say("ack", chunk=event["chunk"])
            if event["chunk"] == until:
                return found

    ended: dict[str, Any] = field(default_factory=dict)


@contextmanager
def serving(
    folder: Path,
    bundles: Mapping[str, Path],
    *,
    token: str | None = None,
    limits: Limits = LIMITS,
    sessions: int = 16,
    **settings: Any,
) -> Iterator[Served]:
    """A service of these bundles; everything has ended when the block is left."""
    made = Settings(data=folder, token=token, limits=limits, sessions=sessions, **settings)
    service = open_service(made, [BundleChoice(name, path, example=PROMPT) for name, path in bundles.items()])
    opened = listening("127.0.0.1", 0, 60)
    ready = threading.Event()
    server = make_server(service, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        assert ready.wait(60)
        yield Served(opened.getsockname()[1], service, token, server)
    finally:
        server.stop()
        thread.join(120)
        assert not thread.is_alive()
