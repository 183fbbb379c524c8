"""What runs graphs: a small protocol, and one module for each backend.

A `Lane` is what one session runs with: the graphs of a bundle, memory, and queues of work. Further lanes on
the same weights are siblings of the first, and the weights go with the last of them. Work goes into a queue
and is done in the queue's order; on a CPU it is done at once. Only `Mark.wait` and `Fetch.array` wait for it.

A session asks for all its memory when it opens, binds each pass to it once, and then only writes inputs,
runs passes and fetches what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.spec import Dtype

if TYPE_CHECKING:
    from forcingkv.runtime.kv.buffers import KvCache
    from forcingkv.runtime.kv.plan import CachePlan

Array = npt.NDArray[Any]
BACKENDS = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-cpu": "onnxruntime",
    "torch": "torch_lane",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt",
}
"""Name of each backend -> the module in this folder that runs it, which has a function
`open_lane(bundle, options)`. `onnxruntime` takes a GPU where this ONNX Runtime was built for one;
`onnxruntime-cpu` never does. `torch`
runs any bundle, also one without graphs."""


@dataclass(frozen=True)
class LaneOptions:
    """What a lane is asked for. A backend refuses what it has no use for, but `threads`."""

    backend: str = "onnxruntime"
    """A name of `BACKENDS`."""
    threads: int | None = None
    """Of a CPU; None: as `threads.cpu_threads` says."""
    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`, ...; None: the backend's own choice, which `Lane.runs_on` tells."""
    dtype: Dtype | None = None
    """What to compute in, for backends that can choose; None: what the bundle was exported for."""
    provider: str | None = None
    """ONNX Runtime: what runs the graphs, `cpu`, `cuda`, ...; None: its own choice."""
    cuda_graphs: bool = False
    """Whether passes that come again are captured and replayed."""
    compiled: bool = False
    """Whether the model is compiled before it runs (`torch.compile`)."""
    warm: bool = True
    """Whether a session runs what is slow at first, on backends that have such, when it opens."""

    def refuse(self, *names: str) -> None:
        """Raise InputError where one of those fields, of no use to this backend, was set."""
        for name in names:
            if getattr(self, name) not in (None, False):
                raise InputError(
                    f"is nothing that the backend {self.backend} has a use for",
                    where=_SPELLED[name],
                    hint=f"Leave it out, or choose another backend: {', '.join(BACKENDS)}.",
                )


_SPELLED = {
    "device": "--device",
    "dtype": "--dtype",
    "provider": "--provider",
    "cuda_graphs": "--cuda-graphs",
    "compiled": "--compile",
}
"""How the command line spells a field of `LaneOptions`."""


class Mark(Protocol):
    """A place in a queue."""

    def wait(self) -> None:
        """Wait until the queue has come here."""

    def since(self, earlier: Mark) -> float:
        """Seconds from an earlier mark to this one. Both must have been reached."""


class Queue(Protocol):
    """Work that is done in order. Queues know nothing of each other: the host hands on what goes between."""

    def mark(self) -> Mark:
        """Mark this place."""

    def gate(self, after: object) -> Callable[[], None]:
        """Note where somebody else's work on the same device stands; what comes back lets all that is put
        into this queue after it was called wait for that.

        Args:
            after: a stream of any library (what was put into it so far counts), or an event.

        Raises InputError for anything else, and where work is done on the host.
        """


class Fetch(Protocol):
    """A copy of a tensor, on its way to the host."""

    def array(self) -> Array:
        """Wait for it: an array of the caller's own. bfloat16 comes as its bits, uint16."""


class Tensor(Protocol):
    """An array in a lane's memory.

    Attributes:
        shape: of the array.
        dtype: its name: `float32`, `bfloat16`, `int32`, `uint8`, ...
        nbytes: its size.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    def first(self, shape: tuple[int, ...]) -> Tensor:
        """The same memory from its start, in a shape that needs no more of it."""

    def rows(self, start: int, stop: int) -> Tensor:
        """The same memory, those places of the first dimension."""

    def write(self, array: Array, queue: Queue) -> None:
        """Fill it in that queue's order. The array may be changed once this returns."""

    def clear(self, queue: Queue) -> None:
        """Fill it with zeros in that queue's order."""

    def fetch(self, queue: Queue) -> Fetch:
        """Copy it to the host in that queue's order."""

    def copy_from(self, source: Any, queue: Queue) -> None:
        """Take what another tensor of this lane holds, of the same dtype and size, in that queue's order.

        Of state only where `Lane.copies` says so."""

    def shared(self) -> Any:
        """Something with `__dlpack__` on the same memory, for frames that stay where they are."""


class Pass(Protocol):
    """A graph bound to memory."""

    def run(self) -> None:
        """Run it, in the order of its queue."""


class Lane(Protocol):
    """What one session runs with. Once it is closed, `bind` and `sibling` raise DeviceError.

    Attributes:
        main: the queue of `prompt` and `step`.
        side: the queue of decoding and encoding; the same as `main` where nothing runs at the same time.
        runs_on: what it runs on, in words for people.
        lookahead: how many chunks to begin before the frames of the one before are waited for.
        recaches: whether it binds `recache`: a switch of the prompt may encode newest frames anew.
        in_place: whether what a pass of decoding carries may be written where it is read: all of it is read
            before any is written.
        copies: whether tensors of state take what others hold (`Tensor.copy_from`).
    """

    main: Queue
    side: Queue
    lookahead: int
    recaches: bool
    in_place: bool
    copies: bool
    runs_on: str

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        """Memory for an array; its contents are not defined.

        `state` says that the host touches it only to save and restore it.

        Raises MemoryShortError where there is not enough.
        """

    def cache(self, plan: CachePlan, dtype: Dtype) -> KvCache:
        """Memory for keys and values of a session that computes in `dtype`.

        Raises MemoryShortError where there is not enough.
        """

    def bind(
        self, graph: str, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Pass:
        """A pass over those tensors.

        Args:
            graph: one of the bundle's; `recache` where the lane has it.
            phase: index of the cache's phase, whose static shapes the tensors have; 0 for graphs that have
                only one; of `recache` that after it (`KvCache.phase_after`): the one before it is the cache's
                when it is bound.
            inputs: all of the graph's inputs.
            outputs: where outputs go. All that are given may be written to, whether they are needed or
                not. Those that are left out go nowhere.
        """

    def warm(self, passes: Callable[[], None]) -> None:
        """Run `passes`, which runs a pass of each phase, if the first of a kind is slower here than those
        after it, and wait for them; else do nothing."""

    def sibling(self) -> Lane:
        """Another lane on the same weights, with memory and queues of its own."""

    def close(self) -> None:
        """Wait for the queues and give the memory back; the weights too, with the last lane on them."""


def default_backend(bundle: Bundle, *, torch_is_asked: bool) -> str:
    """What runs a bundle where nobody says what: ONNX Runtime, if it can."""
    return "torch" if torch_is_asked or not bundle.manifest.has_graphs else "onnxruntime"


def as_run(bundle: Bundle, options: LaneOptions) -> Bundle:
    """The bundle as that backend runs it: torch makes of it what it computes in, and needs no graphs."""
    return bundle.computing_in(options.dtype) if options.backend == "torch" else bundle


def open_backend(bundle: Bundle, options: LaneOptions) -> Lane:
    """Load the graphs of an opened bundle: the first lane on them.

    Raises:
        InputError: there is no such backend, it has no use for an option, or the bundle was not exported for
            it or for this machine.
        MissingExtraError: what it runs on is not installed.
        SessionError: it could not be started, or has too little memory.
    """
    if options.backend not in BACKENDS:
        raise InputError(
            f"there is no backend {options.backend!r}",
            where="backend",
            expected=f"one of {', '.join(BACKENDS)}",
        )
    module = import_module(f"{__name__}.{BACKENDS[options.backend]}")
    lane: Lane = module.open_lane(bundle, options)
    return lane
