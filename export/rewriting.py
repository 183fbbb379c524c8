"""Small steps that passes over a graph are made of."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def read_by(node: ir.Node) -> list[ir.Value]:
    """The values that a node takes, and those that nodes of its branches do."""
    branches = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    readers = [node, *(inner for branch in branches for inner in branch.all_nodes())]
    return [value for reader in readers for value in reader.inputs if value is not None]


def makers(values: Iterable[ir.Value], known: Set[ir.Node] = frozenset()) -> set[ir.Node]:
    """All nodes that values follow from, but those that are known and what they follow from."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node not in known:
            found.add(node)
            waiting += [value.producer() for value in read_by(node)]
    return found


def constant(graph: ir.Graph, name: str, content: npt.NDArray[Any]) -> ir.Value:
    """The initializer of that name, which says what it holds; made if it is not there yet."""
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
        same = ir.Node("", "Identity", [value])
        same.outputs[0].type, same.outputs[0].shape = old.type, old.shape
        graph.insert_before(node, same)
        value = same.outputs[0]
    name, named = old.name, old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if named:
        value.name = name
