"""The shape of every tensor of a graph, and the arithmetic, from the shapes of its inputs: before it runs.

An operator has a rule (`graph_rules`), or it is refused. So what a graph takes of memory and time is known
without running it, whoever made it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from forcingkv.runtime.graph_file import Graph, Node
from forcingkv.runtime.graph_rules import RULES
from forcingkv.runtime.graph_tensors import LEFT_OUT, MOST_ELEMENTS, Known, SizeError


def flat_nodes(graph: Graph, *, taken: bool) -> list[Node]:
    """The nodes that run, those of branches in the place of their `If`, under the names that the `If` gives.

    `taken` says which branch each `If` takes: they all have one condition.
    """
    flat = []
    for outer in graph.node:
        if outer.op_type != "If":
            flat.append(outer)
            continue
        branch = outer.attributes["then_branch" if taken else "else_branch"]
        assert isinstance(branch, Graph)
        names = {value.name: name for value, name in zip(branch.output, outer.output, strict=True)}
        for node in branch.node:
            inputs, outputs = ([names.get(n, n) for n in each] for each in (node.input, node.output))
            flat.append(Node(node.op_type, node.domain, inputs, outputs, node.attributes))
    return flat


class Sizes(NamedTuple):
    """What follows from the shapes of a graph's inputs."""

    tensors: dict[str, Known]
    operations: int
    """Floating-point operations: two a multiply-add, and one for each number that another operator makes."""


def follow(nodes: Sequence[Node], given: Mapping[str, Known]) -> Sizes:
    """All tensors that nodes make of those given. Raises SizeError, naming the node."""
    tensors, operations = dict(given), 0
    for node in nodes:
        try:
            inputs = [tensors[name] if name else LEFT_OUT for name in node.input]
            made = RULES[node.domain, node.op_type](node, inputs)
            if len(made) != len(node.output):
                raise SizeError(f"it has {len(node.output)} results")
            for name, known in zip(node.output, made, strict=True):
                if any(size < 0 for size in known.shape) or known.elements > MOST_ELEMENTS:
                    raise SizeError(f"its result has the shape {list(known.shape)}")
                tensors[name] = known
            operations += _operations(node, inputs, made)
        except (ValueError, LookupError, TypeError, OverflowError, ArithmeticError) as error:
            name = node.output[0] if node.output else ""
            raise SizeError(f"what {node.op_type} makes ({name[:80]}) cannot be known: {error}") from error
    return Sizes(tensors, operations)


def _operations(node: Node, inputs: list[Known], made: list[Known]) -> int:
    out = sum(known.elements for known in made)
    if node.op_type == "MatMul":
        return 2 * out * inputs[0].shape[-1]
    if node.op_type == "Gemm":
        return 2 * out * inputs[0].shape[0 if node.attributes.get("transA") else 1]
    if node.op_type == "Conv":
        return 2 * out * math.prod(inputs[1].shape[1:])
    if node.op_type in ("Attention", "MultiHeadAttention"):
        queries, keys = inputs[0], inputs[1]
        return 4 * queries.elements * keys.shape[-2]
    return out
