"""ONNX Runtime: on the CPU, or on what else one of its providers runs (`ort_providers`).

Arrays are numpy's. What a session carries from pass to pass (caches, keys and values of the prompt) lies in
the provider's own memory where Python can take some (`StateTensor`); the rest lies in the host's.
"""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Array, Lane, LaneOptions, Pass, Queue, Tensor
from forcingkv.runtime.backends.host import HostQueue, HostTensor
from forcingkv.runtime.backends.linked_graphs import graph_and_folder
from forcingkv.runtime.backends.ort_placement import RECORD, Placement, placement_of
from forcingkv.runtime.backends.ort_providers import ON_CPU, ON_THE_CPU, Chosen, choose_provider
from forcingkv.runtime.backends.ort_state import StateTensor, viewer_of
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.devices import ADVICE, is_sticky
from forcingkv.runtime.faults import DeviceError, MemoryShortError, SessionError, ran_out_of_memory
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.graph_records import UNFOLDED
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.memory import available_bytes, trim
from forcingkv.runtime.spec import Dtype
from forcingkv.runtime.threads import chosen_threads

FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for graphs that it is given by content."""
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
    """Load the graphs of a bundle for the provider that the options ask for (`choose_provider`).

    Raises InputError for a bundle that was made for TensorRT, for an ONNX Runtime that is too old, and what
    `choose_provider` raises; DeviceError where the provider does not start: no other is taken in its place.
    """
    options.refuse("dtype", "cuda_graphs", "compiled")
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
    chosen = choose_provider(options)
    threads = chosen_threads(options.threads).number
    ample = available_bytes() >= AMPLE_ROOM * sum(footprint(bundle.manifest, bundle.plan).values())
    graphs = {}
    for graph in bundle.manifest.graph_names:
        small = (bundle.manifest.graphs[graph].activation_bytes or 0) < LARGE_ACTIVATIONS
        folded = graph not in UNFOLDED
        graphs[graph] = OnnxGraph(
            bundle.graph(graph),
            threads,
            chosen,
            # What is run once a switch is not to keep memory that chunks could have.
            arena=folded and (ample or small),
            folded=folded,
            weights=bundle.weights(graph),
            content=bundle.graph_content(graph),
        )
    return OnnxLane(graphs, chosen, threads)


class OnnxGraph:
    """One graph, loaded.

    Attributes:
        placement: which provider runs how many of its nodes.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        chosen: Chosen = ON_CPU,
        *,
        arena: bool = True,
        folded: bool = True,
        weights: Path | None = None,
        content: bytes | None = None,
    ) -> None:
        """Load an ONNX file.

        Args:
            path: the file.
            threads: CPU threads; None: as `cpu_threads` says.
            chosen: what runs the nodes.
            arena: whether memory of a pass is kept for the next one.
            folded: whether what follows from weights alone is computed now, and matrices are put into an
                order that is faster to multiply by; else both are done in every pass, and the weights stay
                where the file has them.
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
        options.add_session_config_entry(RECORD, "1")
        if not folded:
            options.add_session_config_entry("session.disable_prepacking", "1")
            # It would compute what follows from weights now. And nodes that it makes of others it runs after
            # those of the file: first all that need nothing but weights.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        graph, folder = graph_and_folder(path, weights, content)
        if folder is not None:
            options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(folder))
        try:
            # Without its own way out, which is to print on standard output and to take the CPU.
            self._session = ort.InferenceSession(graph, options, providers=chosen.asked, enable_fallback=0)
        except Exception as error:  # ONNX Runtime has a class of its own for each status
            raise _fault(f"loading {path.name}", error, chosen) from error
        _loaded.add(self)
        self._chosen, name = chosen, chosen.provider.name
        if self._session.get_providers()[0] != name:
            what = f"ONNX Runtime has {name}, but could not start it for {path.name}"
            raise DeviceError(f"{what}: {_way_round(chosen)}")
        self.placement = placement_of(self._session, name)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> OnnxPass:
        """A pass over tensors of this module."""
        binding, copied = self._session.io_binding(), self._copied(inputs)
        kept = {name: tensor for name, tensor in inputs.items() if name not in copied}
        for bind, tensors in ((binding.bind_input, kept), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                _bind(bind, name, tensor)
        return OnnxPass(self._session, binding, (kept, outputs), copied)

    def view(self, tensor: StateTensor) -> Any:
        """An OrtValue on the memory of a tensor, in its shape."""
        return viewer_of(self._session)(tensor)

    def _copied(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs that ONNX Runtime copies when they are bound, and does not look at again: those that lie in
        other memory than where the graph takes them (`IOBinding::BindInput` in its sources). A pass that was
        bound once would go on with the first chunk's. The graph says where it takes each input. Where it
        says nothing, and of the host's memory under any provider but the CPU's, they are taken to be copied:
        to bind one too often costs microseconds.
        """
        if self._chosen.key == "cpu":
            return {}
        try:
            names = [one.name for one in self._session.get_inputs()]
            infos = dict(zip(names, self._session.get_input_memory_infos(), strict=True))
        except Exception:  # not in this version, or a class of ONNX Runtime's own
            infos = {}

        def lies_there(name: str, tensor: Any) -> bool:
            info = infos.get(name)
            where = None if info is None else (info.name.lower(), info.device_id)
            return tensor.device != "cpu" and where == (tensor.device, tensor.number)

        return {name: tensor for name, tensor in inputs.items() if not lies_there(name, tensor)}

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run on contiguous arrays, writing into `outputs`; outputs not named go nowhere."""
        given, taken = ({n: HostTensor(array) for n, array in arrays.items()} for arrays in (inputs, outputs))
        self.bind(given, taken).run()


def _bind(bind: Any, name: str, tensor: Any) -> None:
    bind(name, tensor.device, tensor.number, np.dtype(tensor.dtype), tensor.shape, tensor.address)


_loaded: weakref.WeakSet[OnnxGraph] = weakref.WeakSet()


def _keep_in_forked_process() -> None:
    """A process that was forked has none of ONNX Runtime's threads, and to free a graph waits for them."""
    for graph in _loaded:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph._session))


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_keep_in_forked_process)


class OnnxPass:
    """A binding, kept so that little is bound in the loop, with the tensors whose addresses it has."""

    def __init__(
        self,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        tensors: tuple[Mapping[str, Any], Mapping[str, Any]],
        copied: Mapping[str, Any] | None = None,
    ) -> None:
        """Of a binding of those inputs and outputs; `copied` are inputs to be bound for each run anew."""
        self._session, self._binding, self._tensors = session, binding, tensors
        self._copied = copied or {}

    def run(self) -> None:
        """Raises MemoryShortError, or DeviceError for any other failure."""
        try:
            for name, tensor in self._copied.items():
                _bind(self._binding.bind_input, name, tensor)
            if self._copied:
                self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding)
            if self._copied and not self._tensors[0]:
                # Else each pass would keep a copy of all caches in the provider's memory.
                self._binding.clear_binding_inputs()
        except Exception as error:
            raise _fault("a pass", error) from error


class TrimmedPass:
    """A pass that is seldom run: what the C library keeps of its memory is given back after it."""

    def __init__(self, bound: OnnxPass) -> None:
        self._bound = bound

    def run(self) -> None:
        """Raises as `OnnxPass.run`."""
        self._bound.run()
        trim()


class OnnxLane:
    """The graphs, and memory of one session. All work is done at once, so its two queues are one.

    Attributes:
        placement: for each graph which provider runs how many of its nodes.
    """

    def __init__(
        self, graphs: Mapping[str, OnnxGraph], chosen: Chosen = ON_CPU, threads: int | None = None
    ) -> None:
        self._graphs, self._chosen, self._threads = graphs, chosen, threads
        count = chosen_threads(threads).number
        on_cpu = f"the CPU, {count} thread{'s'[: count > 1]}"
        self.runs_on = on_cpu if chosen.key == "cpu" else chosen.title
        self.main: Queue = HostQueue()
        self.side: Queue = self.main
        self.lookahead = 0
        self.recaches = "recache" in graphs
        self.in_place = False  # an output may be written before an input of other nodes is read
        self.copies = chosen.provider.state == "cpu"

    @property
    def placement(self) -> dict[str, Placement]:
        return {name: graph.placement for name, graph in self._loaded().items()}

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        device = self._chosen.provider.state
        if state and device != "cpu":
            viewer = next((graph.view for graph in self._graphs.values()), None)
            return StateTensor.make(shape, dtype, device, self._chosen.number, viewer)
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
        bound = self._loaded()[graph].bind(inputs, outputs)
        return TrimmedPass(bound) if graph in UNFOLDED else bound

    def warm(self, passes: Callable[[], None]) -> None:
        """Nothing is slower at first."""

    def sibling(self) -> Lane:
        return type(self)(self._loaded(), self._chosen, self._threads)

    def close(self) -> None:
        """ONNX Runtime gives memory back with its last graph; the C library, where it is asked to."""
        self._graphs = {}
        trim()

    def _loaded(self) -> Mapping[str, OnnxGraph]:
        graphs = self._graphs  # once: another thread may close the lane
        if not graphs:
            raise DeviceError("the lane is closed")
        return graphs


def _fault(doing: str, error: Exception, chosen: Chosen = ON_CPU) -> SessionError:
    """ONNX Runtime's error as one of ours. `chosen` is what was to be started."""
    text = " ".join(str(error).split())
    if is_sticky(text):
        return DeviceError(f"ONNX Runtime failed in {doing} ({text}), and {ADVICE}")
    if ran_out_of_memory(error):
        return MemoryShortError(f"ONNX Runtime ran out of memory in {doing} ({text})")
    way_round = f": {_way_round(chosen)}" if chosen.key != "cpu" else ""
    return DeviceError(f"ONNX Runtime failed in {doing} ({text}){way_round}")


def _way_round(chosen: Chosen) -> str:
    around = f"choose --backend {ON_THE_CPU} to run on the CPU"
    if "cuda" not in chosen.provider.devices:
        return around
    title = chosen.provider.title
    return f"{around}, or mend {title}: its version is to be the one that this ONNX Runtime was built for"
