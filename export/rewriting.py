"""Small steps that passes over a graph are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def read_by(node: ir.Node) -> list[ir.Value]:
    """The values that a node takes, and those that nodes of its branches do."""
    branches = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    readers = [node, *(inner for branch in branches for inner in branch.all_nodes())]
    return [value for reader in readers for value in reader.inputs if value is not None]


def makers(values: Iterable[ir.Value], known: Set[ir.Node] = frozenset()) -> set[ir.Node]:
    """All nodes that the values depend on. Not followed: the nodes `known`, and what only they depend on."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node not in known:
            found.add(node)
            waiting += [value.producer() for value in read_by(node)]
    return found


def input_of(node: ir.Node, place: int) -> ir.Value:
    """An input that the node has to have."""
    value = node.inputs[place]
    if value is None:
        raise ValueError(f"{node.op_type} lacks its input {place}")
    return value


def shape_of(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """The sizes of a value, or their symbols; ValueError where its shape is not known."""
    if value.shape is None:
        raise ValueError(f"the shape of {value.name} is not known")
    return list(value.shape)


def size_of(value: ir.Value, axis: int) -> int:
    """The size of a value along an axis; ValueError where it is not known."""
    size = shape_of(value)[axis]
    if not isinstance(size, int):
        raise ValueError(f"the size of {value.name} along axis {axis} is not known: {size}")
    return size


def make(
    op_type: str,
    inputs: Sequence[ir.Value],
    like: ir.Value,
    shape: Sequence[int | ir.SymbolicDim] | None = None,
    name: str | None = None,
    attributes: Mapping[str, int | float] | None = None,
    *,
    domain: str = "",
) -> tuple[ir.Node, ir.Value]:
    """A new node and its only output, which has the type of `like`, and its shape unless another is given."""
    sizes = like.shape if shape is None else ir.Shape(shape)
    output = ir.Value(name=name, type=like.type, shape=sizes)
    return ir.node(op_type, inputs, attributes, domain=domain, outputs=[output]), output


def constant(graph: ir.Graph, name: str, content: npt.NDArray[Any]) -> ir.Value:
    """The initializer of that name, which stands for its content; made if it is not there yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(content)
        graph.initializers[name] = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(content.shape)
        )
    return graph.initializers[name]


def replace_node(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Put a value in the place of a node's only output; a graph's outputs keep their names."""
    old = node.outputs[0]
    if old.is_graph_output() and (value.producer() is None or value.is_graph_output()):
        same, value = make("Identity", [value], old)
        graph.insert_before(node, same)
    name, named = old.name, old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if named:
        value.name = name
