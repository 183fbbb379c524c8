"""A stand-in for TensorRT's engines: the demo model in torch, behind TensorRT's API, on addresses in memory.

On a GPU everything but the engines is real: streams, events, captured graphs, memory, and the kernels of
DynamicPrune, which the plugins' launch puts into the stream. What the backend asks of TensorRT is answered by
`tests/runtime/fake_engines`, which the tests keep in step with the backend. Without a GPU the device is
`tests/runtime/fake_cuda` too, and torch computes on the host.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from forcingkv.export.bake import baked_model
from forcingkv.export.bundle_parts import WEIGHTS
from forcingkv.export.graphs import Graph, decode_graph, prompt_graph, step_graph
from forcingkv.models import kv_roles
from forcingkv.prune.launcher import KernelLauncher
from forcingkv.prune.plugin import DynamicPrune, DynamicPruneFollow, launch
from forcingkv.runtime import Session
from forcingkv.runtime.bundle import GRAPHS, Bundle
from tests.runtime import engine_world
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_engines import FakeTensorRT, Runner
from tools.gpu_check.check import Check
from tools.gpu_check.pruning import core, launcher

Shape = tuple[int, ...]


class StandIn:
    """The demo model's bundle with engines that torch computes.

    Attributes:
        bundle: the bundle.
        runs: for each graph how many times it was computed.
        after: called after each computation with graph, its number, and the outputs; it may change them.
    """

    def __init__(self, check: Check, patch: pytest.MonkeyPatch) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device = "cuda" if check.gpu else "cpu"
        if not check.gpu:
            torch.set_num_threads(1)  # sizes at which more threads only wait for each other
        folder = check.kit.demo()
        self.bundle, made = engine_world._opened(folder)
        self.runs: Counter[str] = Counter()
        self.after: Callable[[str, int, Mapping[str, Tensor]], None] = lambda graph, number, outputs: None
        torch_graphs = _graphs(Bundle.open(folder), folder, device)
        runners: dict[str, Any] = {
            name: TorchRunner(self, name, made[name], torch_graphs[name], device) for name in GRAPHS
        }
        device_of: Any = RealCuda if check.gpu else FakeCuda
        self.cuda = device_of()
        self._tensorrt = FakeTensorRT(self.cuda, runners)
        self._tensorrt.install(patch)
        if check.gpu:
            patch.setitem(sys.modules, "cuda.core", core())
            loaded = launcher(check, "float32", self.bundle.plan.spec.head_dim)
            patch.setattr(kv_roles, "prune_score", partial(_score, loaded))
            patch.setattr(kv_roles, "prune_follow", partial(_follow, loaded))

    def session(self, **options: Any) -> Session:
        """A session on the engines."""
        self._tensorrt.users.clear()  # an earlier session's memory may be another stream's now
        return Session.open(self.bundle, backend="tensorrt-rtx", preflight=False, **options)

    def settle(self) -> None:
        """Have all computed that was put into streams, so that `runs` counts it."""
        if isinstance(self.cuda, FakeCuda):
            for stream in list(self.cuda.streams.values()):
                stream.drain()


@contextmanager
def stand_in(check: Check) -> Iterator[StandIn]:
    """The stand-in, until this ends."""
    what = "the demo model in torch behind TensorRT's API"
    check.stands_in(what if check.gpu else f"{what}, on a cuda.core whose device is the host")
    with pytest.MonkeyPatch.context() as patch:
        yield StandIn(check, patch)


def _graphs(bundle: Bundle, folder: Path, device: str) -> dict[str, Graph]:
    """The graphs that were exported, on a device."""
    plan = bundle.plan
    model = baked_model(plan.spec, folder / WEIGHTS).to(device)
    made = prompt_graph(model), step_graph(model, plan), decode_graph(plan)
    return dict(zip(GRAPHS, made, strict=True))


class TorchRunner(Runner):
    """A graph in torch, on addresses; what `Runner` asked ONNX Runtime for is taken over from one."""

    def __init__(self, owner: StandIn, name: str, known: Runner, graph: Graph, device: str) -> None:
        self.__dict__ |= known.__dict__
        self._owner, self._name, self._graph, self._device = owner, name, graph, device
        self._pools: dict[int, Any] = {}

    def run(self, phase: int, addresses: Mapping[str, int]) -> None:
        """Compute all outputs, in the stream that work is being put into."""
        with ExitStack() as stack, torch.inference_mode():
            if self._device == "cuda":
                handle = Stream.current
                stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(handle)))
                # Of its own for each stream, and kept: a captured graph uses its memory at each replay.
                if handle not in self._pools:
                    self._pools[handle] = torch.cuda.MemPool()
                stack.enter_context(torch.cuda.use_mem_pool(self._pools[handle]))
            at = {name: self._at(phase, name, address) for name, address in addresses.items()}
            made = self._graph.run({name: at[name] for name in self.inputs})
            outputs = {n: t for n, t in zip(self._graph.outputs, made, strict=True) if n in at}
            for name, tensor in outputs.items():
                at[name].copy_(tensor)
            self._owner.runs[self._name] += 1
            self._owner.after(self._name, self._owner.runs[self._name], {n: at[n] for n in outputs})

    def _at(self, phase: int, name: str, address: int) -> Tensor:
        return tensor_at(address, self.phases[phase][name], self.dtypes[name], self._device)


def tensor_at(address: int, shape: Shape, dtype: np.dtype[Any], device: str) -> Tensor:
    """A tensor over memory that something else holds."""
    if not np.prod(shape):
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
    if device == "cuda":
        told = {"shape": shape, "typestr": dtype.str, "data": (address, False), "version": 2}
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=told), device="cuda")
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype).reshape(shape)
    return torch.from_numpy(array)


def _score(loaded: KernelLauncher, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`prune.reference.prune_score` by the kernels, as the plugin launches them."""
    inputs, operator = given[:4], DynamicPrune(*given[4:])
    sizes = operator.sizes([tuple(one.shape) for one in inputs])
    shape = (sizes.batch, sizes.heads, sizes.kept * sizes.segment_tokens, inputs[2].shape[3])
    indices = torch.empty(sizes.kept, dtype=torch.int64, device="cuda")
    outputs = [inputs[2].new_empty(shape), inputs[2].new_empty(shape), indices]
    workspace = torch.empty(sizes.workspace_bytes, dtype=torch.uint8, device="cuda")
    _launch(loaded, sizes, inputs, outputs, workspace)
    return outputs[0], outputs[1], outputs[2]


def _follow(loaded: KernelLauncher, *given: Any) -> tuple[Tensor, Tensor]:
    """`prune.reference.prune_follow` by the kernel."""
    inputs, (frame_tokens, segments) = given[:5], given[5:]
    sizes = DynamicPruneFollow(frame_tokens // segments).sizes([tuple(one.shape) for one in inputs])
    shape = (sizes.batch, sizes.heads, sizes.kept * sizes.segment_tokens, inputs[2].shape[3])
    outputs = [inputs[2].new_empty(shape), inputs[2].new_empty(shape)]
    _launch(loaded, sizes, inputs, outputs, None)
    return outputs[0], outputs[1]


def _launch(loaded: KernelLauncher, sizes: Any, inputs: Any, outputs: Any, workspace: Tensor | None) -> None:
    held = [tensor.contiguous() for tensor in inputs]  # slices of a pass's keys, which TensorRT lays apart
    pointers = [tensor.data_ptr() if tensor.numel() else 0 for tensor in held]
    to = [tensor.data_ptr() for tensor in outputs]
    stream = torch.cuda.current_stream().cuda_stream
    launch(loaded, sizes, pointers, to, workspace.data_ptr() if workspace is not None else 0, stream)


class Stream:
    """A real stream as `FakeTensorRT` uses one: what is put in is launched at once.

    Attributes:
        current: the handle of the stream that work is being put into.
    """

    current = 0
    busy = False
    capturing = None

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def put(self, work: Callable[[], object]) -> None:
        """Launch it in this stream."""
        before, Stream.current = Stream.current, self._handle
        try:
            work()
        finally:
            Stream.current = before


class Streams(dict[int, Stream]):
    """Streams by handle, whoever made them."""

    def __missing__(self, handle: int) -> Stream:
        self[handle] = Stream(handle)
        return self[handle]


class RealCuda:
    """What `FakeTensorRT` asks of its device, where the device is real and looks after itself."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.live: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.trace: list[tuple[Any, ...]] = []
        self.streams = Streams()
        self.clock, self.fail_at, self.left = 0, None, dict[str, int]()
        self.here, self.lost = 0, None

    def called(self, name: str, device: int | None = None) -> None:
        """Nothing is recorded."""

    def bytes_at(self, address: int, nbytes: int) -> Any:
        """Nothing that could be looked at."""
        return SimpleNamespace(fill=lambda value: None)
