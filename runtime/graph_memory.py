"""What ONNX Runtime needs in memory for a graph whose tensors are known.

A tensor lives from the node that makes it to the last one that reads it. So it does in ONNX Runtime 1.31 with
options that order nodes by their place in the file, keep no buffers for later tensors, and do not lay them
out ahead (docs/decisions/0014). It runs every node of a graph, whatever outputs are asked for, but those of
branches that are not taken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from forcingkv.runtime.graph_file import Model, Node
from forcingkv.runtime.graph_tensors import FORCINGKV, Shape, element_bytes

MOVES_NOTHING = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
"""Operators whose output is their first input's memory."""
IN_PLACE = {"Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh"}
"""Operators that may write over an operand of the output's size that nothing else reads."""
SCORING = ("DynamicPrune", "UnevenPrune")
"""The operators that score segments and choose; the others only follow."""


class NodeLike(Protocol):
    """A node of `graph_file`, or of onnx."""

    @property
    def op_type(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def input(self) -> Sequence[str]: ...
    @property
    def output(self) -> Sequence[str]: ...


def peak_bytes(
    nodes: Sequence[NodeLike],
    weights: Collection[str],
    outputs: Collection[str],
    shapes: Mapping[str, Shape],
    sizes: Mapping[str, int],
) -> int:
    """Bytes that a pass needs at most for what is neither input nor output nor weight.

    Args:
        nodes: in the order in which they run, none of them a branch.
        weights: names of the graph's initializers, since what follows from them alone is computed when it is
            loaded; nothing where it is computed in every pass.
        outputs: names of its outputs.
        shapes: of every tensor that attention reads.
        sizes: bytes of every tensor.
    """
    running = list(_running(nodes, weights))
    last = {name: place for place, node in enumerate(running) for name in node.input}
    owners: dict[str, str] = {}
    """Tensor -> the tensor whose memory it is in."""
    ends: dict[str, int] = {}
    live: dict[str, int] = {}
    ending: dict[int, list[str]] = {}
    """Place of a node -> the tensors that go after it, some of which were found to live longer."""
    peak = total = 0
    for place, node in enumerate(running):
        reads = [owners.get(name, name) for name in node.input]
        for name in node.output:
            if name and name not in outputs:
                owner = name
                if node.op_type in MOVES_NOTHING:
                    owner = reads[0]
                elif node.op_type in IN_PLACE:
                    free = (r for r in reads if ends.get(r) == place and live.get(r) == sizes[name])
                    owner = next(free, name)
                owners[name] = owner
                ends[owner] = max(ends.get(owner, 0), last.get(name, place))
                ending.setdefault(ends[owner], []).append(owner)
                if owner == name:
                    live[name] = sizes[name]
                    total += sizes[name]
        peak = max(peak, total + _scratch(node, shapes, sizes))
        for name in ending.pop(place, ()):
            if ends[name] == place and name in live:
                total -= live.pop(name)
    return peak


def _running(nodes: Iterable[NodeLike], weights: Iterable[str]) -> Iterator[NodeLike]:
    """The nodes that are not computed once, when the graph is loaded."""
    constant = set(weights)
    for node in nodes:
        if constant.issuperset(node.input):
            constant.update(node.output)
        else:
            yield node


def _scratch(node: NodeLike, shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> int:
    """Bytes a node needs while it runs, beyond its inputs and outputs."""
    given = [sizes.get(name, 0) for name in node.input]
    if node.op_type == "MultiHeadAttention":
        return sum(given[:3])  # a copy of each, in its own order
    if node.op_type == "Attention":
        _, heads, queries, _ = shapes[node.input[0]]
        return 4 * heads * queries * shapes[node.input[1]][2]
    if node.domain == FORCINGKV and len(given) >= 4:  # transition and new keys and values, joined
        keys, values = given[0] + given[2], given[1] + given[3]
        return max(keys + values, 5 * keys) if node.op_type in SCORING else keys + values
    return 0


def weight_bytes(model: Model, *, folded: bool = True) -> int:
    """Bytes of a graph's weights as ONNX Runtime holds them once it is loaded.

    Those that are cast are held as what they are cast to. Of matrices to multiply by there is one copy, in an
    order of the processor's own: the file's pages are let go. Of a graph that is not `folded` they are those
    of the file, which a CPU reads where the system has them.
    """
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node if folded else ():
        if node.op_type == "Cast" and node.input[0] in kinds:
            kinds[node.input[0]] = _cast_to(node)
    return sum(math.prod(t.dims) * element_bytes(kinds[t.name]) for t in model.graph.initializer)


def _cast_to(node: Node) -> int:
    kind = node.attributes["to"]
    assert isinstance(kind, int)
    return kind
