"""The GPU through cuda-core: the device, streams, events and captured graphs. Memory is `cuda_memory`'s.

Whatever cuda-core or the driver raises leaves `Gpu.asked` as `MemoryShortError` or `DeviceError`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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


class Gpu:
    """The first GPU, as one lane uses it until it is closed.

    Attributes:
        core: the module `cuda.core`.
        held: gives back what was taken, when the lane is closed.
    """

    def __init__(self) -> None:
        """Make it current in this thread.

        Raises MissingExtraError without cuda-core, DeviceError where the GPU cannot be used.
        """
        self.core = cuda_core()
        self._threads, self._closed = threading.local(), False
        self.held, self._streams = ExitStack(), list[Any]()
        with self.asked("use the GPU"):
            pass

    @property
    def device(self) -> Any:
        """This thread's `cuda.core.Device`."""
        return self.core.Device(0)

    @contextmanager
    def asked(self, doing: str, nbytes: int | None = None) -> Iterator[None]:
        """Around everything that is asked of CUDA and TensorRT; `doing` and `nbytes` are those of `fault`.

        The device is current in it, whatever thread this is, and errors become those of `faults`. Raises
        DeviceError once the lane is closed: what is put into a closed stream would go to CUDA's default one.
        """
        try:
            if self._closed:
                raise DeviceError("the lane is closed")
            if not getattr(self._threads, "current", False):
                self.device.set_current()
                self._threads.current = True
            yield
        except (InputError, SessionError):
            raise
        except Exception as error:  # CUDAError has no public name, and TensorRT has its own
            raise fault(doing, f"{type(error).__name__}: {error}", nbytes) from error

    def stream(self) -> Any:
        """A stream of cuda-core's, until the lane is closed."""
        with self.asked("make a stream"):
            stream = self.device.create_stream()
        self.held.callback(stream.close)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        """Wait for the streams, then give back all that is held, the newest first.

        What fails does not keep the rest. Raises the last error.
        """
        if not self._closed:
            with self.asked("close the lane"):
                self._closed = True
                for stream in self._streams:
                    self.held.callback(stream.sync)
                self.held.close()


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
        stream: cuda-core's, to be used within `Gpu.asked`.
        handle: of the stream, for TensorRT.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.stream = gpu, gpu.stream()
        self.handle = int(self.stream.handle)
        # Whoever waits for an event sleeps: frames may have to be encoded on that core.
        self._timed = gpu.core.EventOptions(timing_enabled=True, blocking_sync=True)
        self._marks: weakref.WeakSet[CudaMark] = weakref.WeakSet()
        gpu.held.callback(self._close_marks)

    def mark(self) -> CudaMark:
        with self._gpu.asked("mark a place in a stream"):
            mark = CudaMark(self._gpu, self.stream.record(options=self._timed))
        self._marks.add(mark)
        return mark

    def sync(self) -> None:
        """Wait for all that was put in."""
        with self._gpu.asked("finish the work that was asked for"):
            self.stream.sync()

    def captured(self, work: Callable[[], None], what: str) -> Callable[[], None]:
        """Capture what `work` puts into the queue as a CUDA graph; `what` is its name in messages.

        What comes back does it all, each time it is called; capturing does nothing of it. The work must have
        been done before, so that nothing is loaded or allocated meanwhile.
        """
        with self._gpu.asked(f"capture {what} as a CUDA graph"):
            builder = self.stream.create_graph_builder()
            try:
                # The relaxed mode, cuda-core's own: in the others the stream loses its capture when Python
                # happens to free some other session's memory meanwhile.
                builder.begin_building()
                work()
                graph = builder.end_building().complete()
                self._gpu.held.callback(graph.close)
            except BaseException:
                with suppress(Exception):  # the first error is the one to show
                    builder.close()
                raise
            builder.close()

        def launch() -> None:
            with self._gpu.asked(f"launch the CUDA graph of {what}"):
                graph.launch(self.stream)

        return launch

    def _close_marks(self) -> None:
        for mark in self._marks:
            mark.event.close()
