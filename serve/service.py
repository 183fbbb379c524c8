"""A service: what is shared by its sockets, its jobs and its pages."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from forcingkv.serve.engine import Engine
from forcingkv.serve.jobs import Jobs
from forcingkv.serve.lives import Life
from forcingkv.serve.registry import Registry
from forcingkv.serve.relay import Relay
from forcingkv.serve.settings import Settings


@dataclass(frozen=True)
class Service:
    """One service, of one event loop."""

    settings: Settings
    engine: Engine
    registry: Registry
    jobs: Jobs
    life: Life
    relay: Relay | None = None
    """To the other replicas, where there are any."""

    async def drain(self) -> None:
        """End all that runs, as far as it can end well. A second time nothing happens."""
        if self.engine.draining:
            return
        self.engine.draining = True
        until = time.monotonic() + self.settings.limits.drain
        await asyncio.gather(self.jobs.drain(until), self.registry.drain(until))

    def close(self) -> None:
        """Give all back."""
        self.engine.close()
        self.jobs.store.close()
        self.life.close()


def service_of(connection: HTTPConnection) -> Service:
    """The service that a request or socket came to."""
    service = connection.app.state.service
    assert isinstance(service, Service)
    return service
