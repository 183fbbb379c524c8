"""Sessions of other replicas: a client that comes back to one is led to it.

Several processes may be one service (`serve/ray.py`), and a client that lost its connection may reach any of
them, while its session lives in one. So each replica listens at an address of its own, which it says in a
file of the folder that all share. It answers those alone who have the secret of the service.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from forcingkv.headmaps.writing import write_text
from forcingkv.serve.listening import listening
from forcingkv.serve.messages import VERSION, Hello, Resume
from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.settings import Settings

POLICY = 1008
GONE = "The replica that had the session is gone: start anew."
PATIENCE = 5.0
"""Seconds for another replica to answer."""


class Relay:
    """What one replica tells the others, and how it reaches them."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._folder = settings, settings.data / "replicas"

    def address_of(self, session: str) -> str | None:
        """Where the replica of a session listens; None: it is this one, or none that there is."""
        replica, _, _ = session.rpartition(".")
        if not replica or replica == self._settings.replica or not self._folder.is_dir():
            return None
        # Of the names that are there: what a client says is no part of a path.
        found = next((path for path in self._folder.iterdir() if path.name == replica), None)
        return found.read_text(encoding="utf-8") if found else None

    @asynccontextmanager
    async def open(self, live: Callable[[WebSocket], Awaitable[None]]) -> AsyncIterator[None]:
        """Listen to the other replicas while the block runs. `live` answers a socket as a client's."""

        async def endpoint(websocket: WebSocket) -> None:
            said = websocket.headers.get("authorization", "")
            if not hmac.compare_digest(said.encode(), self._authorization.encode()):
                await websocket.close(POLICY)
                return
            await live(websocket)

        settings = self._settings
        app = Starlette(routes=[WebSocketRoute("/", endpoint)])
        config = uvicorn.Config(
            app,
            log_config=None,
            lifespan="off",
            ws_max_size=settings.limits.body,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=5,
        )
        server = _Server(config)
        with listening(settings.host, 0, settings.limits.reader * 2) as opened:
            host, port = opened.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            said = self._folder / settings.replica
            serving = asyncio.create_task(server.serve(sockets=[opened]))
            write_text(said, f"ws://{shown}:{port}/")
            try:
                yield
            finally:
                said.unlink(missing_ok=True)
                server.should_exit = True
                await serving

    @property
    def _authorization(self) -> str:
        return f"Bearer {self._settings.secret}"

    async def lead(
        self,
        address: str,
        websocket: WebSocket,
        hear: Callable[[], Awaitable[str | bytes]],
        said: Resume,
    ) -> None:
        """Pass on all that a client and another replica say to each other, until one of them goes.

        Args:
            address: of the replica.
            websocket: of the client, for what the replica says.
            hear: the next message of the client.
            said: with what it comes back to its session.

        Raises RefusalError (gone) where the replica does not answer, WebSocketDisconnect where the client
        went.
        """
        try:
            other = await connect(
                address,
                additional_headers={"Authorization": self._authorization},
                max_size=None,
                open_timeout=PATIENCE,
                proxy=None,
            )
        except (OSError, TimeoutError, WebSocketException) as error:
            raise RefusalError("gone", GONE) from error
        async with other:
            hello = Hello(type="hello", protocol=VERSION, token=self._settings.token)
            try:
                async with asyncio.timeout(PATIENCE):
                    await other.send(hello.model_dump_json())
                    await other.recv()  # welcome: the client has had one
                    await other.send(said.model_dump_json())
            except (TimeoutError, ConnectionClosed) as error:
                raise RefusalError("gone", GONE) from error
            both = [
                asyncio.create_task(_to_replica(hear, other)),
                asyncio.create_task(_to_client(other, websocket)),
            ]
            try:
                done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task
            for task in done:
                task.result()


async def _to_replica(hear: Callable[[], Awaitable[str | bytes]], other: ClientConnection) -> None:
    with suppress(ConnectionClosed):
        while True:
            await other.send(await hear())


async def _to_client(other: ClientConnection, websocket: WebSocket) -> None:
    with suppress(ConnectionClosed, WebSocketDisconnect, RuntimeError):
        async for message in other:
            if isinstance(message, str):
                await websocket.send_text(message)
            else:
                await websocket.send_bytes(message)
    with suppress(RuntimeError):
        await websocket.close(1013)


class _Server(uvicorn.Server):
    """Signals are those of the replica's process, not of this server."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
