"""Which TensorRT: the one place where `tensorrt` or `tensorrt_rtx` is chosen.

Both have one API, and a process uses one of them: the first logger given to either stays the process's,
and plugin classes inherit from the module's own. So the choice is made once, with `choose`; afterwards
`trt` stands for the chosen module. Type checkers see it as `tensorrt`, whose stubs the two share.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from forcingkv.headmaps.errors import InputError, MissingExtraError

# Because of `trt`, which type checkers would else take for an import of this module's own.
__all__ = ["FLAVOURS", "Flavour", "FlavourName", "Told", "choose", "chosen", "make_log", "require", "trt"]

FlavourName: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
T = TypeVar("T")


@dataclass(frozen=True)
class Flavour:
    """In what the flavours differ."""

    name: FlavourName
    module: str
    sms: tuple[int, ...]
    """Compute capabilities that engines can be built for without such a GPU. Empty: it needs the GPU."""
    libraries: str
    """The package of the shared libraries, which have the version in their names. The parser may open them by
    names without it."""


FLAVOURS: dict[FlavourName, Flavour] = {
    "tensorrt": Flavour("tensorrt", "tensorrt", (), "tensorrt_libs"),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", (75, 80, 86, 89, 120, 121), "tensorrt_rtx_libs"),
}

_chosen: list[tuple[Flavour, ModuleType]] = []
_choosing = threading.Lock()


def choose(name: FlavourName) -> Flavour:
    """Make `trt` the module of that flavour, for this process.

    Raises MissingExtraError if it is not installed, InputError if the process uses the other one already.
    """
    flavour = require(name)
    with _choosing:
        if not _chosen:
            _chosen.append((flavour, importlib.import_module(flavour.module)))
    if _chosen[0][0] is not flavour:
        raise InputError(
            f"cannot be used: this process already uses {_chosen[0][0].name}",
            where=name,
            hint="Use each flavour of TensorRT in a process of its own.",
        )
    return flavour


def chosen() -> Flavour | None:
    """The flavour this process uses, if one was chosen."""
    return _chosen[0][0] if _chosen else None


def require(name: FlavourName) -> Flavour:
    """The flavour, if it is installed; MissingExtraError if not. Imports nothing."""
    flavour = FLAVOURS[name]
    found = importlib.util.find_spec(flavour.module)
    # Type stubs leave a folder of the same name, which is found as a namespace package.
    if found is None or found.origin is None:
        raise MissingExtraError(flavour.module, flavour.name)
    return flavour


class _Chosen(ModuleType):
    """Stands for the chosen module."""

    def __getattr__(self, name: str) -> Any:
        if not _chosen:
            raise RuntimeError("no flavour of TensorRT was chosen: call choose() first")
        return getattr(_chosen[0][1], name)


if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = _Chosen("trt")


def make_log(hear: Callable[[str, str], None]) -> trt.ILogger:
    """A logger of the chosen flavour that calls `hear(severity, text)`: `ERROR`, `WARNING`, `INFO`, ...

    The first one given to a builder or a runtime stays the process's logger, so keep one.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            hear(severity.name, message)

    return Log()


class Told(Generic[T]):
    """What was told in callbacks, kept for the thread whose work it is about.

    TensorRT calls back in the thread that asked it for something, so a session is not told what happened in
    another. What comes from a thread of TensorRT's own cannot be told apart: it goes to whoever asks next
    and has nothing, rather than to nobody.
    """

    def __init__(self) -> None:
        self._own, self._nobodys = threading.local(), list[T]()

    def add(self, what: T) -> None:
        """Keep it, for this thread if it is one of Python's, or ever asked."""
        told = self._own.__dict__.setdefault("told", []) if self._asks() else self._nobodys
        told.append(what)

    def take(self) -> list[T]:
        """What there is for this thread, which is then forgotten."""
        told: list[T] = self._own.__dict__.pop("told", [])
        self._own.asked = True
        if not told:
            told, self._nobodys = self._nobodys, []
        return told

    def _asks(self) -> bool:
        """Whether this thread is one that may ask. A thread of TensorRT's becomes one of `threading`'s, of a
        kind of its own, once any code asks in it for the current thread: it is none for that."""
        here, made_up = threading.get_ident(), threading._DummyThread
        known = (thread for thread in threading.enumerate() if not isinstance(thread, made_up))
        return "asked" in self._own.__dict__ or any(thread.ident == here for thread in known)
