"""Memory of a lane: tensors on the GPU, and pinned memory on the host through which arrays come and go."""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
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
SLICE = 16 << 20
"""Bytes of the largest piece: larger arrays are copied in slices."""
PINNED = 256_000_000
"""Bytes of pinned memory that a lane keeps for copies. It is taken from all processes and never swapped, and
slow to take, so neither without bound nor anew each time."""
WAITED_FOR = PINNED // 2
"""Bytes of an array whose copy to the host is waited for at once, a few slices at a time; smaller ones wait
for nothing, in as many pieces as they need."""


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
        self._pieces: set[Pinned] = set()
        self._exported: set[int] = set()
        with gpu.asked("make a memory pool"):
            options = gpu.core.DeviceMemoryResourceOptions()
            self._pool = gpu.core.DeviceMemoryResource(gpu.device, options)
            # CUDA keeps what is still in use of a pool that was closed.
            gpu.held.callback(self._pool.close)
            gpu.held.callback(self._close_pieces)
            gpu.held.callback(queue.stream.sync)  # once all tensors are given back, in its order

    def tensor(self, shape: tuple[int, ...], dtype: str) -> CudaTensor:
        """New memory, for whatever queue; multiples of 256 bytes begin it. Its contents are not defined.

        Raises MemoryShortError where there is not enough.
        """
        nbytes = max(LEAST, math.prod(shape) * DTYPES[dtype].bytes)
        with self.gpu.asked(f"take memory for a tensor of {dtype} {shape}", nbytes):
            buffer = self._pool.allocate(nbytes, stream=self._queue.stream)
            self.gpu.held.callback(self._close, buffer)
            address = int(buffer.handle)
        self._queue.sync()  # other queues may use it at once
        return CudaTensor(self, buffer, address, shape, dtype)

    def export(self, buffer: Any) -> None:
        """Leave a buffer to whoever holds it last: it was shared, and its reader may outlive the lane."""
        self._exported.add(int(buffer.handle))

    @property
    def pinned_bytes(self) -> int:
        """Of all pinned memory."""
        return sum(piece.size for piece in tuple(self._pieces))

    def take(self, nbytes: int) -> Pinned:
        """A piece of pinned memory of at least that size, at most `SLICE`. Waits for copies where the lane
        has all that it may keep. Raises MemoryShortError where there is none."""
        size = -(-nbytes // PAGE) * PAGE
        idle = self._idle.setdefault(size, deque())
        for _ in range(len(idle)):  # not by iterating: a copy that another thread drops adds to it
            if idle[0].free():
                return idle.popleft()
            idle.rotate(-1)
        if idle and (len(idle) >= IN_FLIGHT or self.pinned_bytes + size > PINNED):
            oldest = idle.popleft()
            oldest.wait()
            return oldest
        self._make_room(size)
        with self.gpu.asked("take pinned memory on the host", size):
            piece = Pinned(self.gpu, self._pinned.allocate(size), size)
        self._pieces.add(piece)
        return piece

    def give(self, piece: Pinned) -> None:
        """A piece that only a copy may still use."""
        self._idle[piece.size].append(piece)

    def _make_room(self, size: int) -> None:
        """Give back pieces of other sizes until so many bytes more are no more than the lane may keep. Those
        in copies that nobody has read yet stay, and count as nobody's."""
        for idle in sorted(self._idle.items(), reverse=True):
            while idle[1] and self.pinned_bytes + size > PINNED:
                piece = idle[1].popleft()
                piece.wait()
                self._pieces.discard(piece)
                with self.gpu.asked("give pinned memory back"):
                    piece.close()

    def _close(self, buffer: Any) -> None:
        if int(buffer.handle) not in self._exported:
            buffer.close()

    def _close_pieces(self) -> None:
        with ExitStack() as stack:  # what fails does not keep the rest
            for piece in tuple(self._pieces):
                stack.callback(piece.close)


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
        whole = self.nbytes <= SLICE
        numbers = array if whole else np.ascontiguousarray(array).reshape(-1)
        for start, count in self._slices():
            part = numbers if whole else numbers[start : start + count]
            size = count * self._host.itemsize
            piece = self._memory.take(size)
            np.copyto(piece.array(part.shape, self._host), part, casting="same_kind")
            with self._memory.gpu.asked("copy an array to the GPU", self.nbytes):
                self.view(start, count).copy_from(piece.view(size), stream=stream_of(queue))
                piece.used(queue)
            self._memory.give(piece)

    def clear(self, queue: Queue) -> None:
        if self.nbytes:
            with self._memory.gpu.asked("clear memory"):
                self.view().fill(0, stream=stream_of(queue))

    def fetch(self, queue: Queue) -> CudaFetch:
        """As in the protocol. An array of more than `WAITED_FOR` is there when this returns."""
        fetch = CudaFetch(self._memory, self.shape, self._host)
        behind = 2 if self.nbytes > WAITED_FOR else None
        for start, count in self._slices():
            size = count * self._host.itemsize
            piece = self._memory.take(size)
            fetch.add(start, count, piece)
            with self._memory.gpu.asked("copy an array to the host", self.nbytes):
                piece.view(size).copy_from(self.view(start, count), stream=stream_of(queue))
                piece.used(queue)
            fetch.read_all_but(behind)
        return fetch

    def copy_from(self, source: CudaTensor, queue: Queue) -> None:
        """Take what another tensor of that size holds, in the queue's order."""
        if self.nbytes:
            with self._memory.gpu.asked("copy memory"):
                self.view().copy_from(source.view(), stream=stream_of(queue))

    def shared(self) -> Any:
        """cuda-core's `StridedMemoryView`; bfloat16 shows as its bits, uint16. The memory is there as long as
        anything made of it is, the lane closed or not. Whoever reads it must have waited for what was to be
        written."""
        with self._memory.gpu.asked("share memory"):
            view_of = self._memory.gpu.core.utils.StridedMemoryView.from_buffer
            view = view_of(self.view(), self.shape, dtype=self._host)
        self._memory.export(self._buffer)
        return view

    def view(self, start: int = 0, count: int | None = None) -> Any:
        """cuda-core's `Buffer` of exactly these bytes, or of some of the numbers, which frees nothing."""
        nbytes = self.nbytes if count is None else count * self._host.itemsize
        address = self.address + start * self._host.itemsize
        return self._memory.gpu.core.Buffer.from_handle(address, nbytes, owner=self._buffer)

    def _slices(self) -> Iterator[tuple[int, int]]:
        """Where each slice of a copy begins, and how many numbers are in it."""
        numbers, most = math.prod(self.shape), SLICE // self._host.itemsize
        for start in range(0, numbers, most):
            yield start, min(most, numbers - start)


class CudaFetch:
    """A copy on its way through pinned memory, which goes back when the copy was read or dropped."""

    def __init__(self, memory: CudaMemory, shape: tuple[int, ...], host: np.dtype[Any]) -> None:
        self._memory, self._shape, self._host = memory, shape, host
        self._pieces: deque[tuple[int, int, Pinned]] = deque()
        self._array: Array | None = None

    def add(self, start: int, count: int, piece: Pinned) -> None:
        """So many of the numbers, from `start` on, come through that piece."""
        self._pieces.append((start, count, piece))

    def read_all_but(self, behind: int | None) -> None:
        """Read the first pieces, until only so many are on their way. None: wait for nothing."""
        while behind is not None and len(self._pieces) > behind:
            if self._array is None:
                self._array = np.empty(self._shape, self._host)
            start, count, piece = self._pieces[0]
            piece.wait()
            self._array.reshape(-1)[start : start + count] = piece.array((count,), self._host)
            self._memory.give(self._pieces.popleft()[2])

    def array(self) -> Array:
        """Raises DeviceError where work before it failed, or the lane was closed. Asked again it gives the
        same array; one of no numbers each time another."""
        self.read_all_but(0)
        return np.empty(self._shape, self._host) if self._array is None else self._array

    def __del__(self) -> None:
        for _, _, piece in self._pieces:
            self._memory.give(piece)  # its event tells when it may be used again


class Pinned:
    """A piece of pinned host memory, and the event after which no copy uses it."""

    def __init__(self, gpu: Gpu, buffer: Any, size: int) -> None:
        self._gpu, self._buffer, self.size = gpu, buffer, size
        self._address = int(buffer.handle)
        self._event: Any = None

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

    def close(self) -> None:
        """Give it back, its event too."""
        with ExitStack() as stack:
            stack.callback(self._buffer.close)
            if self._event is not None:
                stack.callback(self._event.close)


def stream_of(queue: Queue) -> Any:
    """cuda-core's stream of a queue."""
    assert isinstance(queue, CudaQueue)
    return queue.stream
