"""Runs the service in a process: its socket, its signals, its log."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn

from forcingkv.headmaps.errors import InputError
from forcingkv.serve.app import make_app
from forcingkv.serve.bundles import BundleChoice, Encode, open_bundles
from forcingkv.serve.engine import Engine
from forcingkv.serve.job_store import JobStore
from forcingkv.serve.jobs import Jobs
from forcingkv.serve.registry import Registry
from forcingkv.serve.service import Service
from forcingkv.serve.settings import Settings

log = logging.getLogger("forcingkv.serve")


def open_service(settings: Settings, choices: list[BundleChoice], encode: Encode | None = None) -> Service:
    """Open bundles and folders.

    Raises InputError and MissingExtraError as `Session.open` does, and where the folder cannot be used.
    """
    with ExitStack() as opened:
        store = JobStore(settings.data, settings.limits.jobs_kept)
        opened.callback(store.close)
        bundles = open_bundles(
            choices,
            backend=settings.backend,
            device=settings.device,
            threads=settings.threads,
            encode=encode,
        )
        engine = Engine(bundles, settings.data, settings.limits, settings.sessions)
        opened.pop_all()
    return Service(settings, engine, Registry(engine), Jobs(engine, store))


def listening(host: str, port: int, stuck: float) -> socket.socket:
    """A socket that listens; port 0: any that is free. Raises InputError where it cannot.

    A peer that takes nothing for `stuck` seconds is cut off by the system, where it can: what was written for
    it would stay in memory.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, proto)
    except OSError as error:
        raise InputError(f"cannot be used ({error.strerror or error})", where=f"--host {host}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stuck * 1000))
        opened.bind(address)
        opened.listen(128)
    except OSError as error:
        opened.close()
        hint = "Another program may have it: choose another --port, or 0 for any that is free."
        what = f"cannot be listened at ({error.strerror or error})"
        raise InputError(what, where=f"{host}:{port}", hint=hint) from error
    return opened


def make_server(service: Service, ready: Callable[[], None] = lambda: None) -> Server:
    """The server of a service; `ready` is called once it answers. `Server.run(sockets=[...])` serves until a
    signal, or `Server.stop`: sessions end well first, and a second signal ends it at once."""
    config = uvicorn.Config(
        make_app(lambda: service),
        log_config=None,
        access_log=False,
        ws_max_size=service.settings.limits.body,
        ws_per_message_deflate=False,  # frames are compressed already
        timeout_graceful_shutdown=5,
        lifespan="on",
        server_header=False,
    )
    return Server(config, service, ready)


class Server(uvicorn.Server):
    """Ends what runs before it closes sockets."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready
        self._told = False
        self._draining: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        self._ready()
        await super().main_loop()

    async def on_tick(self, counter: int) -> bool:
        if self._told and self._draining is None:
            log.info("told to stop: sessions end first")
            self._draining = asyncio.create_task(self._service.drain())
        if self._draining is not None and self._draining.done():
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal; the second is not asked (`commands/stopping.py`)."""
        self.stop()

    def stop(self) -> None:
        """End, as a signal does; of any thread."""
        self._told = True
