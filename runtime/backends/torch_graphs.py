"""Passes of torch as CUDA graphs: captured once, replayed from then on."""

from __future__ import annotations

import threading
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


_CAPTURING = threading.Lock()
"""To begin capturing, torch waits for the whole device, which nobody may while another thread captures."""


class Captured:
    """Runs work that is the same each time: the first time as it is, so that everything is loaded and
    allocated; the second time captured; then replayed. Where it cannot be captured, that is said once.

    Attributes:
        capturing: whether what runs now is being captured, for all later times.
    """

    def __init__(self, queue: TorchQueue, what: str, pool: Any) -> None:
        """`pool` is that of all graphs of a lane (`graph_pool`)."""
        self._queue, self._what, self._pool = queue, what, pool
        self._graph: Any = None
        self._ran = self._refused = self.capturing = False

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
        # Of this thread alone: what other sessions allocate meanwhile does not spoil it.
        how: Any = {"pool": self._pool, "stream": self._queue.stream}
        try:
            with _CAPTURING, torch.cuda.graph(graph, capture_error_mode="thread_local", **how):
                self.capturing = True
                work()
        except Exception as error:  # torch has no class of its own for what cannot be captured
            with suppress(Exception):
                graph.reset()
            first: BaseException = error
            while first.__context__ is not None:  # that capturing cannot be ended is told on top of it
                first = first.__context__
            if ran_out_of_memory(str(first)) or isinstance(first, MemoryError | torch.OutOfMemoryError):
                raise first from None
            self._refused = True
            text = f"{self._what} cannot be captured as a CUDA graph, and goes on without ({first})"
            warnings.warn(text, CaptureWarning, stacklevel=2)
            return
        finally:
            self.capturing = False
        self._graph = graph
