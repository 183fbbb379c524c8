"""The GPU through cuda-core: the device, streams, events and captured graphs. Memory is `cuda_memory`'s.

Whatever cuda-core or the driver raises leaves here as `MemoryShortError` or `DeviceError`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Mark
from forcingkv.runtime.engines import cuda_core
from forcingkv.runtime.faults import DeviceError, MemoryShortError, SessionError, ran_out_of_memory
from forcingkv.runtime.footprint import readable


def fault(doing: str, message: str, nbytes: int | None = None) -> SessionError:
    """The error for what could not be done: what (after "could not"), what the driver or TensorRT said, and
    the bytes that it needed, where they are known."""
    if ran_out_of_memory(message):
        needs = "" if nbytes is None else f" for {readable(nbytes)} more ({nbytes} bytes)"
        return MemoryShortError(f"could not {doing}: there is not enough memory{needs} ({message})")
    return DeviceError(f"could not {doing} ({message})")


def close_all(doing: str, closes: Iterable[Callable[[], None]]) -> None:
    """Call them all, in order, whatever they raise; then raise the first error as one of ours."""
    first: Exception | None = None
    for close in closes:
        try:
            close()
        except Exception as error:
            first = first or error
    if isinstance(first, SessionError):
        raise first
    if first is not None:
        raise fault(doing, str(first)) from first


class Gpu:
    """The first GPU.

    Attributes:
        core: the module `cuda.core`.
    """

    def __init__(self) -> None:
        """Make it current in this thread.

        Raises MissingExtraError without cuda-core, DeviceError where the GPU cannot be used.
        """
        self.core = cuda_core()
        self._threads = threading.local()
        with self.asked("use the GPU"):
            pass

    @property
    def device(self) -> Any:
        """This thread's `cuda.core.Device`."""
        return self.core.Device(0)

    @contextmanager
    def asked(self, doing: str, nbytes: int | None = None) -> Iterator[None]:
        """Around everything that is asked of CUDA and TensorRT; `doing` and `nbytes` are those of `fault`.

        The device is current in it, whatever thread this is, and errors become those of `faults`.
        """
        try:
            if not getattr(self._threads, "current", False):
                self.device.set_current()
                self._threads.current = True
            yield
        except (InputError, SessionError):
            raise
        except Exception as error:  # CUDAError has no public name, and TensorRT has its own
            raise fault(doing, f"{type(error).__name__}: {error}", nbytes) from error


class CudaMark:
    """An event in a stream."""

    def __init__(self, gpu: Gpu, event: Any) -> None:
        self._gpu, self.event = gpu, event

    def wait(self) -> None:
        """Wait until the stream has come here. Raises DeviceError where work before it failed."""
        with self._gpu.asked("finish the work that was asked for"):
            self.event.sync()

    def since(self, earlier: Mark) -> float:
        """Seconds of the GPU's clock between the two; waits for both, which is soon done if they were
        reached."""
        assert isinstance(earlier, CudaMark)
        earlier.wait()
        self.wait()
        with self._gpu.asked("take the time"):
            milliseconds: float = self.event - earlier.event
        return milliseconds / 1000


class CudaQueue:
    """A stream of its own.

    Attributes:
        handle: of the stream, for TensorRT.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        # Whoever waits for an event sleeps: frames may have to be encoded on that core.
        self._timed = gpu.core.EventOptions(timing_enabled=True, blocking_sync=True)
        self._marks: weakref.WeakSet[CudaMark] = weakref.WeakSet()
        with gpu.asked("make a stream"):
            self._stream = gpu.device.create_stream()
            self.handle = int(self._stream.handle)

    @property
    def stream(self) -> Any:
        """cuda-core's stream. Raises DeviceError once it is closed: what is put into a closed one would go
        to CUDA's default stream."""
        if self._stream is None:
            raise DeviceError("the lane is closed")
        return self._stream

    def mark(self) -> CudaMark:
        with self._gpu.asked("mark a place in a stream"):
            mark = CudaMark(self._gpu, self.stream.record(options=self._timed))
        self._marks.add(mark)
        return mark

    def sync(self) -> None:
        """Wait for all that was put in."""
        with self._gpu.asked("finish the work that was asked for"):
            self.stream.sync()

    def close(self) -> None:
        """Give the stream and its marks back."""
        stream, self._stream = self.stream, None
        close_all("give a stream back", [*(mark.event.close for mark in self._marks), stream.close])


class CudaGraph:
    """Work that was captured once, to be launched as a whole."""

    def __init__(self, gpu: Gpu, queue: CudaQueue, work: Callable[[], None], what: str) -> None:
        """Capture what `work` puts into a queue. Nothing of it is done yet; `what` is its name in messages.

        The work must have been done before, so that nothing is loaded or allocated while it is captured.
        """
        self._gpu, self._what = gpu, what
        with gpu.asked(f"capture {what} as a CUDA graph"):
            builder = queue.stream.create_graph_builder()
            try:
                # The relaxed mode, cuda-core's own: in the others the stream loses its capture when Python
                # happens to free some other session's memory meanwhile.
                builder.begin_building()
                work()
                self._graph = builder.end_building().complete()
            except BaseException:
                with suppress(Exception):  # the first error is the one to show
                    builder.close()
                raise
            builder.close()

    def launch(self, queue: CudaQueue) -> None:
        """Do the work, in that queue's order."""
        with self._gpu.asked(f"launch the CUDA graph of {self._what}"):
            self._graph.launch(queue.stream)

    def close(self) -> None:
        """Give the graph back."""
        self._graph.close()
