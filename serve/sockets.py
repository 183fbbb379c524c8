"""The socket of a client: what it says goes to its session, and what the session has comes back."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

import forcingkv
from forcingkv.headmaps.errors import InputError
from forcingkv.serve.access import Pace, check_client, client_of
from forcingkv.serve.begin import check_start
from forcingkv.serve.live import LiveSession
from forcingkv.serve.messages import (
    VERSION,
    Ack,
    EndedEvent,
    ErrorEvent,
    Hello,
    Resume,
    Start,
    Welcome,
    read_message,
)
from forcingkv.serve.outbox import Outgoing
from forcingkv.serve.refusals import RefusalError, refusal_of
from forcingkv.serve.service import Service

log = logging.getLogger("forcingkv.serve")

POLICY, TRY_LATER = 1008, 1013
"""Codes with which a socket is closed (RFC 6455): against the rules; nobody took what was sent."""


async def converse(websocket: WebSocket, service: Service, *, checked: bool = False) -> None:
    """A socket, from its opening to its end; `checked`: who opened it is known."""
    try:
        if not checked:
            check_client(service.settings, websocket)
    except RefusalError:
        await websocket.close(POLICY)  # before it is accepted: the answer is 403
        return
    await websocket.accept()
    socket = _Socket(websocket, service)
    try:
        if await socket.greet():
            await socket.listen()
    except (WebSocketDisconnect, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # Starlette's, where the connection is gone meanwhile
            log.debug("socket gone: %s", error)
    finally:
        await socket.leave()


class _Socket:
    """One connection. It has one session at a time."""

    def __init__(self, websocket: WebSocket, service: Service) -> None:
        self._websocket, self._service = websocket, service
        self._limits = service.settings.limits
        self._client = client_of(websocket)
        self._pace = Pace(self._limits.messages_a_second)
        self._turn = asyncio.Lock()  # the parts of an event follow it
        self._live: LiveSession | None = None
        self._last: LiveSession | None = None
        self._reader = 0
        self._sender: asyncio.Task[None] | None = None

    async def greet(self) -> bool:
        """Whether the client said who it is, in time, and may go on."""
        try:
            async with asyncio.timeout(self._limits.hello):
                said = await self._hear()
            if not isinstance(said, Hello):
                raise RefusalError("bad_message", "The first message is hello.")
            if said.protocol != VERSION:
                raise RefusalError("version", f"The protocol is {VERSION}, not {said.protocol}.")
            if not self._service.settings.knows(said.token):
                raise RefusalError("unauthorized", "The token is missing or wrong.")
        except TimeoutError:
            await self._refuse(RefusalError("bad_message", f"No hello came within {self._limits.hello:g} s."))
        except RefusalError as refusal:
            await self._refuse(refusal)
        else:
            engine = self._service.engine
            bundles = [bundle.info for bundle in engine.bundles.values()]
            welcome = Welcome(
                version=forcingkv.__version__,
                bundles=bundles,
                sessions=max(map(engine.places.fit, engine.bundles)),
                ahead=self._limits.ahead,
                lost_seconds=self._limits.lost,
            )
            await self._send(Outgoing(welcome))
            return True
        await self._websocket.close(POLICY)
        return False

    async def listen(self) -> None:
        """Do what the client says, until it goes."""
        while True:
            try:
                await self._do(await self._hear())
            except WebSocketDisconnect:
                return
            except (RefusalError, InputError) as error:
                await self._refuse(refusal_of(error))

    async def leave(self) -> None:
        """The connection is gone: the session waits for another one."""
        if self._sender:
            self._sender.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._sender
        if self._live:
            self._live.outbox.detach(self._reader)

    async def _hear(self) -> Any:
        """The next message. Raises RefusalError for what is none, WebSocketDisconnect at the end."""
        await self._pace.take()
        text = await self._receive()
        if isinstance(text, bytes):
            raise RefusalError("bad_message", "A binary message comes only behind a start with a picture.")
        if len(text) > self._limits.text:
            raise RefusalError("too_large", f"A message has at most {self._limits.text} bytes.")
        return read_message(text)

    async def _receive(self) -> str | bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        return text if text is not None else bytes(message["bytes"])

    async def _do(self, said: Any) -> None:
        if isinstance(said, Hello):
            raise RefusalError("bad_message", "hello was said already.")
        if isinstance(said, Start):
            picture = await self._picture(said)
            if self._live:
                raise RefusalError(
                    "not_now", "This socket has a session: stop it first, or open another socket."
                )
            beginning = await check_start(self._service.engine, said, picture)
            self._follow(self._service.registry.begin(beginning, self._client))
        elif isinstance(said, Resume):
            if self._live:
                raise RefusalError("not_now", "This socket has a session already.")
            relay = self._service.relay
            if relay and (address := relay.address_of(said.session)):
                await relay.lead(address, self._websocket, self._say_again, said)
                raise WebSocketDisconnect(TRY_LATER)
            self._follow(self._service.registry.find(said.session, said.key), said.after)
        elif isinstance(said, Ack):
            if self._last:  # of a session that ended too
                self._last.outbox.acknowledge(said.chunk)
        elif self._live is None:
            raise RefusalError("not_now", f"There is no session that could {said.type}: start one.")
        else:
            self._live.tell(said)

    async def _say_again(self) -> str | bytes:
        """The next message as it came, for the replica that it is meant for."""
        await self._pace.take()
        return await self._receive()

    async def _picture(self, start: Start) -> bytes | None:
        """The picture that a start announces."""
        if start.image is None:
            return None
        if start.image > self._limits.body:
            raise RefusalError("too_large", f"A picture has at most {self._limits.body} bytes.")
        try:
            async with asyncio.timeout(self._limits.reader):
                picture = await self._receive()
        except TimeoutError:
            raise RefusalError("bad_message", "The picture that the start announced did not come.") from None
        if isinstance(picture, str) or len(picture) != start.image:
            raise RefusalError(
                "bad_message", f"Behind this start comes a binary message of {start.image} bytes."
            )
        return picture

    def _follow(self, live: LiveSession, after: int | None = None) -> None:
        self._live, self._last, self._reader = live, live, live.outbox.attach(after)
        self._sender = asyncio.create_task(self._deliver(live, self._reader))

    async def _deliver(self, live: LiveSession, reader: int) -> None:
        """Send what a session has, until its end is said."""
        while (one := await live.outbox.get(reader)) is not None:
            await self._send(one)
            live.outbox.said(one)
            if isinstance(one.event, EndedEvent):
                self._live = None
                return
        self._live = None
        await self._refuse(
            RefusalError("gone", "Another connection has this session now, or it was dropped.")
        )
        await self._websocket.close(TRY_LATER)

    async def _refuse(self, refusal: RefusalError) -> None:
        self._service.engine.metrics.refusals.labels(refusal.code).inc()
        event = ErrorEvent(code=refusal.code, message=refusal.message, retry_after=refusal.retry_after)
        await self._send(Outgoing(event))

    async def _send(self, one: Outgoing) -> None:
        async with self._turn:
            await self._websocket.send_text(one.event.model_dump_json())
            for part in one.parts:
                await self._websocket.send_bytes(part)
