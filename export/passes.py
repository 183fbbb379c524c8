"""What passes over a traced graph are made of, and the two that both targets have.

Each pass says what it requires of a graph and what it ensures; `onnx_writer.write_onnx` runs them in order.
The results of a graph stay the same but for rounding, and but for what `branch_on_clean` adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
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
    attributes: Mapping[str, int | float | ir.Attr] | None = None,
    *,
    domain: str = "",
    dtype: ir.DataType | None = None,
) -> tuple[ir.Node, ir.Value]:
    """A new node and its only output, which has type and shape of `like` unless others are given."""
    sizes = like.shape if shape is None else ir.Shape(shape)
    kind = like.type if dtype is None else ir.TensorType(dtype)
    output = ir.Value(name=name, type=kind, shape=sizes)
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


def make_of_weights_late(graph: ir.Graph) -> None:
    """What is computed of weights alone is made right before it is used: of a matrix that is cast or scaled
    in every pass, nothing is there before its product and after it.

    Requires: weights are initializers.
    Ensures: the same nodes, those that follow from initializers alone right before the first that takes them.
    """
    early: set[ir.Node] = set()
    for node in graph:
        read = [value for value in read_by(node) if not value.is_initializer()]
        if all(value.producer() in early for value in read):
            early.add(node)
    order: dict[ir.Node, None] = {}

    def add(node: ir.Node) -> None:
        for value in read_by(node):
            maker = value.producer()
            if maker in early and maker not in order:
                add(maker)
        order[node] = None

    for node in list(graph):
        if node not in early or any(value.is_graph_output() for value in node.outputs):
            add(node)
    graph.remove(list(graph))
    graph.extend(order)


def scale_attention(graph: ir.Graph) -> None:
    """Attention gets its scale as an attribute; otherwise TensorRT computes it from a shape, in ten layers.

    TensorRT multiplies queries and keys each by the root of the scale, rounded to their dtype: for
    bfloat16 that is 0.3% of every logit. So where queries come from a cast to less than float32, they
    are scaled before the cast, and the scale of Attention is 1.

    Requires: queries of a known width.
    Ensures: every Attention has a scale.
    """
    scaled: set[ir.Node] = set()
    for node in list(graph):
        if node.op_type != "Attention" or "scale" in node.attributes:
            continue
        queries = input_of(node, 0)
        scale = size_of(queries, -1) ** -0.5
        cast = _cast_behind(queries)
        if cast is not None and cast not in scaled:
            data = input_of(cast, 0)
            number = constant(graph, f"scale_{scale:.9f}", np.full((1, 1, 1), scale, np.float32))
            product, result = make("Mul", [data, number], data, name=f"{data.name}.scaled")
            graph.insert_before(cast, product)
            cast.replace_input_with(0, result)
            scaled.add(cast)
        node.attributes["scale"] = ir.AttrFloat32("scale", scale if cast is None else 1.0)


def _cast_behind(value: ir.Value) -> ir.Node | None:
    """The cast to less than float32 that a value comes from, if only moved and cut since."""
    node = value.producer()
    while node is not None and node.op_type in ("Slice", "Split", "Transpose", "Reshape"):
        origin = node.inputs[0]
        node = None if origin is None else origin.producer()
    is_cast = node is not None and node.op_type == "Cast"
    return node if is_cast and value.dtype != ir.DataType.FLOAT else None


def use_transposed(graph: ir.Graph, parameters: Sequence[ir.Value]) -> None:
    """Take matrices the way they are stored, which is the way they multiply.

    Requires: parameters of shape (out, in), stored as (in, out), that nodes transpose or multiply by
    transposed.
    Ensures: their shape is (in, out), and no node transposes them.
    """
    for parameter in parameters:
        parameter.shape = ir.Shape(shape_of(parameter)[::-1])
        for node in list(parameter.consumers()):
            if node.op_type == "Gemm":
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
            elif node.op_type == "Transpose":
                replace_node(graph, node, parameter)
            else:
                raise ValueError(f"{node.op_type} takes {parameter.name} as it is in checkpoints")
