"""TensorRT, in both flavours: the engines of a bundle, and lanes that run them.

Engines hold the weights and are shared. A lane has execution contexts of its own, each of which stays in one
phase of the cache, so that profile, shapes and activation memory are set once; only addresses change.

An engine computes all of its outputs in every pass. Those that a pass has no use for go to scratch memory.
"""

from __future__ import annotations

import atexit
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.prune.launcher import KernelLauncher
from forcingkv.prune.plugin import raise_plugin_error, register_plugins
from forcingkv.runtime.backends import Lane, LaneOptions, Pass, Queue, Tensor
from forcingkv.runtime.backends.cuda import CudaQueue, Gpu, fault
from forcingkv.runtime.backends.cuda_memory import CudaMemory, CudaTensor
from forcingkv.runtime.bundle import GRAPHS, Bundle
from forcingkv.runtime.engines import device_model, device_sm, find_engine, tuned_elsewhere
from forcingkv.runtime.faults import DeviceError, SessionError
from forcingkv.runtime.flavour import FlavourName, Told, choose, make_log, trt
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype

Shape = tuple[int, ...]
ALIGNMENT = 256
"""Bytes that TensorRT wants the address of an input or output to be a multiple of."""

_runtimes: list[Any] = []
"""The process's TensorRT runtime, which engines need as long as they live."""
_making_it = threading.Lock()
_said: Told[str] = Told()
"""What it has reported as errors and was not asked for yet."""


def open_lane(bundle: Bundle, options: LaneOptions) -> TensorRTLane:
    """Load the engines of a bundle on this machine's first GPU (`open_backend`).

    `threads` is of no use here. With `cuda_graphs` a pass is captured when it comes for the second time.
    """
    options.refuse("device", "dtype", "provider", "compiled")
    flavour: FlavourName = one_of(FlavourName, options.backend, "backend")
    if device_sm() is None:
        load_engine(bundle, GRAPHS[0], flavour)  # raises, and says what to do
    gpu = Gpu()
    with gpu.asked("load the engines"):
        engines = {name: load_engine(bundle, name, flavour) for name in GRAPHS}
    return TensorRTLane(gpu, bundle, engines, cuda_graphs=options.cuda_graphs)


def load_engine(bundle: Bundle, graph: str, flavour: FlavourName) -> trt.ICudaEngine:
    """The engine of a graph of an opened bundle, ready for execution contexts, its plugin registered.

    Raises MissingExtraError where the flavour, or cuda-core for the plugin, is not installed; InputError
    where there is no GPU, no engine for it and for this TensorRT, or TensorRT does not load the file.
    """
    choose(flavour)
    sm = device_sm()
    if sm is None:
        raise InputError(
            "needs a GPU to run engines on, and no GPU was found",
            where=flavour,
            hint="On a CPU use a bundle exported with --target onnx. If there is a GPU, see whether cuda-core"
            f" is installed: pip install 'forcingkv[{flavour}]'",
        )
    manifest = bundle.manifest
    record = find_engine(manifest.engines, graph, flavour, trt.__version__, sm, str(bundle.path))
    if record.needs_plugin:
        register_plugins(KernelLauncher(bundle.path, manifest.kernels, sm, bundle.content))
    elsewhere = tuned_elsewhere(record, device_model()) if record.device else None
    if elsewhere:
        warnings.warn(elsewhere, RuntimeWarning, stacklevel=2)
    path, content = bundle.path / record.file, bundle.content(record.file)
    with _making_it:
        if not _runtimes:
            _runtimes.append(trt.Runtime(make_log(_hear)))
            atexit.register(_runtimes.clear)  # before the plugins go, which were registered before it
    last_words()  # of something else
    engine: trt.ICudaEngine | None = _runtimes[0].deserialize_cuda_engine(content)
    if engine is None:
        why = last_words()
        raise InputError(
            f"cannot be loaded with {flavour} {trt.__version__} on sm_{sm}"
            + (f": TensorRT says {why!r}" if why else ", and TensorRT gives no reason"),
            where=str(path),
            hint="Export the bundle again with this version.",
        )
    return engine


def last_words() -> str:
    """The errors that TensorRT reported in this thread since the last call."""
    return "; ".join(_said.take())


def _hear(severity: str, message: str) -> None:
    if severity in ("ERROR", "INTERNAL_ERROR"):
        _said.add(message.strip())


class TensorRTLane:
    """Two streams, one for passes and one for decoding, with the contexts that run in each.

    `prompt` and `step` share one block of activation memory, since they run one after the other. `decode`
    has its own, since it runs while the passes of the next chunk do (`lookahead`).
    """

    def __init__(
        self, gpu: Gpu, bundle: Bundle, engines: Mapping[str, trt.ICudaEngine], *, cuda_graphs: bool
    ) -> None:
        self.lookahead, self._cuda_graphs = 1, cuda_graphs
        self.runs_on = "the GPU (TensorRT)"
        self._gpu, self._bundle, self._engines = gpu, bundle, engines
        self._contexts: dict[str, list[PhaseContext]] = {name: [] for name in GRAPHS}
        self._scratch: dict[tuple[str, str], CudaTensor] = {}
        try:
            main, side = CudaQueue(gpu), CudaQueue(gpu)
            self.main: Queue = main
            self.side: Queue = side
            self._queues = {"prompt": main, "step": main, "decode": side}
            self._memory = CudaMemory(gpu, main)
            blocks = {
                main: self._block(engines["prompt"], engines["step"]),
                side: self._block(engines["decode"]),
            }
            # The shapes of inputs that vary by phase, for each phase. Engines have a profile each.
            phases = {"step": [bundle.plan.phase_shapes(phase) for phase in bundle.plan.phases]}
            for graph, queue in self._queues.items():
                record = bundle.manifest.graphs[graph]
                for phase, shapes in enumerate(phases.get(graph, [{}])):
                    context = PhaseContext(gpu, engines[graph], f"{graph} in phase {phase}")
                    context.prepare(phase, shapes, blocks[queue], queue, [*record.inputs, *record.outputs])
                    self._contexts[graph].append(context)
        except BaseException:
            with suppress(Exception):  # the first error is the one to show
                self.close()
            raise

    def tensor(self, shape: Shape, dtype: str, *, state: bool = False) -> CudaTensor:
        """Memory on the GPU, whether it is state or not, until the lane is closed."""
        return self._memory.tensor(tuple(shape), dtype)

    def cache(self, plan: CachePlan, dtype: Dtype) -> CacheBuffers:
        return CacheBuffers(plan, self, dtype)

    def bind(
        self, graph: str, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Pass:
        """Raises ValueError for names, shapes or dtypes that are not the graph's in that phase."""
        if not self._contexts:
            raise DeviceError("the lane is closed")
        record, context = self._bundle.manifest.graphs[graph], self._contexts[graph][phase]
        if set(inputs) != set(record.inputs) or not set(outputs) <= set(record.outputs):
            raise ValueError(
                f"{graph} takes {sorted(record.inputs)} and gives {sorted(record.outputs)}; bound were"
                f" {sorted(inputs)} and {sorted(outputs)}"
            )
        bound = TensorRTPass(context, self._queues[graph], self._cuda_graphs)
        given = {**inputs, **outputs}
        for name, planned in {**record.inputs, **record.outputs}.items():
            tensor, shape, dtype = given.get(name), context.shapes[name], planned.dtype
            if tensor is None:
                place = self._scratch_for(graph, name, dtype).first(shape)
            elif not isinstance(tensor, CudaTensor) or (tensor.shape, tensor.dtype) != (shape, dtype):
                found = f"{tensor.dtype} {tensor.shape}"
                raise ValueError(f"{name} of {context.what} is {dtype} {shape} on the GPU, not {found}")
            elif tensor.address % ALIGNMENT == 0:
                place = tensor
            else:  # copied from and to where TensorRT takes it
                place = self._scratch_for(graph, name, dtype).first(shape)
                if name in inputs:
                    bound.before.append((place, tensor))
                else:
                    bound.after.append((tensor, place))
            bound.addresses[name] = place.address
        return bound

    def sibling(self) -> Lane:
        """Raises MemoryShortError for want of memory, DeviceError where TensorRT or CUDA refuses."""
        engines = self._engines  # once: another thread may close the lane
        if not engines:
            raise DeviceError("the lane is closed")
        return TensorRTLane(Gpu(), self._bundle, engines, cuda_graphs=self._cuda_graphs)

    def close(self) -> None:
        """TensorRT frees the weights with the last lane that has the engines."""
        self._engines, self._contexts = {}, {}
        self._gpu.close()

    def _scratch_for(self, graph: str, name: str, dtype: str) -> CudaTensor:
        """Memory of the largest phase. All passes of the graph use it, which run one after the other."""
        if (graph, name) not in self._scratch:
            shape = max((context.shapes[name] for context in self._contexts[graph]), key=math.prod)
            self._scratch[graph, name] = self.tensor(shape, dtype)
        return self._scratch[graph, name]

    def _block(self, *engines: trt.ICudaEngine) -> CudaTensor:
        """Activation memory for contexts of these engines that run one after another, in any profile."""
        with self._gpu.asked("ask how much memory engines need"):
            nbytes = max(engine.device_memory_size_v2 for engine in engines)
        return self.tensor((nbytes,), "uint8")


@dataclass
class TensorRTPass:
    """An execution on fixed addresses. With `cuda_graphs` the second run captures it, later ones replay."""

    context: PhaseContext
    queue: CudaQueue
    cuda_graphs: bool
    addresses: dict[str, int] = field(default_factory=dict)
    before: list[tuple[CudaTensor, CudaTensor]] = field(default_factory=list)
    """Copies (target, source) to make before it runs, and after."""
    after: list[tuple[CudaTensor, CudaTensor]] = field(default_factory=list)
    ran: bool = False
    launch: Callable[[], None] | None = None

    def run(self) -> None:
        """Raises DeviceError or MemoryShortError with what TensorRT reported."""
        if self.ran and self.cuda_graphs:
            if self.launch is None:
                self.launch = self.queue.captured(self._enqueue, self.context.what)
            self.launch()
        else:
            self._enqueue()
            self.ran = True

    def _enqueue(self) -> None:
        for target, source in self.before:
            target.copy_from(source, self.queue)
        # Addresses each time: another pass may have used the context since.
        self.context.enqueue(self.addresses, self.queue)
        for target, source in self.after:
            target.copy_from(source, self.queue)


class PhaseContext:
    """A context that stays in one phase: profile, shapes and activation memory are set once.

    So a CUDA graph that was captured of it stays right.

    Attributes:
        what: graph and phase, for messages.
        shapes: of all inputs and outputs, in this phase.
    """

    def __init__(self, gpu: Gpu, engine: trt.ICudaEngine, what: str) -> None:
        """Raises MemoryShortError or DeviceError, as everything here does."""
        self.what, self._gpu = what, gpu
        self.shapes: dict[str, Shape] = {}
        with gpu.asked(f"make a context of {what}"):
            last_words()  # of something else
            context = _new_context(engine)
            if context is None:
                raise self._refusal("make a context of")
            self._context = context
        gpu.held.callback(self._close)

    def prepare(
        self, phase: int, varied: Mapping[str, Shape], block: CudaTensor, queue: CudaQueue, names: list[str]
    ) -> None:
        """Choose the profile, the shapes of the inputs that vary by phase, and the activation memory.

        `names` are those of all inputs and outputs, whose shapes follow.
        """
        context = self._context
        with self._gpu.asked(f"prepare {self.what}"):
            last_words()
            if not context.set_optimization_profile_async(phase, queue.handle):
                raise self._refusal("choose the profile of")
            queue.sync()
            for name, shape in varied.items():
                if not context.set_input_shape(name, shape):
                    raise self._refusal(f"set {name} to {shape} for")
            context.set_device_memory(block.address, block.nbytes)
            raise_plugin_error()
            self.shapes = {name: tuple(context.get_tensor_shape(name)[:]) for name in names}

    def enqueue(self, addresses: Mapping[str, int], queue: CudaQueue) -> None:
        """Put one execution, on those addresses of all inputs and outputs, into a queue."""
        with self._gpu.asked(f"run {self.what}"):
            last_words()
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self._refusal(f"place {name} of")
            done = self._context.execute_async_v3(queue.handle)
            raise_plugin_error()  # after some errors of the plugin TensorRT says that all is well
            if not done:
                raise self._refusal("run")

    def _close(self) -> None:
        """Let go of it, whoever still has a pass: TensorRT frees it then."""
        del self._context

    def _refusal(self, doing: str) -> SessionError:
        """The error for what TensorRT just refused. What the plugin raised meanwhile is raised instead."""
        raise_plugin_error()
        return fault(f"{doing} {self.what}", last_words() or "TensorRT does not say why")


def _new_context(engine: trt.ICudaEngine) -> trt.IExecutionContext | None:
    """A context whose activation memory is given to it; None where TensorRT makes none."""
    config: Any = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # TensorRT-RTX compiles kernels for shapes as it meets them, and by default swaps them in when they are
    # ready: the same seed would not give the same video, and a CUDA graph would keep those of the first runs.
    kinds: Any = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if kinds is not None:
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
    return engine.create_execution_context(config)
