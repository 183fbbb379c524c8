"""Passes over a traced graph: what the tracer writes, said in fewer operators.

Each pass says what it requires of a graph and what holds afterwards. Results stay the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from forcingkv.export.rewriting import constant, replace_node


def scale_attention(graph: ir.Graph) -> None:
    """Attention says its scale, which TensorRT else computes from a shape, in ten layers.

    TensorRT multiplies queries and keys each by the root of the scale, rounded to their dtype: for
    bfloat16 that is 0.3% of every logit. So where queries come from a cast to less than float32, they
    are scaled before the cast, and the scale of Attention is 1.

    Requires: queries of a known width.
    Ensures: every Attention has a scale.
    """
    scaled: set[ir.Value] = set()
    for node in list(graph):
        if node.op_type != "Attention" or "scale" in node.attributes:
            continue
        queries = node.inputs[0]
        assert queries is not None
        assert queries.shape is not None
        width = queries.shape[-1]
        assert isinstance(width, int)
        scale = width**-0.5
        cast = _cast_behind(queries)
        if cast is not None:
            if cast.outputs[0] not in scaled:
                _multiply_before(graph, cast, scale)
                scaled.add(cast.outputs[0])
            scale = 1.0
        node.attributes["scale"] = ir.AttrFloat32("scale", scale)


def _cast_behind(value: ir.Value) -> ir.Node | None:
    """The cast to less than float32 that a value comes from, if only moved and cut since."""
    node = value.producer()
    while node is not None and node.op_type in ("Slice", "Split", "Transpose", "Reshape"):
        origin = node.inputs[0]
        node = None if origin is None else origin.producer()
    is_cast = node is not None and node.op_type == "Cast"
    return node if is_cast and value.dtype != ir.DataType.FLOAT else None


def _multiply_before(graph: ir.Graph, cast: ir.Node, factor: float) -> None:
    data = cast.inputs[0]
    assert data is not None
    number = constant(graph, f"scale_{factor:.9f}", np.full((1, 1, 1), factor, np.float32))
    product = ir.Node("", "Mul", [data, number])
    product.outputs[0].name = f"{data.name}.scaled"
    product.outputs[0].type, product.outputs[0].shape = data.type, data.shape
    graph.insert_before(cast, product)
    cast.replace_input_with(0, product.outputs[0])


def use_transposed(graph: ir.Graph, parameters: Sequence[ir.Value]) -> None:
    """Take matrices the way they are stored, which is the way they multiply.

    Requires: parameters of shape (out, in), stored as (in, out), that nodes transpose or multiply by
    transposed.
    Ensures: their shape is (in, out), and no node transposes them.
    """
    for parameter in parameters:
        assert parameter.shape is not None
        parameter.shape = ir.Shape(list(parameter.shape)[::-1])
        for node in list(parameter.consumers()):
            if node.op_type == "Gemm":
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
            elif node.op_type == "Transpose":
                replace_node(graph, node, parameter)
            else:
                raise ValueError(f"{node.op_type} takes {parameter.name} as it is in checkpoints")
