"""Passes of torch as CUDA graphs: captured once, replayed from then on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from forcingkv.runtime.backends.torch_device import StreamQueue, TorchQueue
from forcingkv.runtime.faults import ran_out_of_memory


def graph_pool() -> Any:
    """Memory that all graphs of a lane share for what lies between their inputs and outputs: they run one
    after the other, and what they give lies elsewhere."""
    return torch.cuda.graph_pool_handle()


class CaptureWarning(UserWarning):
    """A pass could not be captured, and goes on without."""


class Captured:
    """Runs work that is the same each time: the first time as it is, so that everything is loaded and
    allocated; the second time captured; then replayed. Where it cannot be captured, that is said once."""

    def __init__(self, queue: TorchQueue, what: str, pool: Any) -> None:
        """`pool` is that of all graphs of a lane (`graph_pool`)."""
        self._queue, self._what, self._pool = queue, what, pool
        self._graph: Any = None
        self._ran = self._refused = False

    def run(self, work: Callable[[], None]) -> None:
        """Do the work once, in the order of the queue."""
        if self._graph is not None:
            self._graph.replay()
            return
        if self._ran and not self._refused:
            self._capture(work)
        if self._graph is None:
            work()
        else:
            self._graph.replay()  # capturing does nothing of it
        self._ran = True

    def _capture(self, work: Callable[[], None]) -> None:
        assert isinstance(self._queue, StreamQueue), "devices without streams are refused before"
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: what other sessions allocate meanwhile does not spoil it.
            mode = "thread_local"
            with torch.cuda.graph(graph, self._pool, self._queue.stream, capture_error_mode=mode):
                work()
        except Exception as error:  # torch has no class of its own for what cannot be captured
            with suppress(Exception):
                graph.reset()
            if ran_out_of_memory(error):
                raise
            self._refused = True
            text = f"{self._what} cannot be captured as a CUDA graph, and goes on without ({error})"
            warnings.warn(text, CaptureWarning, stacklevel=2)
            return
        self._graph = graph
