"""Who may use the service: by token, by the page that asks, by the name it is asked for, and how often."""

from __future__ import annotations

import asyncio
import ipaddress
import time

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.settings import Settings, is_loopback, split


def client_of(connection: HTTPConnection) -> str:
    """The address by which a client is counted. One of IPv6 has a whole network of 64 bits to itself.

    Behind a proxy on this machine it is that of `X-Forwarded-For`, which uvicorn reads (FORWARDED_ALLOW_IPS:
    of which other proxies).
    """
    host = connection.client.host if connection.client else "local"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Interface((address, 64)).network.network_address)


def check_client(settings: Settings, connection: HTTPConnection) -> None:
    """Refuse who may not ask at all, with a token or without.

    Raises RefusalError (forbidden).
    """
    check_origin(settings, connection.headers)
    # The service listens at this machine alone then; what stands before it (Ray's proxy) may not.
    here = connection.client is None or is_loopback(connection.client.host)
    if settings.token is None and not here and not settings.hosts:
        raise RefusalError("forbidden", "Without a token the service is for this machine alone.")


def check_origin(settings: Settings, headers: Headers) -> None:
    """Refuse what a foreign page makes a browser ask.

    A browser says in Origin which page asks; programs say nothing. And where no token is asked for, a page
    can give its own name this machine's address (DNS rebinding): then the name has to be one of this machine.

    Raises RefusalError (forbidden).
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    place = split(f"//{host}")
    name = (place.hostname if place else None) or ""
    if settings.token is None and not is_loopback(name) and name not in settings.hosts:
        raise RefusalError("forbidden", "The service is not known by that name: use 127.0.0.1 or localhost.")
    if origin is None or origin in settings.origins:
        return
    page = split(origin)
    if page is None or not page.netloc or page.netloc != host:
        raise RefusalError("forbidden", "This page may not use the service.")


def check_token(settings: Settings, headers: Headers) -> None:
    """Refuse a request over HTTP without the token. Raises RefusalError (unauthorized)."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if not settings.knows(token.strip() if scheme.lower() == "bearer" else None):
        raise RefusalError("unauthorized", "The token is missing or wrong: Authorization: Bearer TOKEN.")


class Pace:
    """Lets through a number of messages a second, twice as many at once; others wait.

    Args:
        rate: messages a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate, self._left, self._at = rate, 2 * rate, time.monotonic()

    async def take(self) -> None:
        """Wait for the turn of one message."""
        now = time.monotonic()
        self._left = min(2 * self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        self._left -= 1
        if self._left < 0:
            await asyncio.sleep(-self._left / self._rate)
