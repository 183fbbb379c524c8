"""The GPU through cuda-core: the device, streams, events and captured graphs. Memory is `cuda_memory`'s.

Whatever cuda-core or the driver raises leaves `Gpu.asked` as `MemoryShortError` or `DeviceError`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import devices
from forcingkv.runtime.backends import Mark
from forcingkv.runtime.engines import cuda_core
from forcingkv.runtime.faults import DeviceError, MemoryShortError, SessionError, ran_out_of_memory
from forcingkv.runtime.footprint import readable

LEGACY_STREAM = 1
"""CUDA's name for its default stream where a handle is asked for, of which 0 stands for none."""


def fault(doing: str, message: str, nbytes: int | None = None, device: str | None = None) -> SessionError:
    """The error for what could not be done: what (after "could not"), what the driver or TensorRT said, and
    the bytes that it needed, where they are known. A `device` that the message says is lost is noted so."""
    if devices.is_sticky(message):
        if device is not None:
            devices.note_lost(device, message)
        return DeviceError(f"could not {doing} ({message}), and {devices.ADVICE}")
    if ran_out_of_memory(message):
        needs = "" if nbytes is None else f" for {readable(nbytes)} more ({nbytes} bytes)"
        return MemoryShortError(f"could not {doing}: there is not enough memory{needs} ({message})")
    return DeviceError(f"could not {doing} ({message})")


class Gpu:
    """A GPU, as one lane uses it until it is closed.

    Attributes:
        name: `cuda:0` for the first.
        core: the module `cuda.core`.
        held: gives back what was taken, when the lane is closed.
    """

    def __init__(self, number: int = 0) -> None:
        """See that it can be used.

        Raises MissingExtraError without cuda-core, InputError for one that is too old, DeviceError where the
        GPU cannot be used, or was lost to this process.
        """
        self.number, self.name = number, f"cuda:{number}"
        self.core, self._closed = cuda_core(), False
        self.held, self._streams = ExitStack(), list[Any]()
        with self.asked("use the GPU"):
            pass

    @property
    def device(self) -> Any:
        """This thread's `cuda.core.Device`."""
        return self.core.Device(self.number)

    @contextmanager
    def asked(self, doing: str, nbytes: int | None = None) -> Iterator[None]:
        """Around everything that is asked of CUDA and TensorRT; `doing` and `nbytes` are those of `fault`.

        The device is current in it, whatever thread this is and whatever another library made current since
        the last time; afterwards the caller's device is again. Errors become those of `faults`. Raises
        DeviceError once the lane is closed (what is put into a closed stream would go to CUDA's default one),
        and for a device that was devices.
        """
        if self._closed:
            raise DeviceError("the lane is closed")
        devices.check_device(self.name)
        with self._current(doing, nbytes):
            yield

    @contextmanager
    def _current(self, doing: str, nbytes: int | None = None) -> Iterator[None]:
        try:
            with devices.current(self.device):
                yield
        except (InputError, SessionError):
            raise
        except Exception as error:  # CUDAError has no public name, and TensorRT has its own
            raise self.fault(doing, f"{type(error).__name__}: {error}", nbytes) from error

    def fault(self, doing: str, message: str, nbytes: int | None = None) -> SessionError:
        """The error for what this GPU could not do, as the function of that name; a lost GPU is noted."""
        return fault(doing, message, nbytes, self.name)

    def stream(self, priority: int | None = None) -> Any:
        """A stream of cuda-core's, until the lane is closed. The lower the priority's number, the sooner its
        work gets a place on the GPU; None: the last."""
        with self.asked("make a stream"):
            stream = self.device.create_stream(options=self.core.StreamOptions(priority=priority))
        self.held.callback(stream.close)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        """Wait for the streams, then give back all that is held, the newest first.

        What fails does not keep the rest. Raises the last error; none of a device that was lost before, of
        which nothing can be given back.
        """
        if self._closed:
            return
        self._closed, lost = True, devices.is_lost(self.name)
        for stream in self._streams:
            self.held.callback(stream.sync)
        try:
            with self._current("close the lane"):
                self.held.close()
        except SessionError:
            with suppress(Exception):  # where the device did not become current all is still there
                self.held.close()
            if not lost:
                raise


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

    def __init__(self, gpu: Gpu, priority: int | None = None) -> None:
        self._gpu, self.stream = gpu, gpu.stream(priority)
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

    def gate(self, after: object) -> Callable[[], None]:
        """As in the protocol; `after` may be a mark, cuda-core's, torch's or another stream with
        `__cuda_stream__`, an event of cuda-core or torch, or the handle of a stream."""
        with self._gpu.asked("take the place of another stream"):
            event = self._event_of(after)

        return partial(self._hold, event, after)

    def _hold(self, event: Any, after: object) -> None:
        """Wait for an event. Whoever's it is, `after` keeps it until then."""
        with self._gpu.asked("wait for another stream"):
            if isinstance(event, int):
                (status,) = import_module("cuda.bindings.driver").cuStreamWaitEvent(self.handle, event, 0)
                if int(status):
                    raise self._gpu.fault("wait for an event", str(status))
            else:
                self.stream.wait(event)

    def _event_of(self, after: object) -> Any:
        """cuda-core's event at the place of `after`, or the handle of somebody else's."""
        if isinstance(after, CudaMark):
            return after.event
        if isinstance(event := getattr(after, "cuda_event", None), int):  # torch's
            if not event:
                raise InputError("is an event that was not recorded", where="after", hint="Record it first.")
            return event
        if isinstance(after, self._gpu.core.Event):
            return after
        handle: object = after
        if hasattr(after, "__cuda_stream__"):
            handle = after.__cuda_stream__()[1]
        elif hasattr(after, "cuda_stream"):  # torch's, before it had that
            handle = after.cuda_stream
        if not isinstance(handle, int) or isinstance(handle, bool):
            raise InputError(
                f"is {type(after).__name__}",
                where="after",
                expected="a CUDA stream or event (of torch, cuda-core or anything with __cuda_stream__),"
                " or the handle of a stream",
            )
        return self._gpu.core.Stream.from_handle(handle or LEGACY_STREAM).record()

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
