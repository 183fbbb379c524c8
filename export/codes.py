"""What the weights of linear layers are rounded to: codes with a scale for each output channel.

A number x is stored as the code nearest to x / scale, and the largest of a channel is the largest code. Codes
are made with the rounded scale, so its rounding costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from forcingkv.export.passes import make, shape_of
from forcingkv.export.precision import torch_dtype
from forcingkv.models.baked_names import scale_name
from forcingkv.runtime.spec import Dtype, Linear


@dataclass(frozen=True)
class Codes:
    """The numbers that quantized tensors are stored as."""

    dtype: torch.dtype
    largest: float
    """The largest code; the smallest is its negative."""
    scales: Dtype
    """What the scales of weights are stored as."""

    def weight_scales(self, weight: Tensor) -> Tensor:
        """The scale of each output channel of a weight (out, in): its largest becomes the largest code.

        A channel of zeros has the scale 1, one with numbers that are not finite a scale that is not.
        """
        scales = (weight.float().abs().amax(1) / self.largest).to(torch_dtype(self.scales))
        return torch.where(scales == 0, torch.ones_like(scales), scales)

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """The codes nearest to x / scale, ties to even, saturating at the largest; NaN stays NaN where codes
        have one.

        Scales broadcast against x. Saturating is spelled out: versions of torch differ in what they make of
        numbers that are too large.
        """
        codes = (x.float() / scale.float()).clamp_(-self.largest, self.largest)
        return (codes if self.dtype.is_floating_point else codes.round_()).to(self.dtype)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes stand for, in float32."""
    return codes.float() * scale.float()


E4M3 = Codes(torch.float8_e4m3fn, 448.0, "bfloat16")
"""FP8."""

INT8 = Codes(torch.int8, 64.0, "float32")
"""Whole numbers, times 8 bits without a sign. Many processors add two such products in 16 bits and saturate:
so codes are those for which no sum does, 2 * 255 * 64 < 2 ** 15 (docs/decisions/0032)."""

CODES: dict[Linear, Codes] = {"fp8": E4M3, "int8": INT8}
"""By what linear layers are stored as."""


@contextmanager
def hooked(
    model: nn.Module, layers: Iterable[str], hook: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """While this is open, `hook` gets the name and the input of each of the layers before it runs; what it
    returns, if anything, is the layer's input."""
    with ExitStack() as stack:
        for name in layers:

            def before(layer: nn.Module, inputs: tuple[Any, ...], name: str = name) -> Any:
                return hook(name, inputs[0])

            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(before))
        yield


def products_of(layer: str, weight: ir.Value) -> list[ir.Node]:
    """The nodes that multiply by a weight. Raises ValueError for a weight that is anything else to a node."""
    products = list(weight.consumers())
    if any(node.op_type != "MatMul" or node.inputs[1] is not weight for node in products):
        raise ValueError(f"the weight of {layer} is more than the right side of MatMul")
    return products


def store_codes(graph: ir.Graph, weight: ir.Value, codes: ir.DataType, scales: ir.DataType) -> ir.Value:
    """A weight, which is a graph input, becomes one of codes.

    Returns its scales (out,), in the dtype given: a new graph input, named as in the file of weights.
    """
    assert weight.name is not None
    weight.dtype = codes
    channels = ir.Shape(shape_of(weight)[-1:])
    scale = ir.Value(name=scale_name(weight.name), type=ir.TensorType(scales), shape=channels)
    graph.inputs.append(scale)
    return scale


def matrix_of(
    graph: ir.Graph, weight: ir.Value, codes: ir.DataType, kind: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Make a weight, which is a graph input, one of codes. Returns the matrix of `kind` that it stands for,
    cast and scaled in the graph's first nodes, and its scales as `store_codes` does."""
    assert weight.name is not None
    name, scale = weight.name, store_codes(graph, weight, codes, kind)
    cast, numbers = make("Cast", [weight], weight, None, f"{name}.cast", {"to": int(kind)}, dtype=kind)
    scaled, matrix = make("Mul", [numbers, scale], weight, None, f"{name}.mul", dtype=kind)
    graph.insert_before(graph[0], [cast, scaled])
    return matrix, scale


def multiply_by_matrices(
    graph: ir.Graph, weights: Mapping[str, ir.Value], codes: ir.DataType
) -> list[ir.Value]:
    """Linear layers multiply by what their codes stand for, in the dtype that they computed in; their inputs
    are not rounded.

    Requires: by the name of each layer its weight, a graph input (in, out), and the right side of MatMul
    only.

    Returns the scales of the weights, as new graph inputs: (out,), named as in the file of weights.
    """
    added = []
    for layer, weight in weights.items():
        products, kind = products_of(layer, weight), weight.dtype
        assert kind is not None
        matrix, scale = matrix_of(graph, weight, codes, kind)
        for node in products:
            node.replace_input_with(1, matrix)
        added.append(scale)
    return added


def insert_before_use(graph: ir.Graph, data: ir.Value, nodes: list[ir.Node]) -> None:
    """Put nodes right before the first of a graph's nodes that takes a value."""
    users = set(data.consumers())
    graph.insert_before(next(node for node in graph if node in users), nodes)
