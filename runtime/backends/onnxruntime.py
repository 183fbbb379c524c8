"""ONNX Runtime: on the CPU, or on the GPU where its CUDA provider is installed.

Arrays are numpy's. What a session carries from pass to pass (caches, keys and values of the prompt) lies in
the GPU's memory where there is one (`StateTensor`); the rest goes in and out by ONNX Runtime itself.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Array, Lane, LaneOptions, Mark, Pass, Queue, Tensor
from forcingkv.runtime.backends.linked_graphs import graph_and_folder
from forcingkv.runtime.bundle import GRAPHS, Bundle
from forcingkv.runtime.faults import DeviceError, MemoryShortError, SessionError, ran_out_of_memory
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.memory import available_bytes, trim
from forcingkv.runtime.spec import Dtype
from forcingkv.runtime.threads import chosen_threads

FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for graphs that it is given by content."""
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
ON_THE_CPU = "onnxruntime-cpu"
"""Name of the backend that leaves a GPU alone."""
WAY_ROUND = (
    f"choose --backend {ON_THE_CPU} to run on the CPU, or mend CUDA: its version is to be the one that this"
    " onnxruntime-gpu was built for"
)
OLDEST = (1, 24, 1)
"""Before this version a graph could name any file of the user as its weights: a bundle of a stranger could
have shown a private file as video."""
LARGE_ACTIVATIONS = 256_000_000
"""Bytes of a pass up to which its memory is always kept for the next one: pages that are taken anew each time
cost 17% of the demo model's time (docs/decisions/0014)."""
AMPLE_ROOM = 2.0
"""Where there is as many times the memory that a session needs, it is kept for larger passes too: that saves
10% of a pass at 480P, and takes up to 1.7 times the activations (docs/decisions/0017)."""


def open_lane(bundle: Bundle, options: LaneOptions) -> OnnxLane:
    """Load the graphs of a bundle, for the CUDA provider where this ONNX Runtime has it, else for the CPU's;
    by the name `onnxruntime-cpu` always for the CPU's.

    Raises InputError for a bundle that was made for TensorRT, and for an ONNX Runtime that is too old;
    DeviceError where the provider does not start: no other is taken in its place.
    """
    options.refuse("device", "dtype", "provider", "cuda_graphs", "compiled")
    if bundle.manifest.compute != "float32":
        raise InputError(
            f"has graphs that compute in {bundle.manifest.compute}, for TensorRT",
            where=str(bundle.path),
            expected="float32, for ONNX Runtime",
            hint="Export the model with --target onnx, or choose --backend tensorrt or tensorrt-rtx.",
        )
    if tuple(map(int, re.findall(r"\d+", ort.__version__)[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise InputError(
            f"has the version {ort.__version__}, in which a bundle can read files outside its folder",
            where="onnxruntime",
            expected=f"{oldest} or newer",
            hint=f"Install it with: pip install 'onnxruntime>={oldest}'",
        )
    provider = CUDA if options.backend != ON_THE_CPU and CUDA in ort.get_available_providers() else CPU
    threads = chosen_threads(options.threads).number
    ample = available_bytes() >= AMPLE_ROOM * sum(footprint(bundle.manifest, bundle.plan).values())
    graphs = {}
    for graph in GRAPHS:
        kept = ample or (bundle.manifest.graphs[graph].activation_bytes or 0) < LARGE_ACTIVATIONS
        graphs[graph] = OnnxGraph(
            bundle.graph(graph),
            threads,
            provider,
            arena=kept,
            weights=bundle.weights(graph),
            content=bundle.graph_content(graph),
        )
    return OnnxLane(graphs, "cuda" if provider == CUDA else "cpu", threads)


class OnnxGraph:
    """One graph, loaded."""

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        provider: str = CPU,
        *,
        arena: bool = True,
        weights: Path | None = None,
        content: bytes | None = None,
    ) -> None:
        """Load an ONNX file.

        Args:
            path: the file.
            threads: CPU threads; None: as `cpu_threads` says.
            provider: what runs the nodes.
            arena: whether memory of a pass is kept for the next one.
            weights: the file that its weights lie in. Either file may be a link if this is given.
            content: the file's bytes, where they were checked: they are loaded, whatever the file is by now.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised: no need to print it too
        # What a pass needs is then known before it runs, and less (docs/decisions/0014).
        options.enable_mem_pattern = options.enable_mem_reuse = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = arena
        # Bytes with the mark of its own format would be taken for that, and not for what was checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        # Each graph has a pool of its own. ONNX Runtime has one for all, but that is the process's, made once
        # for every user of ONNX Runtime, and it took 40% more CPU time (docs/decisions/0029).
        options.intra_op_num_threads = chosen_threads(threads).number
        providers = [provider] if provider == CPU else [provider, CPU]
        graph, folder = graph_and_folder(path, weights, content)
        if folder is not None:
            options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(folder))
        try:
            # Without its own way out, which is to print on standard output and to take the CPU.
            self._session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime has a class of its own for each status
            raise _fault(f"loading {path.name}", error, provider) from error
        _loaded.add(self)
        if self._session.get_providers()[0] != provider:
            what = f"ONNX Runtime has {provider}, but could not start it for {path.name}"
            raise DeviceError(f"{what}: {WAY_ROUND}")

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> OnnxPass:
        """A pass over tensors of this module."""
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, tensor.device, 0, np.dtype(tensor.dtype), tensor.shape, tensor.address)
        return OnnxPass(self._session, binding, (inputs, outputs))

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on contiguous arrays, writing into `outputs`; outputs not named go nowhere."""
        given, taken = ({n: HostTensor(array) for n, array in arrays.items()} for arrays in (inputs, outputs))
        self.bind(given, taken).run()


_loaded: weakref.WeakSet[OnnxGraph] = weakref.WeakSet()


def _keep_in_forked_process() -> None:
    """A process that was forked has none of ONNX Runtime's threads, and to free a graph waits for them."""
    for graph in _loaded:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph._session))


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_keep_in_forked_process)


class OnnxPass:
    """A binding, kept so that nothing is bound in the loop, with the tensors whose addresses it has."""

    def __init__(self, session: ort.InferenceSession, binding: ort.IOBinding, tensors: object) -> None:
        self._session, self._binding, self._tensors = session, binding, tensors

    def run(self) -> None:
        """Raises MemoryShortError, or DeviceError for any other failure."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise _fault("a pass", error) from error


class OnnxLane:
    """The graphs, and memory of one session. All work is done at once, so its two queues are one."""

    def __init__(
        self, graphs: Mapping[str, OnnxGraph], state_device: str, threads: int | None = None
    ) -> None:
        self._graphs, self._state_device, self._threads = graphs, state_device, threads
        count = chosen_threads(threads).number
        on_cpu = f"the CPU, {count} thread{'s'[: count > 1]}"
        self.runs_on = on_cpu if state_device == "cpu" else "the GPU (CUDA provider of ONNX Runtime)"
        self.main: Queue = HostQueue()
        self.side: Queue = self.main
        self.lookahead = 0

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        if state and self._state_device != "cpu":
            return StateTensor.make(shape, dtype, self._state_device)
        try:
            return HostTensor(np.empty(shape, np.dtype(dtype)))
        except MemoryError as error:
            raise MemoryShortError(f"no memory for a tensor of {dtype} {shape}") from error

    def cache(self, plan: CachePlan, dtype: Dtype) -> CacheBuffers:
        return CacheBuffers(plan, self, dtype)

    def bind(
        self, graph: str, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Pass:
        # ONNX Runtime runs every node, whatever is asked for: an output without a place need not take memory.
        return self._loaded()[graph].bind(inputs, outputs)

    def warm(self, passes: Callable[[], None]) -> None:
        """Nothing is slower at first."""

    def sibling(self) -> Lane:
        return type(self)(self._loaded(), self._state_device, self._threads)

    def close(self) -> None:
        """ONNX Runtime gives memory back with its last graph; the C library, where it is asked to."""
        self._graphs = {}
        trim()

    def _loaded(self) -> Mapping[str, OnnxGraph]:
        graphs = self._graphs  # once: another thread may close the lane
        if not graphs:
            raise DeviceError("the lane is closed")
        return graphs


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

    device = "cpu"

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

    def shared(self) -> Array:
        return self._array


class StateTensor:
    """A view of the start of an OrtValue: memory on the provider's device, which the host seldom touches.

    Reading and writing copy the whole OrtValue.
    """

    def __init__(self, value: ort.OrtValue, device: str, shape: tuple[int, ...], dtype: str) -> None:
        self._value, self.device, self.shape, self.dtype = value, device, shape, dtype
        self.nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.address = value.data_ptr()

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: str, device: str) -> Self:
        """New memory. Raises MemoryShortError where the device has none left."""
        try:
            size = (max(1, math.prod(shape)),)
            value = ort.OrtValue.ortvalue_from_shape_and_type(size, np.dtype(dtype), device, 0)
        except Exception as error:  # of ONNX Runtime's many classes
            raise MemoryShortError(
                f"no memory on {device} for a tensor of {dtype} {shape} ({error})"
            ) from error
        return cls(value, device, shape, dtype)

    def first(self, shape: tuple[int, ...]) -> StateTensor:
        return StateTensor(self._value, self.device, shape, self.dtype)

    def rows(self, start: int, stop: int) -> StateTensor:
        raise DeviceError("state is not read by rows")

    def write(self, array: Array, queue: Queue) -> None:
        whole = self._value.numpy()
        whole[: array.size] = np.ravel(array)
        self._value.update_inplace(whole)

    def clear(self, queue: Queue) -> None:
        self.write(np.zeros(self.shape, np.dtype(self.dtype)), queue)

    def fetch(self, queue: Queue) -> Fetched:
        return Fetched(self._value.numpy()[: math.prod(self.shape)].reshape(self.shape).copy())

    def shared(self) -> ort.OrtValue:
        return self._value


def _fault(doing: str, error: Exception, provider: str = CPU) -> SessionError:
    """ONNX Runtime's error as one of ours. `provider` is what was to be started."""
    text = " ".join(str(error).split())
    if ran_out_of_memory(error):
        return MemoryShortError(f"ONNX Runtime ran out of memory in {doing} ({text})")
    way_round = f": {WAY_ROUND}" if provider != CPU else ""
    return DeviceError(f"ONNX Runtime failed in {doing} ({text}){way_round}")
