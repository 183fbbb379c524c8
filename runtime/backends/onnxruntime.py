"""ONNX Runtime: on the CPU, or on the GPU where its CUDA provider is installed.

Arrays are numpy's. What a session carries from pass to pass (caches, keys and values of the prompt) lies in
the GPU's memory where there is one (`ort_state`); the rest goes in and out by ONNX Runtime itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Array, Lane, Mark, Pass, Program, Queue, Tensor
from forcingkv.runtime.bundle import GRAPHS, Bundle
from forcingkv.runtime.faults import DeviceError, MemoryShortError, SessionError
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.memory import available_bytes, give_back

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
LARGE_ACTIVATIONS = 256_000_000
"""Bytes of a pass up to which its memory is always kept for the next one: pages that are taken anew each time
cost 17% of the demo model's time (docs/decisions/0014)."""
AMPLE = 2.0
"""Where there is as many times the memory that a session needs, it is kept for larger passes too: that saves
10% of a pass at 480P, and takes up to 1.7 times the activations (docs/decisions/0017)."""
SHORT = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "cudaerrormemoryallocation")
"""What ONNX Runtime's messages hold, in small letters, where memory was short."""


class OnnxGraph:
    """One graph, loaded.

    Args:
        path: the ONNX file.
        threads: of a pass; None: as many as ONNX Runtime sees fit.
        provider: what runs it.
        arena: whether memory of a pass is kept for the next one.
    """

    def __init__(
        self, path: Path, threads: int | None = None, provider: str = CPU, *, arena: bool = True
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised: no need to print it too
        # What a pass needs is then known before it runs, and less (docs/decisions/0014).
        options.enable_mem_pattern = options.enable_mem_reuse = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = arena
        if threads:
            options.intra_op_num_threads = threads
        providers = [provider] if provider == CPU else [provider, CPU]
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime has a class of its own for each status
            raise _fault(f"loading {path.name}", error) from error
        if self._session.get_providers()[0] != provider:
            raise DeviceError(f"ONNX Runtime has {provider}, but could not start it for {path.name}")

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
        """The binding of tensors, for `run_bound`."""
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, tensor.device, 0, np.dtype(tensor.dtype), tensor.shape, tensor.address)
        for name, tensor in outputs.items():
            binding.bind_output(name, tensor.device, 0, np.dtype(tensor.dtype), tensor.shape, tensor.address)
        return binding

    def run_bound(self, binding: Any) -> None:
        """Run on what was bound. Raises MemoryShortError, or DeviceError for any other failure."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _fault("a pass", error) from error

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on contiguous arrays, writing into `outputs`; outputs not named go nowhere."""
        given, taken = ({n: HostTensor(array) for n, array in arrays.items()} for arrays in (inputs, outputs))
        self.run_bound(self.bind(given, taken))


@dataclass(frozen=True)
class HostMark:
    """The time at which work was done."""

    seconds: float

    def wait(self) -> None:
        pass

    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self.seconds - earlier.seconds


class HostQueue:
    """Work that is done at once."""

    def mark(self) -> HostMark:
        return HostMark(time.perf_counter())

    def wait(self, mark: Mark) -> None:
        pass


@dataclass(frozen=True)
class Fetched:
    """A copy that was made at once."""

    held: Array

    def array(self) -> Array:
        return self.held


class HostTensor:
    """A numpy array."""

    device = "cpu"

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype.name, array.nbytes
        self.address = array.ctypes.data

    def first(self, shape: tuple[int, ...]) -> HostTensor:
        return HostTensor(self._array.reshape(-1)[: int(np.prod(shape))].reshape(shape))

    def rows(self, start: int, stop: int) -> HostTensor:
        return HostTensor(self._array[start:stop])

    def write(self, array: Array, queue: Queue) -> None:
        self._array[...] = array

    def clear(self, queue: Queue) -> None:
        self._array.fill(0)

    def fetch(self, queue: Queue) -> Fetched:
        return Fetched(self._array.copy())

    def shared(self) -> npt.NDArray[Any]:
        return self._array


class OnnxPass:
    """A binding, kept so that nothing is bound in the loop."""

    def __init__(self, graph: OnnxGraph, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self._graph, self._held = graph, (inputs, outputs)
        self._binding = graph.bind(inputs, outputs)

    def run(self, queue: Queue) -> None:
        self._graph.run_bound(self._binding)


class OnnxProgram:
    """A graph as the protocol has it."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph

    def bind(self, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Pass:
        # ONNX Runtime runs every node, whatever is asked for: what has a place need not take memory.
        return OnnxPass(self._graph, inputs, outputs)


class OnnxLane:
    """Memory of one session."""

    def __init__(self, graphs: Mapping[str, OnnxGraph], state_device: str) -> None:
        self._graphs, self._state_device = graphs, state_device
        self.main: Queue = HostQueue()
        self.side: Queue = self.main
        self.lookahead = 0

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        if state and self._state_device != "cpu":
            from forcingkv.runtime.backends.ort_state import OrtStateTensor

            return OrtStateTensor.make(shape, dtype, self._state_device)
        try:
            return HostTensor(np.empty(shape, np.dtype(dtype)))
        except MemoryError as error:
            raise MemoryShortError(f"no memory for a tensor of {dtype} {shape}") from error

    def program(self, graph: str) -> Program:
        return OnnxProgram(self._graphs[graph])

    def close(self) -> None:
        """Nothing to wait for; arrays go with those that hold them."""
        self._graphs = {}


class OnnxRuntimeBackend:
    """The graphs of a bundle in ONNX Runtime.

    Attributes:
        provider: what runs them: the CUDA provider where this ONNX Runtime has it, else the CPU's.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        compute = bundle.manifest.compute
        if compute != "float32":
            raise InputError(
                f"its graphs compute in {compute}, for TensorRT",
                where=str(bundle.path),
                expected="float32, for ONNX Runtime",
                hint="Export the model with --target onnx, or choose --backend tensorrt or tensorrt-rtx.",
            )
        self.provider = CUDA if CUDA in ort.get_available_providers() else CPU
        ample = available_bytes() >= AMPLE * sum(footprint(bundle.manifest, bundle.plan).values())
        self._graphs = {}
        for name in GRAPHS:
            kept = ample or (bundle.manifest.graphs[name].activation_bytes or 0) < LARGE_ACTIVATIONS
            self._graphs[name] = OnnxGraph(bundle.graph(name), threads, self.provider, arena=kept)

    def lane(self) -> Lane:
        return OnnxLane(self._graphs, "cuda" if self.provider == CUDA else "cpu")

    def close(self) -> None:
        """ONNX Runtime gives the memory back with its graphs; the C library, where it is asked to."""
        self._graphs = {}
        give_back()


def _fault(doing: str, error: Exception) -> SessionError:
    """ONNX Runtime's error as one of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in SHORT):
        return MemoryShortError(f"ONNX Runtime ran out of memory in {doing} ({text})")
    return DeviceError(f"ONNX Runtime failed in {doing} ({text})")
