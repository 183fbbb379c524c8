"""TensorRT, in both flavours: lanes that run the engines of a bundle.

Engines hold the weights and are shared. A lane has execution contexts of its own, each of which stays in one
phase of the cache, so that profile, shapes and activation memory are set once; only addresses change. With
CUDA graphs each pass has a context of its own: a graph may hold tables of the context it was captured of, and
the next enqueue of another pass would change them (docs/decisions/0034).

An engine computes all of its outputs in every pass. Those that a pass has no use for go to scratch memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress

from forcingkv.headmaps.fields import one_of
from forcingkv.runtime import devices
from forcingkv.runtime.backends import Lane, LaneOptions, Pass, Queue, Tensor
from forcingkv.runtime.backends.cuda import CudaQueue, Gpu
from forcingkv.runtime.backends.cuda_memory import CudaMemory, CudaTensor
from forcingkv.runtime.backends.tensorrt_contexts import PhaseContext, TensorRTPass
from forcingkv.runtime.backends.tensorrt_engines import Loaded, find_record, load_all
from forcingkv.runtime.bundle import GRAPHS, Bundle
from forcingkv.runtime.engines import cuda_core
from forcingkv.runtime.faults import DeviceError, GoingOnWarning
from forcingkv.runtime.flavour import FlavourName
from forcingkv.runtime.graph_records import STREAMING
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype

Shape = tuple[int, ...]
ALIGNMENT = 256
"""Bytes that TensorRT wants the address of an input or output to be a multiple of."""
DECODING = -1
"""Priority of the stream that decodes: above that of passes, which is 0. They are queued first and fill the
GPU; the decoder is to get a place whenever one of their blocks ends, since somebody waits for frames."""


def open_lane(bundle: Bundle, options: LaneOptions) -> TensorRTLane:
    """Load the engines of a bundle on a GPU of this machine: `device`, or the first (`open_backend`).

    `threads` is of no use here. With `cuda_graphs` a pass is captured when it comes for the second time.
    """
    options.refuse("dtype", "provider", "compiled")
    flavour: FlavourName = one_of(FlavourName, options.backend, "backend")
    number = devices.cuda_number(options.device, options.backend)
    devices.check_device(f"cuda:{number}")
    cuda_core()
    find_record(bundle, GRAPHS[0], flavour, number)  # raises where there is no GPU, and says what to do
    gpu = Gpu(number)
    with gpu.asked("load the engines"):
        loaded = load_all(bundle, flavour, number)
    return TensorRTLane(gpu, bundle, loaded, cuda_graphs=options.cuda_graphs)


class TensorRTLane:
    """Two streams, one for passes and one for decoding, with the contexts that run in each.

    `prompt` and `step` share one block of activation memory, since they run one after the other. Decoding
    has its own, since it runs while the passes of the next chunk do (`lookahead`); `encode` runs in the same
    queue, and shares that.
    """

    def __init__(self, gpu: Gpu, bundle: Bundle, loaded: Loaded, *, cuda_graphs: bool) -> None:
        self.lookahead, self._cuda_graphs = 1, cuda_graphs
        self.recaches = False  # no engine of that pass is built
        self.in_place = False  # an engine may write an output while it reads inputs
        self.copies = True
        self.runs_on = "the GPU (TensorRT)" if gpu.number == 0 else f"the GPU {gpu.name} (TensorRT)"
        self._gpu, self._bundle, self._loaded = gpu, bundle, loaded
        self._closed, self._told = False, False
        self._contexts: dict[tuple[str, int], PhaseContext] = {}
        self._unused: set[tuple[str, int]] = set()
        """Contexts of no pass yet, with CUDA graphs."""
        self._scratch: dict[tuple[str, str], CudaTensor] = {}
        try:
            main, side = CudaQueue(gpu), CudaQueue(gpu, DECODING)
            self.main: Queue = main
            self.side: Queue = side
            streaming = [graph for graph in STREAMING if graph in loaded.engines]
            self._queues = {"prompt": main, "step": main, **dict.fromkeys(streaming, side)}
            self._memory = CudaMemory(gpu, main)
            block = self._block("prompt", "step")
            beside = self._block(*streaming)
            self._blocks = {"prompt": block, "step": block, **dict.fromkeys(streaming, beside)}
            # The shapes of inputs that vary by phase, for each phase, whatever others share its profile.
            self._varied: dict[tuple[str, int], Mapping[str, Shape]] = {("prompt", 0): {}}
            for number, phase in enumerate(bundle.plan.phases):
                self._varied["step", number] = bundle.plan.phase_shapes(phase)
            for graph in streaming:
                self._varied[graph, 0] = {}
            for graph, number in self._varied:
                self._contexts[graph, number] = self._context(graph, number)
            self._unused.update(self._contexts)
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
        if self._closed:
            raise DeviceError("the lane is closed")
        record, context = self._bundle.manifest.graphs[graph], self._contexts[graph, phase]
        if set(inputs) != set(record.inputs) or not set(outputs) <= set(record.outputs):
            raise ValueError(
                f"{graph} takes {sorted(record.inputs)} and gives {sorted(record.outputs)}; bound were"
                f" {sorted(inputs)} and {sorted(outputs)}"
            )
        if self._cuda_graphs:
            context = self._own_context(graph, phase)
        bound = TensorRTPass(self._gpu, context, self._queues[graph], self._cuda_graphs, self._uncaptured)
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

    def warm(self, passes: Callable[[], None]) -> None:
        """TensorRT-RTX compiles the kernels of a phase at its first run: not in the midst of a video then."""
        passes()
        for queue in (self._queues["step"], self._queues["decode"]):
            queue.sync()
        self._save_caches()

    def sibling(self) -> Lane:
        """Raises MemoryShortError for want of memory, DeviceError where TensorRT or CUDA refuses."""
        loaded = self._loaded  # once: another thread may close the lane
        if self._closed or not loaded.engines:
            raise DeviceError("the lane is closed")
        return TensorRTLane(Gpu(self._gpu.number), self._bundle, loaded, cuda_graphs=self._cuda_graphs)

    def close(self) -> None:
        """TensorRT frees the weights with the last lane that has the engines."""
        if not self._closed and not devices.is_lost(self._gpu.name):
            self._save_caches()
        self._closed = True
        try:
            self._contexts = {}
            self._gpu.close()
        finally:
            self._loaded = Loaded({}, None, {}, {})

    def _context(self, graph: str, phase: int) -> PhaseContext:
        """A new context of a graph in a phase."""
        loaded, record = self._loaded, self._bundle.manifest.graphs[graph]
        what, cache = f"{graph} in phase {phase}", loaded.caches.get(graph)
        context = PhaseContext(self._gpu, loaded.engines[graph], what, loaded.launcher, cache)
        names = [*record.inputs, *record.outputs]
        profile, shapes = loaded.records[graph].profile_of(phase), self._varied[graph, phase]
        context.prepare(profile, shapes, self._blocks[graph], self._queues[graph], names)
        return context

    def _own_context(self, graph: str, phase: int) -> PhaseContext:
        """A context for one pass alone."""
        if (graph, phase) in self._unused:
            self._unused.discard((graph, phase))
            return self._contexts[graph, phase]
        return self._context(graph, phase)

    def _uncaptured(self, what: str, why: str) -> None:
        """Tell it once: it is the same for all passes."""
        if not self._told:
            self._told = True
            warnings.warn(
                f"{what} cannot be captured as a CUDA graph, and runs without, as may others: {why}",
                GoingOnWarning,
                stacklevel=2,
            )

    def _save_caches(self) -> None:
        for cache in self._loaded.caches.values():
            cache.save()

    def _scratch_for(self, graph: str, name: str, dtype: str) -> CudaTensor:
        """Memory of the largest phase. All passes of the graph use it, which run one after the other."""
        if (graph, name) not in self._scratch:
            of_graph = [context for (its, _), context in self._contexts.items() if its == graph]
            shape = max((context.shapes[name] for context in of_graph), key=math.prod)
            self._scratch[graph, name] = self.tensor(shape, dtype)
        return self._scratch[graph, name]

    def _block(self, *graphs: str) -> CudaTensor:
        """Activation memory for contexts of these graphs that run one after another, in any profile."""
        with self._gpu.asked("ask how much memory engines need"):
            nbytes = max(self._loaded.engines[graph].device_memory_size_v2 for graph in graphs)
        return self.tensor((nbytes,), "uint8")
