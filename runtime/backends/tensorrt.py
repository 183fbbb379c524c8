"""TensorRT, in both flavours: the engines of a bundle, and lanes that run them.

Engines hold the weights and are shared. A lane has execution contexts of its own, each of which stays in one
phase of the cache, so that profile, shapes and activation memory are set once; only addresses change.

An engine computes all of its outputs in every pass. Those that a pass has no use for go to scratch memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from forcingkv.runtime.backends import Lane, Pass, Program, Queue, Tensor
from forcingkv.runtime.backends.cuda import CudaGraph, CudaQueue, Gpu, close_all
from forcingkv.runtime.backends.cuda_memory import CudaMemory, CudaTensor
from forcingkv.runtime.backends.trt_context import PhaseContext, Shape
from forcingkv.runtime.bundle import GRAPHS, Bundle, GraphRecord
from forcingkv.runtime.engine_loader import load_engine
from forcingkv.runtime.engines import device_sm
from forcingkv.runtime.faults import DeviceError
from forcingkv.runtime.flavour import FlavourName, trt

ALIGNMENT = 256
"""Bytes that TensorRT wants the address of an input or output to be a multiple of."""


class TensorRTBackend:
    """The engines of a bundle, on this machine's first GPU."""

    def __init__(self, bundle: Bundle, flavour: FlavourName, *, cuda_graphs: bool = False) -> None:
        """Load the engines.

        Args:
            bundle: an opened bundle.
            flavour: which TensorRT.
            cuda_graphs: whether a pass is captured when it comes for the second time, and replayed after.

        Raises:
            InputError: there is no GPU, or the bundle has no engines for it and for this TensorRT.
            MissingExtraError: the flavour, or cuda-core, is not installed.
            SessionError: the GPU could not be used.
        """
        self._bundle, self._cuda_graphs = bundle, cuda_graphs
        if device_sm() is None:
            load_engine(bundle, GRAPHS[0], flavour)  # raises, and says what to do
        self._gpu = Gpu()
        with self._gpu.asked("load the engines"):
            self._engines = {name: load_engine(bundle, name, flavour) for name in GRAPHS}

    def lane(self) -> Lane:
        """Contexts, memory and streams for one more session.

        Raises MemoryShortError where there is not enough memory, DeviceError where TensorRT or CUDA refuses.
        """
        if not self._engines:
            raise DeviceError("the backend is closed")
        return TensorRTLane(self._gpu, self._bundle, self._engines, cuda_graphs=self._cuda_graphs)

    def close(self) -> None:
        """Let go of the engines: TensorRT frees their weights with the last context on them."""
        self._engines = {}


class TensorRTLane:
    """Two streams, one for passes and one for decoding, with the contexts that run in each.

    `prompt` and `step` share one block of activation memory, since they run one after the other. `decode`
    has its own, since it runs while the passes of the next chunk do.

    Attributes:
        main: the queue of passes.
        side: the queue of decoding.
        lookahead: the passes of one chunk are begun while the one before is decoded.
    """

    def __init__(
        self, gpu: Gpu, bundle: Bundle, engines: Mapping[str, trt.ICudaEngine], *, cuda_graphs: bool
    ) -> None:
        self.lookahead, self._gpu, self._cuda_graphs = 1, gpu, cuda_graphs
        self._queues: list[CudaQueue] = []
        self._graphs: list[CudaGraph] = []
        self._programs: dict[str, TensorRTProgram] = {}
        self._memory: CudaMemory | None = None
        try:
            main, side = self._queue(), self._queue()
            self._memory = CudaMemory(gpu, main)
            blocks = {
                main: self._block(engines["prompt"], engines["step"]),
                side: self._block(engines["decode"]),
            }
            for graph in GRAPHS:
                queue = side if graph == "decode" else main
                program = TensorRTProgram(self, graph, bundle.manifest.graphs[graph], queue)
                self._programs[graph] = program
                for phase, shapes in enumerate(_phases(graph, bundle)):
                    context = PhaseContext(gpu, engines[graph], f"{graph} in phase {phase}")
                    program.contexts.append(context)
                    context.prepare(phase, shapes, blocks[queue], queue)
        except BaseException:
            with suppress(Exception):  # what went wrong first is what is to be told
                self.close()
            raise
        self.main: Queue = main
        self.side: Queue = side

    def tensor(self, shape: Shape, dtype: str, *, state: bool = False) -> CudaTensor:
        """Memory on the GPU, whether it is state or not, until the lane is closed.

        Raises MemoryShortError, with the bytes that were needed.
        """
        if self._memory is None:
            raise DeviceError("the lane is closed")
        return self._memory.tensor(tuple(shape), dtype)

    def program(self, graph: str) -> Program:
        if not self._programs:
            raise DeviceError("the lane is closed")
        return self._programs[graph]

    def close(self) -> None:
        """Wait for both streams, then give everything back; what fails does not keep the rest.

        Raises the first error.
        """
        queues, graphs, memory = self._queues, self._graphs, self._memory
        contexts = [context for program in self._programs.values() for context in program.contexts]
        for program in self._programs.values():
            program.contexts = []
        self._queues, self._graphs, self._memory, self._programs = [], [], None, {}
        close_all(
            "close the lane",
            [
                *(queue.sync for queue in queues),
                *(graph.close for graph in graphs),
                *(context.close for context in contexts),
                *([memory.close] if memory else []),
                *(queue.close for queue in queues),
            ],
        )

    def captured(self, work: Callable[[], None], queue: CudaQueue, what: str) -> CudaGraph:
        """What that work puts into a queue, as a CUDA graph of this lane."""
        graph = CudaGraph(self._gpu, queue, work, what)
        self._graphs.append(graph)
        return graph

    @property
    def cuda_graphs(self) -> bool:
        """Whether passes that come again are captured."""
        return self._cuda_graphs

    def _queue(self) -> CudaQueue:
        queue = CudaQueue(self._gpu)
        self._queues.append(queue)
        return queue

    def _block(self, *engines: trt.ICudaEngine) -> CudaTensor:
        """Activation memory for contexts of these engines that run one after another, in any profile."""
        with self._gpu.asked("ask how much memory engines need"):
            nbytes = max(engine.device_memory_size_v2 for engine in engines)
        return self.tensor((nbytes,), "uint8")


class TensorRTProgram:
    """A graph of a lane.

    Attributes:
        contexts: one for each phase.
    """

    def __init__(self, lane: TensorRTLane, graph: str, record: GraphRecord, queue: CudaQueue) -> None:
        self._lane, self._graph, self._record, self._queue = lane, graph, record, queue
        self._tensors = {**record.inputs, **record.outputs}
        self._scratch: dict[str, CudaTensor] = {}
        self.contexts: list[PhaseContext] = []

    def bind(self, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Pass:
        """Raises ValueError for names, shapes or dtypes that are not the graph's in that phase."""
        if not self.contexts:
            raise DeviceError("the lane is closed")
        known, given = self._record, set(outputs)
        if set(inputs) != set(known.inputs) or not given <= set(known.outputs):
            raise ValueError(
                f"{self._graph} takes {sorted(known.inputs)} and gives {sorted(known.outputs)}; bound were"
                f" {sorted(inputs)} and {sorted(given)}"
            )
        context = self.contexts[phase]
        tensors = {name: self._fitting(context, name, t) for name, t in {**inputs, **outputs}.items()}
        bound = {n: self._place(n, context.shape(n), tensors.get(n)) for n in self._tensors}
        moved = {name: t for name, t in tensors.items() if t.address != bound[name].address}
        before = [(bound[name], tensor) for name, tensor in moved.items() if name in known.inputs]
        after = [(tensor, bound[name]) for name, tensor in moved.items() if name in known.outputs]
        addresses = {name: tensor.address for name, tensor in bound.items()}
        return TensorRTPass(self._lane, context, self._queue, addresses, before, after)

    def _fitting(self, context: PhaseContext, name: str, tensor: Tensor) -> CudaTensor:
        shape, dtype = context.shape(name), self._tensors[name].dtype
        if not isinstance(tensor, CudaTensor) or (tensor.shape, tensor.dtype) != (shape, dtype):
            given = f"{tensor.dtype} {tensor.shape}"
            raise ValueError(f"{name} of {context.what} is {dtype} {shape} on the GPU, not {given}")
        return tensor

    def _place(self, name: str, shape: Shape, tensor: CudaTensor | None) -> CudaTensor:
        """Where TensorRT reads or writes: the tensor, or scratch memory where there is none or its address
        will not do. Scratch is used by all passes of the graph, which run one after the other."""
        if tensor is not None and tensor.address % ALIGNMENT == 0:
            return tensor
        if name not in self._scratch:
            largest = max((context.shape(name) for context in self.contexts), key=math.prod)
            self._scratch[name] = self._lane.tensor(largest, self._tensors[name].dtype)
        return self._scratch[name].first(shape)


class TensorRTPass:
    """An execution on fixed addresses. With `cuda_graphs` the second run captures it, later ones replay."""

    def __init__(
        self,
        lane: TensorRTLane,
        context: PhaseContext,
        queue: CudaQueue,
        addresses: Mapping[str, int],
        before: Collection[tuple[CudaTensor, CudaTensor]],
        after: Collection[tuple[CudaTensor, CudaTensor]],
    ) -> None:
        self._lane, self._context, self._queue = lane, context, queue
        self._addresses, self._before, self._after = addresses, before, after
        self._warm = False
        self._graph: CudaGraph | None = None

    def run(self, queue: Queue) -> None:
        """Raises DeviceError or MemoryShortError with what TensorRT said, and ValueError in another queue
        than the graph's: passes of one queue share memory."""
        if queue is not self._queue:
            raise ValueError(f"{self._context.what} runs in the lane's other queue")
        if self._warm and self._lane.cuda_graphs:
            if self._graph is None:
                self._graph = self._lane.captured(self._enqueue, self._queue, self._context.what)
            self._graph.launch(self._queue)
        else:
            self._enqueue()
            self._warm = True

    def _enqueue(self) -> None:
        # Addresses each time: another pass may have used the context since.
        for target, source in self._before:
            target.copy_from(source, self._queue)
        self._context.enqueue(self._addresses, self._queue)
        for target, source in self._after:
            target.copy_from(source, self._queue)


def _phases(graph: str, bundle: Bundle) -> list[dict[str, Shape]]:
    """For each phase of a graph, the shapes of its inputs that vary by phase. Engines have a profile each."""
    if graph != "step":
        return [{}]
    return [bundle.plan.phase_shapes(phase) for phase in bundle.plan.phases]
