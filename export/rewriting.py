"""Small steps that passes over a graph are made of."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

__all__ = ["constant", "replace_node"]


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
