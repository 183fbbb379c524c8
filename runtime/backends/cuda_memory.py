"""Memory of a lane: tensors on the GPU, and pinned memory on the host through which arrays come and go."""

from __future__ import annotations

import ctypes
import math
from collections import deque
from typing import Any

import numpy as np

from forcingkv.runtime.backends import Array, Queue
from forcingkv.runtime.backends.cuda import CudaQueue, Gpu
from forcingkv.runtime.dtypes import DTYPES

LEAST = 16
"""Bytes of the smallest allocation: an empty tensor needs an address too."""
PAGE = 4096
"""Pinned memory comes in multiples of it, so that small arrays share a size."""
IN_FLIGHT = 64
"""Pinned pieces of one size that copies may be using at a time; a further one waits for the first."""


class CudaMemory:
    """Memory of a lane, until it is closed.

    On the device it comes from a pool of the lane's own: cuda-core keeps what is given back to the device's
    common pool, and then no other allocator has the use of it. On the host it is pinned, in pieces that are
    used again; none is handed out that a copy may still use.
    """

    def __init__(self, gpu: Gpu, queue: CudaQueue) -> None:
        """Memory is taken and given back in the order of a queue."""
        self.gpu, self._queue = gpu, queue
        self._pinned = gpu.core.LegacyPinnedMemoryResource()
        self._idle: dict[int, deque[Pinned]] = {}
        with gpu.asked("make a memory pool"):
            options = gpu.core.DeviceMemoryResourceOptions()
            self._pool = gpu.core.DeviceMemoryResource(gpu.device, options)
            gpu.held.callback(self._pool.close)
            gpu.held.callback(queue.stream.sync)  # once all tensors are given back, in its order

    def tensor(self, shape: tuple[int, ...], dtype: str) -> CudaTensor:
        """New memory, for whatever queue; multiples of 256 bytes begin it. Its contents are not defined.

        Raises MemoryShortError where there is not enough.
        """
        nbytes = max(LEAST, math.prod(shape) * DTYPES[dtype].bytes)
        with self.gpu.asked(f"take memory for a tensor of {dtype} {shape}", nbytes):
            buffer = self._pool.allocate(nbytes, stream=self._queue.stream)
            self.gpu.held.callback(buffer.close)
            address = int(buffer.handle)
        self._queue.sync()  # other queues may use it at once
        return CudaTensor(self, buffer, address, shape, dtype)

    def take(self, nbytes: int) -> Pinned:
        """A piece of pinned memory of at least that size. Raises MemoryShortError where there is none."""
        size = -(-nbytes // PAGE) * PAGE
        idle = self._idle.setdefault(size, deque())
        for _ in range(len(idle)):  # not by iterating: a copy that another thread drops adds to it
            if idle[0].free():
                return idle.popleft()
            idle.rotate(-1)
        if len(idle) >= IN_FLIGHT:
            oldest = idle.popleft()
            oldest.wait()
            return oldest
        with self.gpu.asked("take pinned memory on the host", size):
            return Pinned(self.gpu, self._pinned.allocate(size), size)

    def give(self, piece: Pinned) -> None:
        """A piece that only a copy may still use."""
        self._idle[piece.size].append(piece)


class CudaTensor:
    """A view of device memory.

    Attributes:
        shape: of the array.
        dtype: its name.
        nbytes: its size.
        address: where it begins.
    """

    def __init__(
        self, memory: CudaMemory, buffer: Any, address: int, shape: tuple[int, ...], dtype: str
    ) -> None:
        self._memory, self._buffer, self.address = memory, buffer, address
        self.shape, self.dtype = shape, dtype
        # What an array of it is on the host: numpy has no bfloat16, so its bits.
        self._host = np.dtype(DTYPES[dtype].bits)
        self.nbytes = math.prod(shape) * self._host.itemsize

    def first(self, shape: tuple[int, ...]) -> CudaTensor:
        """Raises ValueError for a shape that needs more."""
        view = CudaTensor(self._memory, self._buffer, self.address, tuple(shape), self.dtype)
        if view.nbytes > self.nbytes:
            raise ValueError(f"{self.dtype} {shape} does not lie within {self.shape}")
        return view

    def rows(self, start: int, stop: int) -> CudaTensor:
        """Raises ValueError for places that are not there."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"there are no rows {start} to {stop} of {self.shape}")
        shape = (stop - start, *self.shape[1:])
        # An empty view begins where its memory does: past the end there is no address to give an engine.
        offset = start * (self.nbytes // self.shape[0]) if stop > start else 0
        return CudaTensor(self._memory, self._buffer, self.address + offset, shape, self.dtype)

    def write(self, array: Array, queue: Queue) -> None:
        """Raises ValueError for an array of another shape or kind; of bfloat16 it takes the bits, uint16."""
        if array.shape != self.shape or not np.can_cast(array.dtype, self._host, "same_kind"):
            raise ValueError(f"{array.dtype} {array.shape} does not fit into {self.dtype} {self.shape}")
        if not self.nbytes:
            return
        piece = self._memory.take(self.nbytes)
        np.copyto(piece.array(self.shape, self._host), array, casting="same_kind")
        with self._memory.gpu.asked("copy an array to the GPU", self.nbytes):
            self.view().copy_from(piece.view(self.nbytes), stream=stream_of(queue))
            piece.used(queue)
        self._memory.give(piece)

    def clear(self, queue: Queue) -> None:
        if self.nbytes:
            with self._memory.gpu.asked("clear memory"):
                self.view().fill(0, stream=stream_of(queue))

    def fetch(self, queue: Queue) -> CudaFetch:
        if not self.nbytes:
            return CudaFetch(self._memory, None, self.shape, self._host)
        piece = self._memory.take(self.nbytes)
        with self._memory.gpu.asked("copy an array to the host", self.nbytes):
            piece.view(self.nbytes).copy_from(self.view(), stream=stream_of(queue))
            piece.used(queue)
        return CudaFetch(self._memory, piece, self.shape, self._host)

    def copy_from(self, source: CudaTensor, queue: Queue) -> None:
        """Take what another tensor of that size holds, in the queue's order."""
        if self.nbytes:
            with self._memory.gpu.asked("copy memory"):
                self.view().copy_from(source.view(), stream=stream_of(queue))

    def shared(self) -> Any:
        """cuda-core's `StridedMemoryView`; bfloat16 shows as its bits, uint16. The memory is there until
        the lane is closed, and whoever reads it must have waited for what was to be written."""
        with self._memory.gpu.asked("share memory"):
            view_of = self._memory.gpu.core.utils.StridedMemoryView.from_buffer
            return view_of(self.view(), self.shape, dtype=self._host)

    def view(self) -> Any:
        """cuda-core's `Buffer` of exactly these bytes, which frees nothing."""
        return self._memory.gpu.core.Buffer.from_handle(self.address, self.nbytes, owner=self._buffer)


class CudaFetch:
    """A copy on its way through pinned memory, which goes back when the copy was read or dropped."""

    def __init__(
        self, memory: CudaMemory, piece: Pinned | None, shape: tuple[int, ...], host: np.dtype[Any]
    ) -> None:
        self._memory, self._piece, self._shape, self._host = memory, piece, shape, host
        self._array: Array | None = None

    def array(self) -> Array:
        """Raises DeviceError where work before it failed, or the lane was closed. Asked again it gives the
        same array."""
        if self._array is None:
            if self._piece is None:
                return np.empty(self._shape, self._host)
            self._piece.wait()
            self._array = self._piece.array(self._shape, self._host).copy()
            self._release()
        return self._array

    def _release(self) -> None:
        piece, self._piece = self._piece, None
        if piece is not None:
            self._memory.give(piece)

    def __del__(self) -> None:
        self._release()  # its event tells when it may be used again


class Pinned:
    """A piece of pinned host memory, and the event after which no copy uses it."""

    def __init__(self, gpu: Gpu, buffer: Any, size: int) -> None:
        self._gpu, self._buffer, self.size = gpu, buffer, size
        self._address = int(buffer.handle)
        self._event: Any = None
        gpu.held.callback(buffer.close)

    def array(self, shape: tuple[int, ...], host: np.dtype[Any]) -> Array:
        """An array in it."""
        count = math.prod(shape)
        memory = (ctypes.c_ubyte * (count * host.itemsize)).from_address(self._address)
        return np.frombuffer(memoryview(memory), host, count).reshape(shape)

    def view(self, nbytes: int) -> Any:
        """cuda-core's `Buffer` of its first bytes, which frees nothing."""
        return self._gpu.core.Buffer.from_handle(self._address, nbytes, owner=self._buffer)

    def used(self, queue: Queue) -> None:
        """It is in use until that queue has come here."""
        if self._event is None:
            options = self._gpu.core.EventOptions(blocking_sync=True)
            self._event = stream_of(queue).record(options=options)
            self._gpu.held.callback(self._event.close)
        else:
            stream_of(queue).record(self._event)

    def free(self) -> bool:
        """Whether no copy uses it."""
        with self._gpu.asked("ask after a copy"):
            return self._event is None or bool(self._event.is_done)

    def wait(self) -> None:
        """Wait until no copy uses it. Raises DeviceError if the lane was closed."""
        with self._gpu.asked("finish the work that was asked for"):
            if self._event is not None:
                self._event.sync()


def stream_of(queue: Queue) -> Any:
    """cuda-core's stream of a queue."""
    assert isinstance(queue, CudaQueue)
    return queue.stream
