"""Where torch runs: devices by name, their queues of work and free memory, and what goes wrong on them.

One code for all of them: a CPU does everything at once, CUDA and XPU have streams, MPS has one queue that is
waited for as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Mark, Queue
from forcingkv.runtime.backends.host import HostQueue
from forcingkv.runtime.devices import ADVICE, is_sticky
from forcingkv.runtime.faults import DeviceError, MemoryShortError, SessionError, ran_out_of_memory
from forcingkv.runtime.memory import available_bytes, trim
from forcingkv.runtime.spec import Dtype

KINDS = {
    "cpu": "",
    "cuda": "a GPU of NVIDIA or AMD, and a torch that was built for it",
    "mps": "a Mac with Apple's own chip",
    "xpu": "a GPU of Intel, and a torch that was built for it",
}
"""Name of each kind of device -> what it takes."""
STREAMS = ("cuda", "xpu")
"""Kinds whose queues run beside each other."""
URGENT = -1
"""Priority of the queue that decodes: its work is short, and somebody waits for the frames."""


def find_device(name: str | None) -> torch.device:
    """The device of that name: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`, ...; None: the CPU.

    Raises InputError for a name that is none, and where this machine or this torch has no such device.
    """
    if name is None:
        return torch.device("cpu")
    found = re.fullmatch(r"([a-z]+)(?::(\d{1,3}))?", name)
    if found is None or found[1] not in KINDS or (found[1] in ("cpu", "mps") and found[2]):
        raise InputError(
            f"there is no device {name!r}", where="device", expected="cpu, cuda, cuda:1, mps or xpu"
        )
    kind, number = found[1], int(found[2] or 0)
    if kind == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(kind)
    if not module.is_available():
        raise InputError(
            f"torch {torch.__version__} finds no device {kind} here",
            where="device",
            expected=KINDS[kind],
            hint="`forcingkv doctor` says what there is. Without --device it runs on the CPU.",
        )
    if kind == "mps":
        return torch.device("mps")
    if number >= module.device_count():
        raise InputError(
            f"there is no device {name}",
            where="device",
            expected=", ".join(f"{kind}:{n}" for n in range(module.device_count())),
        )
    return torch.device(kind, number)


def describe(device: torch.device, threads: int | None) -> str:
    """The device in words, for people; `threads` are those of a CPU."""
    if threads is not None:
        return f"the CPU, {threads} thread{'s'[: threads > 1]}"
    if device.type == "mps":
        return "the GPU (mps)"
    return f"{torch.get_device_module(device).get_device_name(device)} ({device})"


def free_bytes(device: torch.device) -> int:
    """Bytes that a session on the device can take."""
    if device.type == "cpu":
        return available_bytes()
    if device.type == "mps":  # memory is one with the CPU's: as much as Metal recommends, less what is held
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
    module = torch.get_device_module(device)
    kept = module.memory_reserved(device) - module.memory_allocated(device)  # by torch, for whoever asks next
    return int(module.mem_get_info(device)[0]) + int(kept)


def give_back(device: torch.device) -> None:
    """Have torch and the C library give back what they keep of memory that nobody holds any more."""
    if device.type == "cpu":
        trim()
    else:
        with suppress(SessionError), faults("giving memory back"):  # what failed before may be told here
            torch.get_device_module(device).empty_cache()


def wait_for(device: torch.device) -> None:
    """Wait for all work on a device, whatever stream it is in."""
    if device.type != "cpu":
        with faults("waiting for the device"):
            if device.type == "mps":
                torch.mps.synchronize()
            else:
                torch.get_device_module(device).synchronize(device)


def multiplies_in(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """What products of matrices are best computed in for numbers of that dtype.

    A CPU without instructions for it multiplies bfloat16 and float16 many times slower than float32 (AVX2:
    21 against 150 GFLOP/s), so there the numbers are made float32 first. That is no less exact.
    """
    if device.type != "cpu" or compute == torch.float32:
        return compute
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[compute]
    # A torch without oneDNN does not have the question.
    known: Any = getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", None)
    return compute if known is not None and known() else torch.float32


def torch_dtype(name: Dtype) -> torch.dtype:
    """The dtype of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_of(dtype: torch.dtype) -> Dtype:
    """The name of a dtype that models compute in."""
    name: Dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    return name


class StreamMark:
    """An event in a stream."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        with faults("the work that was asked for"):
            self.event.synchronize()

    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, StreamMark)
        with faults("taking the time"):
            milliseconds: float = earlier.event.elapsed_time(self.event)
        return milliseconds / 1000


class StreamQueue:
    """A stream of its own."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._module = torch.get_device_module(device)
        with faults("making a stream"):
            self.stream: Any = self._module.Stream(device, priority=priority)

    def mark(self) -> StreamMark:
        with faults("marking a place in a stream"):
            event = self._module.Event(enable_timing=True)
            event.record(self.stream)
        return StreamMark(event)

    def gate(self, after: object) -> Callable[[], None]:
        """As in the protocol: a mark, a stream or an event of torch, a stream with `__cuda_stream__`, or the
        handle of one."""
        event: Any = after.event if isinstance(after, StreamMark) else after
        if getattr(event, "cuda_event", None) == 0:
            raise InputError("is an event that was not recorded", where="after", hint="Record it first.")
        if hasattr(event, "__cuda_stream__") and not hasattr(event, "record_event"):
            event = event.__cuda_stream__()[1]
        with faults("taking the place of another stream"):
            if isinstance(event, int) and not isinstance(event, bool):
                module = self._module
                event = module.ExternalStream(event) if event else module.default_stream(self.stream.device)
            if hasattr(event, "record_event"):
                event = event.record_event()
        if not isinstance(event, self._module.Event):
            raise InputError(
                f"is {type(after).__name__}",
                where="after",
                expected="a stream or event of torch, a stream with __cuda_stream__, or the handle of one",
            )

        def hold() -> None:
            with faults("waiting for another stream"):
                self.stream.wait_event(event)

        return hold

    def work(self) -> AbstractContextManager[Any]:
        """What is done within goes into the stream."""
        context: AbstractContextManager[Any] = self._module.stream(self.stream)
        return context

    def wait(self) -> None:
        """Wait for all that was put in."""
        with faults("the work that was asked for"):
            self.stream.synchronize()


class SyncedQueue:
    """A device with one queue, for which a mark waits (MPS)."""

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device)

    def mark(self) -> Mark:
        self.wait()
        return HostQueue().mark()

    def gate(self, after: object) -> Callable[[], None]:
        return HostQueue().gate(after)

    def work(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def wait(self) -> None:
        with faults("the work that was asked for"):
            self._module.synchronize()


class CpuQueue(HostQueue):
    """A CPU: all work is done at once."""

    def work(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def wait(self) -> None:
        """There is nothing to wait for."""


TorchQueue = StreamQueue | SyncedQueue | CpuQueue


@dataclass(frozen=True)
class Queues:
    """The queues of a lane."""

    main: TorchQueue
    side: TorchQueue

    @classmethod
    def on(cls, device: torch.device) -> Queues:
        """New ones: two where they run beside each other."""
        if device.type in STREAMS:
            return cls(StreamQueue(device), StreamQueue(device, URGENT))
        one = CpuQueue() if device.type == "cpu" else SyncedQueue(device)
        return cls(one, one)

    @property
    def beside(self) -> bool:
        """Whether they run beside each other."""
        return self.main is not self.side

    def wait(self) -> None:
        """Wait for all that was put in."""
        self.main.wait()
        self.side.wait()


def queue_of(queue: Queue) -> TorchQueue:
    """A queue as this module's own."""
    assert isinstance(queue, StreamQueue | SyncedQueue | CpuQueue)
    return queue


@contextmanager
def faults(doing: str) -> Iterator[None]:
    """Errors of torch as those of a session; `doing` is what failed, as the end of a sentence."""
    try:
        yield
    except (InputError, SessionError):
        raise
    except (RuntimeError, MemoryError) as error:  # what a device cannot do is a RuntimeError too
        text = " ".join(str(error).split())
        if ran_out_of_memory(error) or isinstance(error, torch.OutOfMemoryError):
            raise MemoryShortError(f"torch ran out of memory in {doing} ({text})") from error
        hint = f", and {ADVICE}" if is_sticky(text) else ""
        raise DeviceError(f"torch failed in {doing} ({text}){hint}") from error
