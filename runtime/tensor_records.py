"""What manifests say of a graph: its files, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE
from forcingkv.runtime.graph_records import CLEAN, DecoderSizes, Layout, layouts_without_graphs, next_name
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype


@dataclass(frozen=True)
class TensorRecord:
    """An input or output of a graph. A dimension that varies by phase has the name of its symbol."""

    dtype: str
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class GraphRecord:
    """One graph: its ONNX file, and what goes in and comes out."""

    file: str | None
    """None in bundles without graphs, which torch runs."""
    weights: str | None
    inputs: dict[str, TensorRecord]
    outputs: dict[str, TensorRecord]
    weight_bytes: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What ONNX Runtime holds of the weights once the graph is loaded; None where engines run it."""
    activation_bytes: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What ONNX Runtime needs at most for what is neither input nor output, in the phase that needs most."""
    torch_bytes: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What torch holds at most in a call of decoding or encoding beside weights and inputs, in float32; None
    of other graphs, and in bundles made before it was recorded."""

    @property
    def skips_caches(self) -> bool:
        """Whether the graph is told which pass is the clean one, and makes next caches in no other."""
        return CLEAN in self.inputs

    @property
    def for_torch(self) -> GraphRecord:
        """The record in a bundle without graphs."""
        return replace(self, file=None, activation_bytes=None)

    @property
    def carried(self) -> dict[str, TensorRecord]:
        """The inputs that an output of each call replaces in the next one."""
        return {name: record for name, record in self.inputs.items() if next_name(name) in self.outputs}


def tensor_records(
    plan: CachePlan, compute: Dtype, decoder: DecoderSizes
) -> dict[str, tuple[dict[str, TensorRecord], dict[str, TensorRecord]]]:
    """Name of each graph -> inputs and outputs, of a bundle without graphs.

    `decoder`: its sizes; what it carries is taken to be of the dtype that is computed in.
    """
    made = layouts_without_graphs(plan, compute, decoder.computing_in(compute))
    return {graph: as_records(layouts) for graph, layouts in made.items()}


def as_records(
    layouts: tuple[Mapping[str, Layout], Mapping[str, Layout]],
) -> tuple[dict[str, TensorRecord], dict[str, TensorRecord]]:
    """Inputs and outputs of a graph as a manifest has them."""
    inputs, outputs = layouts
    return (
        {name: TensorRecord(*layout) for name, layout in inputs.items()},
        {name: TensorRecord(*layout) for name, layout in outputs.items()},
    )
