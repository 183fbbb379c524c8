"""The shape of every tensor of a graph, and the arithmetic, from the shapes of its inputs: before it runs.

An operator has a rule (`graph_rules`), or it is refused. So what a graph takes of memory and time is known
without running it, whoever made it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from forcingkv.headmaps.fields import shown
from forcingkv.runtime.graph_file import Graph, Node
from forcingkv.runtime.graph_rules import RULES
from forcingkv.runtime.graph_tensors import LEFT_OUT, MOST_ELEMENTS, MOST_RANK, Known, Shape, SizeError


def flat_nodes(graph: Graph) -> list[Node]:
    """The nodes as they run with `clean`, those of branches taken in the place of their `If`, under the names
    that the `If` gives. Without `clean` some of the same nodes run (`graph_check` sees to it).
    """
    flat = []
    for outer in graph.node:
        if outer.op_type != "If":
            flat.append(outer)
            continue
        branch = outer.attributes["then_branch"]
        assert isinstance(branch, Graph)
        names = {value.name: name for value, name in zip(branch.output, outer.output, strict=True)}
        for node in branch.node:
            inputs, outputs = ([names.get(n, n) for n in each] for each in (node.input, node.output))
            flat.append(Node(node.op_type, node.domain, inputs, outputs, node.attributes))
    return flat


@dataclass
class Sizes:
    """What follows from the shapes of a graph's inputs."""

    tensors: dict[str, Known]
    shapes: dict[str, Shape] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    """First result of a node -> its floating-point operations: two a multiply-add; of operators without any,
    one for each number they make."""

    def know(self, name: str, known: Known) -> None:
        """Take in what is known of a tensor."""
        self.tensors[name], self.shapes[name], self.bytes[name] = known, known.shape, known.bytes


def follow(nodes: Sequence[Node], given: Mapping[str, Known], before: Sizes | None = None) -> Sizes:
    """All tensors that nodes make of those given. Raises SizeError, naming the node.

    `before`: what followed from other shapes of the inputs. It is changed and given back; only nodes whose
    inputs have changed are looked at again.
    """
    sizes = before or Sizes({"": LEFT_OUT})
    changed = set()
    for name, known in given.items():
        if before is None or before.shapes.get(name) != known.shape:
            sizes.know(name, known)
            changed.add(name)
    for node in nodes:
        if before is not None and changed.isdisjoint(node.input):
            continue
        try:
            made, operations = _made(node, [sizes.tensors[name] for name in node.input])
        except (ValueError, LookupError, TypeError, OverflowError, ArithmeticError) as error:
            name = node.output[0] if node.output else ""
            raise SizeError(f"what {node.op_type} makes ({name[:80]}) cannot be known: {error}") from error
        for name, known in zip(node.output, made, strict=True):
            sizes.know(name, known)
            changed.add(name)
        sizes.operations[node.output[0]] = operations
    return sizes


def _made(node: Node, inputs: list[Known]) -> tuple[list[Known], int]:
    with np.errstate(all="ignore"):  # whole numbers go round, as in ONNX Runtime
        made = RULES[node.domain, node.op_type](node, inputs)
    if not made or len(made) != len(node.output):
        raise SizeError(f"it has {len(node.output)} results")
    for known in made:
        if len(known.shape) > MOST_RANK or known.elements > MOST_ELEMENTS or min(known.shape, default=0) < 0:
            raise SizeError(f"its result has the shape {shown(list(known.shape))}")
    return made, _operations(node, inputs, made)


def _operations(node: Node, inputs: list[Known], made: list[Known]) -> int:
    out = sum(known.elements for known in made)
    if node.op_type in ("MatMul", "MatMulInteger"):
        return 2 * out * inputs[0].shape[-1]
    if node.op_type == "Gemm":
        return 2 * out * inputs[0].shape[0 if node.attributes.get("transA") else 1]
    if node.op_type == "Conv":
        return 2 * out * math.prod(inputs[1].shape[1:])
    if node.op_type in ("Attention", "MultiHeadAttention"):
        queries, keys = inputs[0], inputs[1]
        return 4 * queries.elements * keys.shape[-2]
    return out
