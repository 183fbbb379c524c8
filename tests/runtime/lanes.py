"""The backends on which every test of a session runs, and lanes of theirs that differ in one thing.

Tests take the fixture `on`, which is each of `BACKENDS` in turn: `pytest tests/runtime -k torch`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from forcingkv.runtime import Bundle, MemoryShortError, Session
from forcingkv.runtime.backends import LaneOptions, Pass, Tensor
from forcingkv.runtime.backends.onnxruntime import OnnxGraph, OnnxLane
from forcingkv.runtime.backends.ort_state import StateTensor


class Plain:
    """A lane as it is."""


class Ahead:
    """Begins a chunk before the one before is waited for, as lanes on a GPU do."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.lookahead = 1


class Failing:
    """Runs out of memory in the pass of that number, counted from the last setting."""

    fails_in: int | None = None

    def bind(
        self, graph: str, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Pass:
        return FailingPass(self, super().bind(graph, phase, inputs, outputs))  # type: ignore[misc]


class FailingPass:
    def __init__(self, lane: Failing, bound: Pass) -> None:
        self._lane, self._bound = lane, bound

    def run(self) -> None:
        if self._lane.fails_in is not None:
            self._lane.fails_in -= 1
            if self._lane.fails_in < 0:
                raise MemoryShortError("as a test asked for")
        self._bound.run()


class Full:
    """Has no memory for any tensor."""

    def tensor(self, *_: Any, **__: Any) -> Any:
        raise MemoryShortError("no memory for a tensor")


class OwnState(OnnxLane):
    """Keeps its state in ONNX Runtime's memory, as where the CUDA provider runs."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.copies = False

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        if state:
            return StateTensor.make(shape, dtype, "cpu", 0, self._loaded()["step"].view)
        return super().tensor(shape, dtype)


@cache
def changed(base: type, kind: type) -> type:
    """The class of a backend's lanes with what a class of this module changes."""
    return kind if issubclass(kind, base) else type(kind.__name__, (kind, base), {})


@dataclass(frozen=True)
class On:
    """A backend, and what tests of sessions have to know of it."""

    name: str
    first: Callable[[Bundle, type], Any]
    """The first lane on a bundle, of a class of `changed`."""
    another: Callable[[Any, type], Any]
    """A further lane on the weights of one."""
    weights: Callable[[Any], list[Any]]
    """What a lane holds weights in; nothing once it is closed."""

    def open(self, bundle: Path | Bundle, **options: Any) -> Session:
        """`Session.open` on this backend."""
        return Session.open(bundle, backend=self.name, **options)

    def open_with(self, path: Path, kind: type) -> tuple[Session, Any]:
        """A session whose lane differs as a class of this module says, and the lane."""
        bundle = self.of(Bundle.open(path))
        lane = self.first(bundle, kind)
        return Session(bundle, self.options, lane, "host"), lane

    def of(self, bundle: Bundle) -> Bundle:
        """A bundle as sessions on this backend have it."""
        return bundle.computing_in(None) if self.name == "torch" else bundle

    @property
    def options(self) -> LaneOptions:
        return LaneOptions(self.name)

    def held(self, lane: Any) -> list[weakref.ref[Any]]:
        """Whether the weights of a lane are still there."""
        return [weakref.ref(each) for each in self.weights(lane)]


def _onnx_lane(bundle: Bundle, kind: type) -> Any:
    graphs = {name: OnnxGraph(bundle.graph(name), 1) for name in bundle.manifest.graph_names}
    return changed(OnnxLane, kind)(graphs)


def _torch_lane(bundle: Bundle, kind: type) -> Any:
    from forcingkv.runtime.backends.torch_lane import TorchLane, open_lane

    plain = open_lane(bundle, LaneOptions("torch"))
    made = changed(TorchLane, kind)(bundle, plain._weights(), cuda_graphs=False)
    plain.close()
    return made


def _torch_sibling(lane: Any, kind: type) -> Any:
    from forcingkv.runtime.backends.torch_lane import TorchLane

    return changed(TorchLane, kind)(lane._bundle, lane._weights(), cuda_graphs=False)


ONNX = On(
    "onnxruntime",
    _onnx_lane,
    lambda lane, kind: changed(OnnxLane, kind)(lane._graphs),
    lambda lane: [*lane._graphs.values()],
)
TORCH = On("torch", _torch_lane, _torch_sibling, lambda lane: [lane._loaded.model] if lane._loaded else [])
BACKENDS = ONNX, TORCH
"""The backends that run on any machine: all tests of sessions are of each."""
