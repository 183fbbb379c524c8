"""Runs the service in a process: its socket, its signals, its log."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn

from forcingkv.serve.app import make_app
from forcingkv.serve.bundles import BundleChoice, Encode, open_bundles
from forcingkv.serve.engine import Engine
from forcingkv.serve.job_store import JobStore
from forcingkv.serve.jobs import Jobs
from forcingkv.serve.lives import Life
from forcingkv.serve.registry import Registry
from forcingkv.serve.relay import Relay
from forcingkv.serve.service import Service
from forcingkv.serve.settings import Settings
from forcingkv.serve.silent import Calm, Silent

SECOND = 10
"""Of uvicorn's ticks."""
log = logging.getLogger("forcingkv.serve")


def open_service(settings: Settings, choices: list[BundleChoice], encode: Encode | None = None) -> Service:
    """Open bundles and folders.

    Raises InputError and MissingExtraError as `Session.open` does, and where the folder cannot be used.
    """
    with ExitStack() as opened:
        bundles = open_bundles(
            choices,
            backend=settings.backend,
            device=settings.device,
            threads=settings.threads,
            encode=encode,
        )
        for bundle in bundles.values():
            opened.callback(bundle.close)
        # Behind the bundles: what they refuse leaves no folder.
        life = Life(settings.data, shared=bool(settings.replica))
        opened.callback(life.close)
        store = JobStore(settings.data, settings.limits.jobs_kept, life)
        opened.callback(store.close)
        engine = Engine(bundles, settings, life.scratch)
        opened.pop_all()
    relay = Relay(settings) if settings.replica else None
    return Service(settings, engine, Registry(engine), Jobs(engine, store), life, relay)


def make_server(service: Service, ready: Callable[[], None] = lambda: None) -> Server:
    """The server of a service; `ready` is called once it answers. `Server.run(sockets=[...])` serves until a
    signal, or `Server.stop`: sessions end well first, and a second signal ends it at once."""
    config = uvicorn.Config(
        make_app(lambda: service),
        log_config=None,
        access_log=False,
        ws=Calm,
        ws_ping_timeout=service.settings.limits.reader,  # its answer may be behind a large chunk
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
        self._silent = Silent(service.settings.limits.hello)
        self._told = False
        self._draining: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        self._ready()
        await super().main_loop()

    async def on_tick(self, counter: int) -> bool:
        if counter % SECOND == 0:
            self._silent.look(self.server_state.connections)
        if self._told and self._draining is None:
            log.info("told to stop: sessions end first")
            self._draining = asyncio.create_task(self._service.drain())
        if self._draining is not None and self._draining.done():
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it well, the second at once."""
        if self._told:
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """End, as a signal does; of any thread."""
        self._told = True
