"""Attention in graphs for TensorRT: what it takes with a fused kernel, and what without one.

A fused kernel keeps the scores of queries and keys on the chip. Where TensorRT has none for a shape it may
compute attention in steps instead, and writes all scores to memory: at 1080P tens of gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper

from forcingkv.export.activations import element_bytes, inferred, known_tensors
from forcingkv.prune.onnx_operators import OPSET
from forcingkv.runtime.graph_tensors import Shape

SLACK = 4
"""As many times the tensors of its largest attention and its largest tensor the activations of an engine with
fused kernels are at most. Seen: 1.4 times, two layers at 480P."""
WORKSPACE = 16 << 20
"""Bytes that the activations of a small engine are at most: products take workspace. The demo's: 9 MB."""


@dataclass(frozen=True)
class Attention:
    """The sizes of an Attention node, in the phase in which it has most keys."""

    batch: int
    heads: int
    queries: int
    key_heads: int
    """Heads of keys and values; queries of several heads may share one."""
    keys: int
    width: int
    dtype: int
    """ONNX's number of it."""

    @property
    def scores_bytes(self) -> int:
        """Bytes of its scores, written out once."""
        return self.batch * self.heads * self.queries * self.keys * element_bytes(self.dtype)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of queries, keys, values and the result."""
        rows = 2 * self.heads * self.queries + 2 * self.key_heads * self.keys
        return self.batch * rows * self.width * element_bytes(self.dtype)

    def __str__(self) -> str:
        dtype = helper.tensor_dtype_to_np_dtype(self.dtype).name
        return (
            f"attention of {self.heads} head{'s' * (self.heads > 1)} of width {self.width} in {dtype},"
            f" {self.queries:,} queries and {self.keys:,} keys"
        )

    def write(self, path: Path) -> None:
        """Write a graph of such a node alone, which TensorRT may not decompose."""
        inner = [self.batch, self.key_heads, self.keys, self.width]
        outer = [self.batch, self.heads, self.queries, self.width]
        inputs = [
            helper.make_tensor_value_info(name, self.dtype, shape)
            for name, shape in (("queries", outer), ("keys", inner), ("values", inner))
        ]
        output = helper.make_tensor_value_info("seen", self.dtype, outer)
        node = helper.make_node("Attention", [value.name for value in inputs], ["seen"], scale=1.0)
        graph = helper.make_graph([node], "attention", inputs, [output])
        opsets = [helper.make_opsetid("", OPSET)]
        onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


@dataclass(frozen=True)
class Attentions:
    """Those of a graph.

    Attributes:
        nodes: those with most scores first, each with the names of the nodes that are alike.
        largest: bytes of the largest tensor that the graph computes, in any phase.
    """

    nodes: Mapping[Attention, Sequence[str]]
    largest: int

    @property
    def activation_bound(self) -> int:
        """Bytes of activations that an engine stays under whose attention writes out no scores.

        An engine holds a few tensors at a time: the bound is `SLACK` times what the graph's largest attention
        takes and gives, and its largest tensor. Scores grow with the product of queries and keys, and leave
        the bound behind.
        """
        attention = max((each.tensor_bytes for each in self.nodes), default=0)
        return max(WORKSPACE, SLACK * (attention + self.largest))


def attentions_of(model: onnx.ModelProto, phases: Sequence[Mapping[str, Shape]]) -> Attentions:
    """The attentions of a graph. `phases` has for each phase the shape of every input that varies."""
    named: dict[str, Attention] = {}
    largest = 0
    for given in phases or [{}]:
        known = known_tensors(inferred(model, given))
        for node in model.graph.node:
            made = (known[name] for name in node.output if name in known)
            largest = max([largest, *(math.prod(shape) * element_bytes(kind) for kind, shape in made)])
            if node.op_type == "Attention":
                dtype, (batch, heads, queries, width) = known[node.input[0]]
                _, (_, key_heads, keys, _) = known[node.input[1]]
                seen = Attention(batch, heads, queries, key_heads, keys, width, dtype)
                name = node.name or node.output[0]
                if name not in named or keys > named[name].keys:
                    named[name] = seen
    alike: dict[Attention, list[str]] = {}
    for name, each in sorted(named.items(), key=lambda item: -item[1].scores_bytes):
        alike.setdefault(each, []).append(name)
    return Attentions(alike, largest)
