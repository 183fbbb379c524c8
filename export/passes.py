"""The passes over a traced graph: which there are, in which order, and those that both targets have.

Each pass says what it requires of a graph and what it ensures. The results of a graph stay the same but for
rounding, and but for what `branch_on_clean` adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from forcingkv.export.fp8 import quantize_linears
from forcingkv.export.onnxruntime_passes import attend_in_blocks, branch_on_clean, make_caches_early
from forcingkv.export.rewriting import constant, input_of, make, replace_node, shape_of, size_of
from forcingkv.export.tensorrt_passes import (
    align_parameters,
    fold_modulation,
    narrow_indices,
    pair_lone_heads,
    split_slices,
)


def rewrite(
    graph: ir.Graph,
    matrices: Sequence[ir.Value],
    parameters: Sequence[ir.Value],
    *,
    tensorrt: bool,
    lengths: Mapping[str, int],
    clean_outputs: Sequence[Sequence[str]],
    quantized: Mapping[str, ir.Value],
    input_scales: Mapping[str, float],
) -> list[ir.Value]:
    """Run all passes for a target.

    In this order, with the reason where it matters. Each docstring has what a pass requires and ensures.

    1. `use_transposed`: matrices become (in, out). First, while they have the shapes they were made with.
    2. `scale_attention`: every Attention has its scale.

    For TensorRT:
    3. `fold_modulation`: one LayerNormalization instead of three nodes.
    4. `split_slices`: Split or Gather instead of Slice.
    5. `narrow_indices`: Gather by indices of 32 bits.
    6. `pair_lone_heads`: no Attention over one head.
    7. `align_parameters`: rank 3. Behind 1, which reverses the two sizes of a matrix.

    For ONNX Runtime:
    3. `attend_in_blocks`: no large scores in memory. Behind 2: MultiHeadAttention takes over the scale.
    4. `branch_on_clean`: nodes that make caches go into branches, into which the passes before do not look.
    5. `make_caches_early`: moves those branches, and with them what they need.

    For both, last, `quantize_linears`: products in FP8. Behind 7, which knows matrices only in a MatMul.

    Args:
        graph: to be changed. Its parameters are inputs, whose contents lie elsewhere.
        matrices: the parameters that are stored as (in, out).
        parameters: all of them.
        tensorrt: whether the target is TensorRT, or ONNX Runtime.
        lengths: symbol of each dimension that varies -> its largest size.
        clean_outputs: groups of outputs that only a clean pass is asked for.
        quantized: name of each linear layer in FP8 -> its weight, a parameter.
        input_scales: name of each linear layer in FP8 -> the scale of its input.

    Returns:
        New parameters: the scales of weights in FP8.
    """
    use_transposed(graph, matrices)
    scale_attention(graph)
    if tensorrt:
        fold_modulation(graph)
        split_slices(graph)
        narrow_indices(graph)
        pair_lone_heads(graph)
        align_parameters(parameters)
    else:
        attend_in_blocks(graph, lengths)
        if clean_outputs:
            branch_on_clean(graph, clean_outputs)
        make_caches_early(graph)
    return quantize_linears(graph, quantized, input_scales, tensorrt=tensorrt)


def scale_attention(graph: ir.Graph) -> None:
    """Attention gets its scale as an attribute; otherwise TensorRT computes it from a shape, in ten layers.

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
        queries = input_of(node, 0)
        scale = size_of(queries, -1) ** -0.5
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
    data = input_of(cast, 0)
    number = constant(graph, f"scale_{factor:.9f}", np.full((1, 1, 1), factor, np.float32))
    node, product = make("Mul", [data, number], data, name=f"{data.name}.scaled")
    graph.insert_before(cast, node)
    cast.replace_input_with(0, product)


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
