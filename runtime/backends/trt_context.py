"""An execution context of TensorRT, whose every refusal is an error that says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forcingkv.prune.plugin import raise_plugin_error
from forcingkv.runtime.backends.cuda import CudaQueue, Gpu, fault
from forcingkv.runtime.backends.cuda_memory import CudaTensor
from forcingkv.runtime.engine_loader import last_words
from forcingkv.runtime.faults import DeviceError, SessionError
from forcingkv.runtime.flavour import trt

Shape = tuple[int, ...]


class PhaseContext:
    """A context that stays in one phase: profile, shapes and activation memory are set once.

    So a CUDA graph that was captured of it stays right.

    Attributes:
        what: graph and phase, for messages.
    """

    def __init__(self, gpu: Gpu, engine: trt.ICudaEngine, what: str) -> None:
        """Raises MemoryShortError or DeviceError, as everything here does."""
        self.what, self._gpu = what, gpu
        self._context: trt.IExecutionContext | None = None
        self._known: dict[str, Shape] = {}
        with gpu.asked(f"make a context of {what}"):
            self._context = _new_context(engine)
            if self._context is None:
                raise self._refusal("make a context of")

    def prepare(self, phase: int, shapes: Mapping[str, Shape], block: CudaTensor, queue: CudaQueue) -> None:
        """Choose the profile, the shapes of the inputs that vary by phase, and the activation memory."""
        with self._gpu.asked(f"prepare {self.what}"):
            context = self._open
            if not context.set_optimization_profile_async(phase, queue.handle):
                raise self._refusal("choose the profile of")
            queue.sync()
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self._refusal(f"set {name} to {shape} for")
            context.set_device_memory(block.address, block.nbytes)
            raise_plugin_error()

    def shape(self, name: str) -> Shape:
        """Of an input or output, in this phase."""
        if name not in self._known:
            with self._gpu.asked(f"ask for the shape of {name} of {self.what}"):
                self._known[name] = tuple(self._open.get_tensor_shape(name)[:])
        return self._known[name]

    def enqueue(self, addresses: Mapping[str, int], queue: CudaQueue) -> None:
        """Put one execution, on those addresses of all inputs and outputs, into a queue."""
        with self._gpu.asked(f"run {self.what}"):
            context = self._open
            for name, address in addresses.items():
                if not context.set_tensor_address(name, address):
                    raise self._refusal(f"place {name} of")
            done = context.execute_async_v3(queue.handle)
            raise_plugin_error()  # after some errors of the plugin TensorRT says that all is well
            if not done:
                raise self._refusal("run")

    def close(self) -> None:
        """Let go of it: TensorRT frees it then."""
        self._context = None

    @property
    def _open(self) -> trt.IExecutionContext:
        if self._context is None:
            raise DeviceError("the lane is closed")
        return self._context

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
