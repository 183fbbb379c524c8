"""What runs graphs. A backend opens a graph of a bundle and runs it on bound arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from forcingkv.headmaps.errors import InputError

__all__ = ["BACKENDS", "Backend", "RunnableGraph", "open_backend"]

Arrays = Mapping[str, npt.NDArray[Any]]
BACKENDS = ("onnxruntime",)


class RunnableGraph(Protocol):
    """A loaded graph."""

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        """Run on contiguous arrays, writing into `outputs`; outputs not named are not computed."""


class Backend(Protocol):
    """Loads graphs."""

    def load(self, path: Path) -> RunnableGraph:
        """Load an ONNX file."""


def open_backend(name: str, threads: int | None) -> Backend:
    """The backend of that name. Raises InputError naming those there are."""
    if name == "onnxruntime":
        from forcingkv.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(threads)
    raise InputError(
        f"there is no backend {name!r}", where="backend", expected=f"one of {', '.join(BACKENDS)}"
    )
