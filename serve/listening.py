"""Sockets that the service listens at."""

from __future__ import annotations

import socket

from forcingkv.headmaps.errors import InputError


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
