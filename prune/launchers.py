"""Which kernels the plugins launch: those of the engine that runs, whatever else the process has loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from forcingkv.prune.launcher import KernelLauncher
from forcingkv.runtime.spec import Dtype

Kind: TypeAlias = tuple[Dtype, int, bool]
"""What keys kernels are for: their type, their width, and whether segments are uneven."""

_newest: dict[Kind, KernelLauncher] = {}
_running = threading.local()
_turn = threading.Lock()


def shared(launcher: KernelLauncher) -> KernelLauncher:
    """The launcher of the same kernels that is known already, or else that itself, which is from now on.

    Who runs engines keeps it for as long: the kernels go with the last who has it.
    """
    kind = launcher.dtype, launcher.width, launcher.uneven
    with _turn:
        known = _newest.get(kind)
        if known is None or known.digest != launcher.digest:
            _newest[kind] = known = launcher
        return known


@contextmanager
def launching(launcher: KernelLauncher | None) -> Iterator[None]:
    """Let the plugins launch those kernels in what this thread asks of TensorRT meanwhile: another bundle's
    may have become known since. None: the newest for its keys."""
    before = getattr(_running, "launcher", None)
    _running.launcher = launcher
    try:
        yield
    finally:
        _running.launcher = before


def launcher_of(kind: Kind) -> KernelLauncher | None:
    """The kernels for such keys: this thread's own, or else the newest. TensorRT calls plugins in the thread
    that asked it to run; what it should ever call in one of its own gets the newest."""
    own: KernelLauncher | None = getattr(_running, "launcher", None)
    if own is not None and (own.dtype, own.width, own.uneven) == kind:
        return own
    return _newest.get(kind)


def forget() -> None:
    """Know none any more."""
    _newest.clear()
