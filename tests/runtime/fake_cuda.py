"""A cuda.core whose device is the host: it records, really copies, and is as late as a GPU may be.

Work that is put into a stream is done only when somebody waits for it. So what is read too early, or
overwritten while a copy still needs it, shows in the numbers. Misuse that a GPU would not notice (memory that
is gone, a thread without a context) raises `Misuse`, which nothing catches.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections import Counter
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import numpy.typing as npt

from tests.runtime.fake_streams import (
    EventOptions,
    FakeCudaError,
    FakeEvent,
    FakeStream,
    Misuse,
    Owned,
    StreamOptions,
)

__all__ = ["FakeCuda"]

ALIGNMENT = 512
"""Of device memory, as the driver's pools have it."""
FRESH, FREED = 0xA5, 0xDD
"""What memory holds before it is written, and after it was freed."""


class FakeCuda:
    """Stands in for the module `cuda.core`, and `driver` for `cuda.bindings.driver`. There are two GPUs.

    Attributes:
        calls: the name of every call so far, TensorRT's included.
        fail_at: the index of a call that raises `failure`, or None.
        failure: what that call raises.
        live: how many there are of each kind of thing that has to be given back.
        dropped: how many of each kind nobody closed, so that Python gave them back.
        trace: what was put into streams, in the order of the calls.
        room: bytes of device memory that are left.
        current: thread -> the number of the GPU that is its current one.
        lost: what every call of the first GPU answers once a kernel failed, or None.
    """

    __version__ = "1.2.2"
    Event, EventOptions, StreamOptions = FakeEvent, EventOptions, StreamOptions

    def __init__(self, *, late: bool = True, room: int = 1 << 30) -> None:
        self.late, self.room = late, room
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.failure: Exception = FakeCudaError("CUDA_ERROR_LAUNCH_FAILED: as the test wants it")
        self.live: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.trace: list[tuple[Any, ...]] = []
        self.streams: WeakValueDictionary[int, FakeStream] = WeakValueDictionary()
        self.clock = 0
        self.memory: dict[int, npt.NDArray[np.uint8]] = {}
        self.allocated: dict[int, tuple[str, int]] = {}
        self._starts: list[int] = []
        self._promised: set[int] = set()
        self.current: dict[int, int] = {}
        self.lost: Exception | None = None
        self.driver = FakeDriver(self)
        self.Stream = SimpleNamespace(from_handle=lambda handle: self.streams[handle])
        self.events: WeakSet[FakeEvent] = WeakSet()
        self.Device = lambda number: FakeDevice(self, number)
        self.DeviceMemoryResource = lambda device, options: FakePool(self, options)
        self.DeviceMemoryResourceOptions = SimpleNamespace
        self.LegacyPinnedMemoryResource = lambda: FakePinned(self)
        self.Buffer = SimpleNamespace(from_handle=self._from_handle)
        self.utils = SimpleNamespace(StridedMemoryView=SimpleNamespace(from_buffer=self._view_of))

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """Kind and bytes of all memory that is there."""
        return list(self.allocated.values())

    @property
    def left(self) -> dict[str, int]:
        """What was made and not given back."""
        return {kind: count for kind, count in self.live.items() if count}

    def called(self, name: str, device: int | None = None) -> None:
        """Every call comes through here; `device` is the number of the GPU that it is for."""
        here = self.here
        if here is None:
            raise Misuse(f"{name} in a thread where no device is current")
        if device not in (None, here):
            raise Misuse(f"{name} of the GPU {device}, and the GPU {here} is the current one")
        self.calls.append(name)
        if self.lost is not None and here == 0:
            raise FakeCudaError(*self.lost.args)  # each call has an error of its own
        if self.fail_at == len(self.calls) - 1:
            raise self.failure

    @property
    def here(self) -> int | None:
        """This thread's current GPU."""
        return self.current.get(threading.get_ident())

    def bytes_at(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The memory there. Raises Misuse unless all of it is one live allocation's."""
        place = bisect_right(self._starts, address)
        start = self._starts[place - 1] if place else 0
        if start in self._promised:
            raise Misuse("memory is used by a stream that did not wait for it to be there")
        if place and address + nbytes <= start + self.memory[start].size:
            return self.memory[start][address - start : address - start + nbytes]
        raise Misuse(f"{nbytes} bytes at {address:#x} are not in memory that is there")

    def take(self, nbytes: int) -> int:
        """The address of new memory."""
        if nbytes < 1:
            raise FakeCudaError("CUDA_ERROR_INVALID_VALUE: no bytes")
        whole = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        held = whole[start : start + nbytes]
        held.fill(FRESH)
        address = held.ctypes.data
        self.memory[address] = held
        insort(self._starts, address)
        return address

    def promise(self, address: int, stream: FakeStream) -> None:
        """Memory is there when that stream has come so far."""
        self._promised.add(address)
        stream.put(lambda: self._promised.discard(address))

    def free(self, address: int) -> None:
        """Give memory back."""
        if address not in self.memory:
            raise Misuse(f"{address:#x} is given back, and is not there")
        self.memory.pop(address).fill(FREED)
        self._starts.remove(address)

    def _from_handle(
        self, ptr: int, size: int, mr: None = None, owner: object = None, *, stream: None = None
    ) -> FakeBuffer:
        assert mr is None
        assert stream is None
        return FakeBuffer(self, ptr, size, None, owner)

    def _view_of(
        self, buffer: FakeBuffer, shape: tuple[int, ...], strides: None = None, *, dtype: np.dtype[Any]
    ) -> FakeView:
        self.called("StridedMemoryView.from_buffer")
        return FakeView(buffer, shape, dtype)


class FakeDriver:
    """What is used of cuda.bindings.driver. The context of a GPU is its number and 1000."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def cuCtxGetCurrent(self) -> tuple[int, int | None]:  # noqa: N802
        return 0, None if self._cuda.here is None else self._cuda.here + 1000

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:  # noqa: N802
        self._cuda.current[threading.get_ident()] = context - 1000
        return (0,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:  # noqa: N802
        assert flags == 0
        found = next((known for known in self._cuda.events if known.handle == event), None)
        if found is None:
            return (400,)
        self._cuda.streams[stream].wait(found)
        return (0,)


class FakeDevice:
    """One of two GPUs."""

    compute_capability = (8, 9)

    def __init__(self, cuda: FakeCuda, number: int) -> None:
        if number not in (0, 1):
            raise ValueError(f"device_id must be within [0, 2), got {number}")
        self._cuda, self.device_id = cuda, number

    def set_current(self) -> None:
        self._cuda.current[threading.get_ident()] = self.device_id
        self._cuda.called("Device.set_current")

    def create_stream(self, *, options: StreamOptions | None = None) -> FakeStream:
        self._cuda.called("Device.create_stream", self.device_id)
        return FakeStream(self._cuda, options)


class FakePool(Owned):
    """A memory pool on the device."""

    def __init__(self, cuda: FakeCuda, options: Any) -> None:
        assert options is not None, "without options it would be the device's common pool"
        cuda.called("DeviceMemoryResource")
        super().__init__(cuda, "pool")

    def allocate(self, size: int, *, stream: FakeStream) -> FakeBuffer:
        self.cuda.called("DeviceMemoryResource.allocate", self.device)
        stream.idle("allocate")
        if size > self.cuda.room:
            raise FakeCudaError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to")
        self.cuda.room -= size
        buffer = FakeBuffer(self.cuda, self.cuda.take(size), size, "device")
        self.cuda.promise(buffer.handle, stream)
        return buffer


class FakePinned:
    """The allocator of pinned host memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def allocate(self, size: int, *, stream: None = None) -> FakeBuffer:
        self._cuda.called("LegacyPinnedMemoryResource.allocate")
        return FakeBuffer(self._cuda, self._cuda.take(size), size, "pinned")


class FakeBuffer(Owned):
    """Memory; of no kind: a view, which frees nothing."""

    def __init__(
        self, cuda: FakeCuda, address: int, size: int, kind: str | None, owner: object = None
    ) -> None:
        super().__init__(cuda, kind or "view")
        self.handle, self.size, self.owner = address, size, owner
        if kind:
            cuda.allocated[address] = kind, size

    def copy_from(self, src: FakeBuffer, *, stream: FakeStream) -> None:
        self.cuda.called("Buffer.copy_from", stream.device)
        if src.size != self.size:
            raise ValueError("buffer sizes mismatch between src and dst")
        target, source, size, cuda = self.handle, src.handle, self.size, self.cuda
        cuda.trace.append(("copy", stream.handle, target, source, size))
        stream.put(lambda: np.copyto(cuda.bytes_at(target, size), cuda.bytes_at(source, size)))

    def fill(self, value: int, *, stream: FakeStream) -> None:
        self.cuda.called("Buffer.fill", stream.device)
        address, size, cuda = self.handle, self.size, self.cuda
        stream.put(lambda: cuda.bytes_at(address, size).fill(value))

    def _free(self) -> None:
        if self.kind == "device":
            self.cuda.room += self.size
        if self.kind != "view":
            self.cuda.free(self.handle)
            del self.cuda.allocated[self.handle]


class FakeView:
    """What StridedMemoryView shows."""

    def __init__(self, buffer: FakeBuffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        assert buffer.size == dtype.itemsize * int(np.prod(shape))
        self.exporting_obj, self.ptr, self.shape, self.dtype = buffer, buffer.handle, shape, dtype
        self.strides = None  # as for all that is contiguous

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.exporting_obj.owner.device

    def __dlpack__(self, **_: Any) -> object:
        return self
