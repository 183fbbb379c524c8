"""int8 for linear layers, for ONNX Runtime on a CPU: how inputs are rounded, in torch and in a graph.

A weight is codes from -64 to 64 with a scale for each output channel (`codes.INT8`). An input has a scale for
each token, found in every pass: its largest absolute value becomes 127. Codes of inputs are stored without a
sign, 128 higher. The sum of products is a whole number of 32 bits, exact on every processor, and is scaled
back by both scales (docs/decisions/0032).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor, nn

from forcingkv.export.codes import INT8, dequantize, hooked, insert_before_use, products_of, store_codes
from forcingkv.export.passes import constant, input_of, make, replace_node, shape_of, size_of

LARGEST = 127.0
"""The largest code of an input."""
ZERO = 128
"""What is stored for an input of 0."""
LEAST = 1e-30
"""A token of smaller values is rounded as if this were its largest: for zeros any scale will do but 0."""
MOST_INPUTS = (2**31 - 1) // int(2 * ZERO * INT8.largest)
"""As many products of a code without a sign fit into a sum of 32 bits."""


def token_scales(x: Tensor) -> Tensor:
    """The scale of each token of an input (..., width), float32 (..., 1).

    It is not finite for a token with values that are not: codes would pass for numbers.
    """
    scales = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / LARGEST
    return scales + 0 * x.sum(-1, keepdim=True)


def round_input(x: Tensor) -> Tensor:
    """An input (..., width) in float32, rounded to codes and back."""
    scales = token_scales(x)
    return dequantize((x / scales).round().clamp(-LARGEST, LARGEST), scales)


def rounded_inputs(model: nn.Module, layers: Iterable[str]) -> AbstractContextManager[None]:
    """While this is open, linear layers of a model in float32 round their inputs to 8 bits and back.

    With weights that are dequantized, they compute what a graph does after `quantize_linears`.
    """
    return hooked(model, layers, lambda name, x: round_input(x))


def quantize_linears(graph: ir.Graph, weights: Mapping[str, ir.Value]) -> list[ir.Value]:
    """Linear layers multiply in int8: MatMulInteger of their quantized inputs and weights, scaled back.

    Requires: by the name of each layer its weight, a graph input (in, out) whose contents lie elsewhere, and
    the right side of MatMul only; inputs in float32 (batch 1, tokens, in) with a known number of tokens.
    Ensures: one QuantizeLinear for each value that quantized layers take, however many take it; weights are
    INT8, and products and what follows float32 as before. Sums are scaled by one scale after the other: a
    product of scales behind the Cast ONNX Runtime would take for scales of whole tensors.

    Returns the scales of the weights, as new graph inputs: float32 (out,), named as in the file of weights.
    """
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    added = []
    for layer, weight in weights.items():
        if size_of(weight, 0) > MOST_INPUTS:
            raise ValueError(f"{layer} adds up more than {MOST_INPUTS} products")
        products = products_of(layer, weight)
        added.append(scale_of_weight := store_codes(graph, weight, ir.DataType.INT8, ir.DataType.FLOAT))
        for node in products:
            data = input_of(node, 0)
            if data not in rounded:
                rounded[data] = _rounded(graph, data)
            _multiply(graph, node, *rounded[data], weight, scale_of_weight)
    return added


def _rounded(graph: ir.Graph, data: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The codes of a value (1, tokens, width), and its scales (1, tokens, 1)."""
    batch, tokens, _ = (size_of(data, axis) for axis in range(3))
    if batch != 1 or data.dtype != ir.DataType.FLOAT:
        raise ValueError(f"{data.name} is no batch of one text in float32")
    nodes: list[ir.Node] = []
    each = [1, tokens, 1]

    def add(op_type: str, inputs: list[ir.Value], shape: list[int], **attributes: int) -> ir.Value:
        name = f"{data.name}.{op_type.lower()}{len(nodes)}"
        node, value = make(op_type, inputs, data, shape, name, attributes)
        nodes.append(node)
        return value

    width = constant(graph, "of_width", np.array([-1], np.int64))
    # Without a copy of absolute values, which may be the largest tensor of a pass.
    over, under, total = (
        add(reduce, [data, width], each, keepdims=1) for reduce in ("ReduceMax", "ReduceMin", "ReduceSum")
    )
    largest = add("Max", [over, add("Neg", [under], each)], each)
    least = constant(graph, "int8.least", np.array(LEAST, np.float32))
    scales = add("Clip", [largest, least], each)
    scales = add("Div", [scales, constant(graph, "int8.largest", np.array(LARGEST, np.float32))], each)
    # The largest of numbers says nothing of a NaN among them. A sum does, and is NaN times 0 where it is not
    # finite; else the codes of such a token would pass for numbers.
    nothing = add("Mul", [total, constant(graph, "int8.zero", np.array(0, np.float32))], each)
    scales = add("Add", [scales, nothing], each)
    flat = add("Reshape", [scales, constant(graph, "of_tokens", np.array([-1], np.int64))], [tokens])
    zeros = constant(graph, f"int8.zeros_{tokens}", np.full(tokens, ZERO, np.uint8))
    kind = ir.DataType.UINT8
    attributes = {"axis": 1, "output_dtype": int(kind)}
    name = f"{data.name}.quantizelinear"
    node, codes = make("QuantizeLinear", [data, flat, zeros], data, None, name, attributes, dtype=kind)
    insert_before_use(graph, data, [*nodes, node])
    return codes, scales


def _multiply(
    graph: ir.Graph, node: ir.Node, codes: ir.Value, scales: ir.Value, weight: ir.Value, of_weight: ir.Value
) -> None:
    """Put a product of whole numbers, scaled back, in the place of a MatMul."""
    old = node.outputs[0]
    zero = constant(graph, "int8.zero_point", np.array(ZERO, np.uint8))
    kind = ir.DataType.INT32
    product, total = make("MatMulInteger", [codes, weight, zero], old, None, f"{old.name}.sum", dtype=kind)
    # DequantizeLinear would do the next two at once, and takes twice their time (ONNX Runtime 1.32).
    cast, number = make("Cast", [total], old, None, f"{old.name}.number", {"to": int(ir.DataType.FLOAT)})
    channels, scaled = make("Mul", [number, of_weight], old, None, f"{old.name}.scaled")
    tokens, result = make("Mul", [scaled, scales], old)
    graph.insert_before(node, [product, cast, channels, tokens])
    replace_node(graph, node, result)
    for add in result.consumers():
        _add_as_row(graph, add)


def _add_as_row(graph: ir.Graph, add: ir.Node) -> None:
    """A bias (out,) is added as (1, 1, out).

    ONNX Runtime would make one operator of an Add of a bias of rank 1 and the Gelu behind it, which takes the
    memory of its result once more and is no faster.
    """
    bias = add.inputs[1]
    if add.op_type == "Add" and bias is not None and len(shape_of(bias)) == 1:
        axes = constant(graph, "int8.row", np.array([0, 1], np.int64))
        node, row = make("Unsqueeze", [bias, axes], bias, [1, 1, *shape_of(bias)], f"{bias.name}.row")
        graph.insert_before(add, node)
        add.replace_input_with(1, row)


def without_rounding(model: onnx.ModelProto) -> None:
    """Make products of whole numbers products in float32, of inputs as they are.

    Requires: what `quantize_linears` wrote.
    Ensures: the same graph, but for the rounding of inputs.
    """
    kept: list[onnx.NodeProto] = []
    origins: dict[str, str] = {}
    scales: set[str] = set()
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        node.input[:] = [origins.get(name, name) for name in node.input]
        if node.op_type == "QuantizeLinear":
            origins[node.output[0]] = node.input[0]
            scales.add(makers[node.input[1]].input[0])
        elif node.op_type == "Mul" and node.input[1] in scales:
            origins[node.output[0]] = node.input[0]
        elif node.op_type == "MatMulInteger":
            data, weight, _ = node.input
            cast, (total,) = f"{weight}.cast", node.output
            kept.append(onnx.helper.make_node("Cast", [weight], [cast], to=onnx.TensorProto.FLOAT))
            kept.append(onnx.helper.make_node("MatMul", [data, cast], [total]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
