"""Engines that ONNX Runtime computes, behind the API of TensorRT, on the memory of `fake_cuda`.

They compute every output in every pass, as TensorRT does, and check what TensorRT takes on trust: that every
address was set, is aligned, and has enough live memory; that shapes are the profile's; that what is written
lies apart from what is read; that activation memory is used by one stream alone.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from forcingkv.prune import launchers
from forcingkv.prune.launcher import KernelLauncher
from forcingkv.runtime import devices, preflight
from forcingkv.runtime.backends import tensorrt_contexts, tensorrt_engines
from forcingkv.runtime.bundle import CLEAN, Bundle, GraphRecord
from forcingkv.runtime.flavour import Told
from forcingkv.runtime.kv.profiles import profiles_of
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_streams import Misuse, Owned

__all__ = ["FakeContext", "FakeTensorRT", "Runner", "runners_of", "untold"]

ADDRESSES = 256
"""What addresses of inputs and outputs must be multiples of."""
Shape = tuple[int, ...]


class Runner:
    """A graph in ONNX Runtime, on addresses.

    Attributes:
        phases: for each phase the shape of every input and output.
        profiles: for each profile that the engine was built with the least and the most shape of inputs.
        sizes: the same in bytes.
        inputs: the names of the inputs.
        varied: those whose shape is not the same in all phases.
        dtypes: of inputs and outputs.
    """

    def __init__(self, bundle: Bundle, graph: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(str(bundle.graph(graph)), options, ["CPUExecutionProvider"])
        record, plan = bundle.manifest.graphs[graph], bundle.plan
        self._told = {CLEAN: np.array([True])} if record.skips_caches else {}
        record = untold(record)
        self.inputs = tuple(record.inputs)
        self.dtypes = {n: np.dtype(t.dtype) for n, t in {**record.inputs, **record.outputs}.items()}
        static = {n: t.shape for n, t in record.inputs.items() if all(type(d) is int for d in t.shape)}
        varied = [plan.phase_shapes(phase) for phase in plan.phases] if graph == "step" else [{}]
        self.varied = set(varied[0])
        self.profiles: list[dict[str, tuple[Shape, Shape]]] = [{}]
        if graph == "step":
            self.profiles = [{n: (s[0], s[2]) for n, s in one.shapes.items()} for one in profiles_of(plan)]
        self.phases = [self._all_shapes({**static, **shapes}) for shapes in varied]
        self.sizes = [
            {name: math.prod(shape) * self.dtypes[name].itemsize for name, shape in shapes.items()}
            for shapes in self.phases
        ]

    def _all_shapes(self, shapes: dict[str, Shape]) -> dict[str, Shape]:
        names = [output.name for output in self._session.get_outputs()]
        feeds = self._told | {name: np.zeros(shape, self.dtypes[name]) for name, shape in shapes.items()}
        return shapes | {n: a.shape for n, a in zip(names, self._session.run(names, feeds), strict=True)}

    def takes(self, profile: int, name: str, shape: Shape) -> bool:
        """Whether an input may have that shape in a profile."""
        least, most = self.profiles[profile][name]
        sizes = zip(least, shape, most, strict=True)
        return len(least) == len(shape) and all(low <= size <= high for low, size, high in sizes)

    def phase_of(self, shapes: Mapping[str, Shape]) -> int:
        """The phase in which the inputs that vary have those shapes."""
        given = {name: shapes.get(name) for name in self.varied}
        for number, phase in enumerate(self.phases):
            if given == {name: phase[name] for name in self.varied}:
                return number
        raise Misuse(f"the inputs have these shapes in no phase: {given}")

    def run(self, phase: int, addresses: Mapping[str, int]) -> None:
        """Compute all outputs."""
        binding = self._session.io_binding()
        for name, told in self._told.items():
            binding.bind_cpu_input(name, told)
        for name, shape in self.phases[phase].items():
            bind = binding.bind_input if name in self.inputs else binding.bind_output
            bind(name, "cpu", 0, self.dtypes[name], shape, addresses[name])
        self._session.run_with_iobinding(binding)


def untold(record: GraphRecord) -> GraphRecord:
    """The record as bundles for TensorRT have it: their graphs make all outputs in every pass."""
    return replace(record, inputs={name: tensor for name, tensor in record.inputs.items() if name != CLEAN})


def runners_of(bundle: Bundle) -> dict[str, Runner]:
    """The graphs of a bundle; to be made once, since loading takes time."""
    return {graph: Runner(bundle, graph) for graph in bundle.manifest.graph_names}


@dataclass
class FakeTensorRT:
    """Stands in for the module `trt`, and for `load_engine`.

    Attributes:
        cuda: the device.
        runners: what computes; they are not asked where `computes` is false.
        memory: the activation memory each engine needs.
        refuse_at: the index of a call, of those that TensorRT can refuse, that it refuses.
        says: what it reports then.
        refusable: how many such calls there were.
        executed: (graph, phase, stream, addresses) of every execution that was put into a stream.
        profiles: graph and phase of each -> the profile that it ran in.
        compiles: whether it is the RTX flavour, which compiles where it runs: that has caches of it, and says
            whether a stream can be captured.
        capturable: what it says then.
        uncapturable: what it raises where it is captured all the same, or None.
        compiled: what is compiled now, by (graph, phase): how often each was.
        launcher: what the plugins launch their kernels through.
        launched: that, of every execution.
    """

    cuda: FakeCuda
    runners: Mapping[str, Runner]
    computes: bool = True
    memory: Mapping[str, int] = field(
        default_factory=lambda: {"prompt": 300, "step": 5000, "decode": 700, "decode_strip": 600}
    )
    refuse_at: int | None = None
    says: str = "as the test wants it"
    refusable: int = 0
    executed: list[tuple[str, int, int, dict[str, int]]] = field(default_factory=list)
    profiles: dict[tuple[str, int], int] = field(default_factory=dict)
    users: dict[int, set[int]] = field(default_factory=dict)
    """Activation memory -> the streams it was used in."""
    compiles: bool = False
    capturable: bool = True
    uncapturable: Exception | None = None
    compiled: Counter[tuple[str, int]] = field(default_factory=Counter)
    launcher: KernelLauncher | None = None
    launched: list[KernelLauncher | None] = field(default_factory=list)
    caches: list[FakeRuntimeCache] = field(default_factory=list)
    blob_works: bool = True

    __version__ = "1.7.1"

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the fakes where the backend looks for TensorRT and CUDA."""
        monkeypatch.setitem(sys.modules, "cuda.core", self.cuda)
        if hasattr(self.cuda, "driver"):
            monkeypatch.setitem(sys.modules, "cuda.bindings.driver", self.cuda.driver)
        else:  # a real GPU, of whatever kind (`tools/gpu_check`)
            for module in (tensorrt_engines, preflight):
                monkeypatch.setattr(module, "device_sm", lambda number: 89)
        for module in (tensorrt_engines, tensorrt_contexts, preflight):
            monkeypatch.setattr(module, "trt", self)
        for module in (tensorrt_engines, preflight):
            monkeypatch.setattr(module, "choose", lambda flavour: None)
        monkeypatch.setattr(tensorrt_engines, "load_engine", self.load_engine)
        monkeypatch.setattr(tensorrt_engines, "load_kernels", lambda *_: self.launcher)
        monkeypatch.setattr(tensorrt_engines, "_said", Told())
        monkeypatch.setattr(devices, "_lost", {})

    def load_engine(self, bundle: Bundle, graph: str, flavour: str, device: int = 0) -> FakeEngine:
        self.cuda.called("load_engine", device)
        return FakeEngine(self, graph)

    def does(self, name: str, device: int | None = None) -> bool:
        """A call of TensorRT's that can be refused: whether it is not."""
        self.cuda.called(name, device)
        self.refusable += 1
        if self.refuse_at != self.refusable - 1:
            return True
        tensorrt_engines._said.add(f"{name}: {self.says}")
        return False


class FakeEngine(Owned):
    """An engine."""

    def __init__(self, tensorrt: FakeTensorRT, graph: str) -> None:
        super().__init__(tensorrt.cuda, "engine")
        self.tensorrt, self.graph = tensorrt, graph

    @property
    def device_memory_size_v2(self) -> int:
        self.cuda.called("ICudaEngine.device_memory_size_v2")
        return self.tensorrt.memory[self.graph]

    @property
    def num_optimization_profiles(self) -> int:
        self.cuda.called("ICudaEngine.num_optimization_profiles")
        return len(self.tensorrt.runners[self.graph].profiles)

    def create_runtime_config(self) -> Any:
        self.cuda.called("ICudaEngine.create_runtime_config")
        chosen = SimpleNamespace(cache=None)
        chosen.set_execution_context_allocation_strategy = partial(setattr, chosen, "strategy")
        if self.tensorrt.compiles:
            chosen.create_runtime_cache = partial(FakeRuntimeCache, self.tensorrt)
            chosen.set_runtime_cache = lambda cache: setattr(chosen, "cache", cache) or True
        return chosen

    def create_execution_context(self, config: Any) -> FakeContext | None:
        if not self.tensorrt.does("ICudaEngine.create_execution_context", self.device):
            return None
        if config.strategy != "user managed":
            raise Misuse("a context would take activation memory of its own")
        if config.dynamic_shapes_kernel_specialization_strategy != "eager":
            raise Misuse("kernels would change while a video is made")
        return FakeContext(self, config.cache)


class FakeRuntimeCache:
    """What was compiled, as bytes: graphs and phases, one a line."""

    def __init__(self, tensorrt: FakeTensorRT) -> None:
        tensorrt.cuda.called("create_runtime_cache")
        self._tensorrt, self.held = tensorrt, set[str]()
        tensorrt.caches.append(self)

    def deserialize(self, content: bytes) -> bool:
        self._tensorrt.cuda.called("IRuntimeCache.deserialize")
        if self._tensorrt.blob_works:
            self.held.update(content.decode().split("\n"))
        return self._tensorrt.blob_works

    def serialize(self) -> bytes:
        self._tensorrt.cuda.called("IRuntimeCache.serialize")
        return "\n".join(sorted(self.held)).encode()


class FakeContext(Owned):
    """An execution context."""

    def __init__(self, engine: FakeEngine, cache: FakeRuntimeCache | None) -> None:
        super().__init__(engine.cuda, "context")
        self._cache = cache
        if engine.tensorrt.compiles:
            self.is_stream_capturable = self._is_stream_capturable
        self._engine, self._tensorrt = engine, engine.tensorrt
        self._runner = engine.tensorrt.runners[engine.graph]
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._memory = (0, 0)
        self._addresses: dict[str, int] = {}
        self.captured: dict[str, int] | None = None

    def _compile(self, graph: str, phase: int) -> None:
        """What the RTX flavour does where a context meets shapes, unless the cache has them."""
        name = f"{graph} {phase}"
        if self._tensorrt.compiles and (self._cache is None or name not in self._cache.held):
            self._tensorrt.compiled[graph, phase] += 1
            if self._cache is not None:
                self._cache.held.add(name)

    def _is_stream_capturable(self, stream: int) -> bool:
        self.cuda.called("IExecutionContext.is_stream_capturable", self.device)
        return self._tensorrt.capturable

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not self._tensorrt.does("IExecutionContext.set_optimization_profile_async", self.device):
            return False
        if index not in range(len(self._runner.profiles)):
            raise Misuse(f"{self._engine.graph} has no profile {index}")
        self._profile, self._shapes = None, {}
        self.cuda.streams[stream].put(partial(setattr, self, "_profile", index))
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if not self._tensorrt.does("IExecutionContext.set_input_shape", self.device):
            return False
        if self._profile is None:
            raise Misuse("a shape is set before the profile is there")
        self._shapes[name] = shape
        return self._runner.takes(self._profile, name, shape)

    def get_tensor_shape(self, name: str) -> Shape:
        self.cuda.called("IExecutionContext.get_tensor_shape")
        if self._profile is None or not self._runner.varied <= set(self._shapes):
            raise Misuse(f"the shape of {name} is asked for before those of all inputs are set")
        return self._runner.phases[self._runner.phase_of(self._shapes)][name]

    def set_device_memory(self, memory: int, size: int) -> None:
        self.cuda.called("IExecutionContext.set_device_memory")
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not self._tensorrt.does("IExecutionContext.set_tensor_address", self.device):
            return False
        if not memory or memory % ADDRESSES:
            raise Misuse(f"{name} is placed at {memory:#x}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self._tensorrt.does("IExecutionContext.execute_async_v3", self.device):
            return False
        stream = self.cuda.streams[stream_handle]
        if stream.capturing is not None and self._tensorrt.uncapturable is not None:
            raise self._tensorrt.uncapturable
        addresses = dict(self._addresses)
        if (
            self._profile is None
            or not self._runner.varied <= set(self._shapes)
            or set(addresses) != set(self._runner.dtypes)
        ):
            raise Misuse(f"{self._engine.graph} is run without all shapes and addresses")
        phase = self._runner.phase_of(self._shapes)
        self._check_places(phase, addresses)
        start, size = self._memory
        if size < self._tensorrt.memory[self._engine.graph]:
            raise Misuse(f"{self._engine.graph} has {size} bytes of activation memory")
        streams = self._tensorrt.users.setdefault(start, set())
        streams.add(stream_handle)
        if len(streams) > 1:
            raise Misuse("activation memory is used in two streams")
        self._tensorrt.executed.append((self._engine.graph, phase, stream_handle, addresses))
        self._tensorrt.profiles[self._engine.graph, phase] = self._profile
        self._compile(self._engine.graph, phase)
        self._tensorrt.launched.append(getattr(launchers._running, "launcher", None))
        if self.captured not in (None, addresses):
            raise Misuse("a context whose CUDA graph was captured runs another pass: the graph may change")
        if stream.capturing is not None:
            self.captured = addresses
        self.cuda.trace.append(("execute", stream_handle, self._engine.graph, phase))
        self.cuda.streams[stream_handle].put(partial(self._run, phase, addresses))
        return True

    def _run(self, phase: int, addresses: Mapping[str, int]) -> None:
        for name, nbytes in self._runner.sizes[phase].items():
            self.cuda.bytes_at(addresses[name], max(1, nbytes))
        self.cuda.bytes_at(*self._memory).fill(0x5A)
        if self._tensorrt.computes:
            self._runner.run(phase, addresses)

    def _check_places(self, phase: int, addresses: Mapping[str, int]) -> None:
        """All in live memory, and what is written apart from all else."""
        places = []
        for name, nbytes in self._runner.sizes[phase].items():
            address = addresses[name]
            self.cuda.bytes_at(address, max(1, nbytes))
            if nbytes:
                places.append((address, address + nbytes, name, name not in self._runner.inputs))
        places.sort()
        for (_, stop, first, written), (start, _, second, also) in pairwise(places):
            if start < stop and (written or also):
                raise Misuse(f"{first} and {second} of {self._engine.graph} lie in the same memory")
