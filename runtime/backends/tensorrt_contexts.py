"""Execution contexts of TensorRT, each in one phase of the cache, and the passes that run in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forcingkv.prune.launcher import KernelLauncher
from forcingkv.prune.launchers import launching
from forcingkv.prune.plugin import raise_plugin_error
from forcingkv.runtime import devices
from forcingkv.runtime.backends.cuda import CudaQueue, Gpu
from forcingkv.runtime.backends.cuda_memory import CudaTensor
from forcingkv.runtime.backends.tensorrt_cache import RuntimeCache
from forcingkv.runtime.backends.tensorrt_engines import last_words
from forcingkv.runtime.faults import DeviceError, MemoryShortError, SessionError
from forcingkv.runtime.flavour import trt

Shape = tuple[int, ...]


class PhaseContext:
    """A context that stays in one phase: profile, shapes and activation memory are set once.

    So a CUDA graph that was captured of it stays right.

    Attributes:
        what: graph and phase, for messages.
        shapes: of all inputs and outputs, in this phase.
    """

    def __init__(
        self,
        gpu: Gpu,
        engine: trt.ICudaEngine,
        what: str,
        launcher: KernelLauncher | None,
        cache: RuntimeCache | None,
    ) -> None:
        """Raises MemoryShortError or DeviceError, as everything here does.

        `launcher` launches the kernels of the engine's plugins; `cache` keeps what is compiled of it.
        """
        self.what, self._gpu, self._launcher = what, gpu, launcher
        self.shapes: dict[str, Shape] = {}
        self._placed: dict[str, int] = {}
        with gpu.asked(f"make a context of {what}"), launching(launcher):
            last_words()  # of something else
            context = _new_context(engine, cache)
            if context is None:
                raise self._refusal("make a context of")
            self._context = context
        gpu.held.callback(self._close)

    def prepare(
        self, profile: int, varied: Mapping[str, Shape], block: CudaTensor, queue: CudaQueue, names: list[str]
    ) -> None:
        """Choose the profile by its number, the shapes of the inputs that vary by phase, and the activation
        memory.

        `names` are those of all inputs and outputs, whose shapes follow.
        """
        context = self._context
        with self._gpu.asked(f"prepare {self.what}"), launching(self._launcher):
            last_words()
            if not context.set_optimization_profile_async(profile, queue.handle):
                raise self._refusal("choose the profile of")
            queue.sync()
            for name, shape in varied.items():
                if not context.set_input_shape(name, shape):
                    raise self._refusal(f"set {name} to {shape} for")
            context.set_device_memory(block.address, block.nbytes)
            raise_plugin_error()
            self.shapes = {name: tuple(context.get_tensor_shape(name)[:]) for name in names}

    def enqueue(self, addresses: Mapping[str, int], queue: CudaQueue) -> None:
        """Put one execution, on those addresses of all inputs and outputs, into a queue.

        TensorRT keeps addresses, so those are set that changed since the last time.
        """
        with self._gpu.asked(f"run {self.what}"), launching(self._launcher):
            last_words()
            for name, address in addresses.items():
                if self._placed.get(name) == address:
                    continue
                self._placed.pop(name, None)
                if not self._context.set_tensor_address(name, address):
                    raise self._refusal(f"place {name} of")
                self._placed[name] = address
            done = self._context.execute_async_v3(queue.handle)
            raise_plugin_error()  # after some errors of the plugin TensorRT says that all is well
            if not done:
                raise self._refusal("run")

    def can_be_captured(self, queue: CudaQueue) -> bool:
        """Whether TensorRT says that a run may be captured in that queue, as the RTX flavour can; others do
        not say."""
        asks = getattr(self._context, "is_stream_capturable", None)
        with self._gpu.asked(f"ask whether {self.what} can be captured"):
            return asks is None or bool(asks(queue.handle))

    def _close(self) -> None:
        """Let go of it, whoever still has a pass: TensorRT frees it then."""
        del self._context

    def _refusal(self, doing: str) -> SessionError:
        """The error for what TensorRT just refused. What the plugin raised meanwhile is raised instead."""
        raise_plugin_error()
        return self._gpu.fault(f"{doing} {self.what}", last_words() or "TensorRT does not say why")


@dataclass
class TensorRTPass:
    """An execution on fixed addresses. With `cuda_graphs` the second run captures it, later ones replay.

    A pass that cannot be captured says so to `uncaptured` (what it is, and why) and goes on without.
    """

    gpu: Gpu
    context: PhaseContext
    queue: CudaQueue
    cuda_graphs: bool
    uncaptured: Callable[[str, str], None]
    addresses: dict[str, int] = field(default_factory=dict)
    before: list[tuple[CudaTensor, CudaTensor]] = field(default_factory=list)
    """Copies (target, source) to make before it runs, and after."""
    after: list[tuple[CudaTensor, CudaTensor]] = field(default_factory=list)
    ran: bool = False
    launch: Callable[[], None] | None = None

    def run(self) -> None:
        """Raises DeviceError or MemoryShortError with what TensorRT reported."""
        why = self._capture() if self.ran and self.cuda_graphs and self.launch is None else None
        if self.launch is not None:
            self.launch()
            return
        self._enqueue()
        self.ran = True
        if why is not None:  # the capture alone was refused
            self.cuda_graphs = False
            self.uncaptured(self.context.what, why)

    def _capture(self) -> str | None:
        """Why it cannot be captured, or None. Raises MemoryShortError, and DeviceError where all is lost."""
        try:
            if not self.context.can_be_captured(self.queue):
                return "TensorRT says that it must not be"
            self.launch = self.queue.captured(self._enqueue, self.context.what)
        except MemoryShortError:
            raise
        except DeviceError as error:
            devices.check_device(self.gpu.name)
            return str(error)
        return None

    def _enqueue(self) -> None:
        for target, source in self.before:
            target.copy_from(source, self.queue)
        self.context.enqueue(self.addresses, self.queue)
        for target, source in self.after:
            target.copy_from(source, self.queue)


def _new_context(engine: trt.ICudaEngine, cache: RuntimeCache | None) -> trt.IExecutionContext | None:
    """A context whose activation memory is given to it; None where TensorRT makes none."""
    config: Any = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # TensorRT-RTX compiles kernels for shapes as it meets them, and by default swaps them in when they are
    # ready: the same seed would not give the same video, and a CUDA graph would keep those of the first runs.
    kinds: Any = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if kinds is not None:
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
    if cache is not None:
        cache.give_to(config)
    return engine.create_execution_context(config)
