"""Holding a session in the middle of something, so that what else is done then is done then for certain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from forcingkv.runtime.backends import Lane, Pass, Tensor
from forcingkv.runtime.backends.host import HostTensor
from forcingkv.runtime.backends.onnxruntime import OnnxLane

T = TypeVar("T")
PATIENCE = 30
"""Seconds after which a test fails rather than hangs."""


class Gate:
    """Somebody who comes to it while it is shut waits there."""

    def __init__(self) -> None:
        self._open, self._reached = threading.Event(), threading.Event()
        self._open.set()

    def pass_through(self) -> None:
        if not self._open.is_set():
            self._reached.set()
            assert self._open.wait(PATIENCE), "nobody opened the gate"

    @contextmanager
    def holding(self, doing: Callable[[], T]) -> Iterator[Future[T]]:
        """While `doing`, in a thread of its own, waits at the gate. It has ended when the block has."""
        self._open.clear()
        self._reached.clear()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(doing)
            try:
                assert self._reached.wait(PATIENCE), done.exception(0) if done.done() else "it never came"
                yield done
            finally:
                self._open.set()
            done.exception(PATIENCE)


class GatedLane(OnnxLane):
    """Waits at a gate before each pass, and before it hands out or takes in what belongs to the state."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.gate = Gate()

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        made = super().tensor(shape, dtype, state=state)
        if state:
            assert isinstance(made, HostTensor)
            made.write = gated(self.gate, made.write)  # type: ignore[method-assign]
            made.fetch = gated(self.gate, made.fetch)  # type: ignore[method-assign]
        return made

    def bind(
        self, graph: str, phase: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Pass:
        bound = super().bind(graph, phase, inputs, outputs)
        bound.run = gated(self.gate, bound.run)  # type: ignore[method-assign]
        return bound

    def sibling(self) -> Lane:
        return OnnxLane(self._loaded(), self._chosen)


def gated(gate: Gate, doing: Callable[..., T]) -> Callable[..., T]:
    def wait_and_do(*given: object) -> T:
        gate.pass_through()
        return doing(*given)

    return wait_and_do
