"""Memory of the host, and work that is done at once: for backends that run on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Array, Mark, Queue


class HostMark(float):
    """The time in seconds at which work was done."""

    def wait(self) -> None:
        pass

    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self - earlier


class HostQueue:
    """Work that is done at once."""

    def mark(self) -> HostMark:
        return HostMark(time.perf_counter())

    def gate(self, after: object) -> Callable[[], None]:
        raise InputError(
            f"is {type(after).__name__}, and frames of this session lie where no stream can be waited for",
            where="after",
            hint="Wait for it yourself, and call release() without it.",
        )


@dataclass(frozen=True)
class Fetched:
    """A copy that was made at once."""

    copy: Array

    def array(self) -> Array:
        return self.copy


class HostTensor:
    """A numpy array."""

    device, number = "cpu", 0

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype.name, array.nbytes
        self.address = array.ctypes.data

    def first(self, shape: tuple[int, ...]) -> HostTensor:
        return HostTensor(self._array.reshape(-1)[: math.prod(shape)].reshape(shape))

    def rows(self, start: int, stop: int) -> HostTensor:
        return HostTensor(self._array[start:stop])

    def write(self, array: Array, queue: Queue) -> None:
        self._array[...] = array

    def clear(self, queue: Queue) -> None:
        self._array.fill(0)

    def fetch(self, queue: Queue) -> Fetched:
        return Fetched(self._array.copy())

    def copy_from(self, source: HostTensor, queue: Queue) -> None:
        self._array[...] = source._array

    def shared(self) -> Array:
        return self._array
