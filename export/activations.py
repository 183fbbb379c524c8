"""What ONNX Runtime needs in memory for a graph, from the graph alone, by onnx's own inference of shapes.

The runtime infers shapes by rules of its own when it opens a bundle (`runtime.graph_sizes`), and refuses a
manifest that says less than it finds: two ways to one figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from forcingkv.export.onnxruntime_passes import taken_branches
from forcingkv.prune.onnx_operators import DOMAIN
from forcingkv.runtime.graph_memory import peak_bytes
from forcingkv.runtime.graph_tensors import Shape


def activation_bytes(
    model: onnx.ModelProto, phases: Sequence[Mapping[str, Shape]], *, folded: bool = True
) -> int:
    """Bytes that a pass needs at most for what is neither input nor output nor weight.

    Nodes run in the order of the graph. Of passes that take branches and passes that do not, those that do
    count: the others run some of the same nodes. `phases` has for each phase the shape of every input that
    varies; one empty mapping if none does. `folded` says whether what follows from weights alone is computed
    when the graph is loaded.
    """
    flat = taken_branches(model)
    return max(_peak(flat, shapes, folded=folded) for shapes in phases)


def _peak(model: onnx.ModelProto, given: Mapping[str, Shape], *, folded: bool) -> int:
    shapes, sizes = _shapes(model, given)
    weights, outputs = ({v.name for v in of} for of in (model.graph.initializer, model.graph.output))
    return peak_bytes(model.graph.node, weights if folded else (), outputs, shapes, sizes)


def _shapes(model: onnx.ModelProto, given: Mapping[str, Shape]) -> tuple[dict[str, Shape], dict[str, int]]:
    """The shape of every tensor, and its bytes; 0 bytes for a function's outputs of unknown shape."""
    sized = inferred(model, given)
    shapes: dict[str, Shape] = {v.name: tuple(v.dims) for v in sized.graph.initializer}
    sizes = {v.name: math.prod(v.dims) * element_bytes(v.data_type) for v in sized.graph.initializer}
    for name, (kind, shape) in known_tensors(sized).items():
        shapes[name], sizes[name] = shape, math.prod(shape) * element_bytes(kind)
    made = {name for node in model.graph.node if node.domain == DOMAIN for name in node.output}
    unknown = {name for node in sized.graph.node for name in node.output if name} - made - set(sizes)
    if unknown:
        raise ValueError(f"the shapes of {', '.join(sorted(unknown)[:5])} are not known")
    return shapes, dict.fromkeys(made, 0) | sizes


def known_tensors(model: onnx.ModelProto) -> dict[str, tuple[int, Shape]]:
    """Type and shape of every tensor of a graph but weights, where inference (`inferred`) knows both."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    kinds = {value.name: value.type.tensor_type for value in values}
    return {
        name: (kind.elem_type, tuple(dim.dim_value for dim in kind.shape.dim))
        for name, kind in kinds.items()
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim)
    }


def inferred(model: onnx.ModelProto, given: Mapping[str, Shape]) -> onnx.ModelProto:
    """The graph for those shapes of the inputs that vary, with the type and shape of what it computes."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        if value.name in given:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, given[value.name]))
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")  # they may vary as inputs do
    contents = {value.name: value for value in sized.graph.initializer}
    readers = {name: node for node in sized.graph.node for name in node.input}
    for node in sized.graph.node:
        if node.op_type == "MultiHeadAttention":  # onnx does not know it; a Reshape behind it has its shape
            _, *sizes_of = numpy_helper.to_array(contents[readers[node.output[0]].input[1]]).tolist()
            if -1 in sizes_of:  # as many queries as there are positions
                sizes_of[sizes_of.index(-1)] = given["cosines"][0]
            seen = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, sizes_of)
            sized.graph.value_info.append(seen)
    _fold_lengths(sized)
    sized.graph.value_info.extend(_segments(sized))
    return onnx.shape_inference.infer_shapes(sized, strict_mode=True, data_prop=True)


def _segments(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    """Retained keys and values that nodes of the graph read, of which onnx knows neither type nor shape.

    Keys move with the window, where positions are relative to it; both become codes, where they are cached in
    fewer bits. They are as wide as the chunk's keys.
    """
    outputs = {value.name for value in model.graph.output}
    kept: dict[str, int] = {}
    known: dict[str, tuple[int, Shape]] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        if "kept" in sizes:
            kept[node.output[-1]] = sizes["kept"]
        for name in node.output[: 2 if len(node.output) > 1 else 0]:
            if name not in outputs:
                known = known or known_tensors(onnx.shape_inference.infer_shapes(model, data_prop=True))
                chosen = kept.get(node.output[-1]) or kept[node.input[4]]
                tokens = chosen * (sizes.get("segment_tokens") or sizes["frame_tokens"] // sizes["segments"])
                kind, (batch, heads, _, width) = known[node.input[2]]
                yield helper.make_tensor_value_info(name, kind, (batch, heads, tokens, width))


def _fold_lengths(model: onnx.ModelProto) -> None:
    """Numbers that follow from the shapes of inputs, such as bounds of slices, become constants."""
    inputs = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    known = {
        value.name: numpy_helper.to_array(value)
        for value in model.graph.initializer
        if value.data_type == TensorProto.INT64 and value.data_location == TensorProto.DEFAULT
    }
    folded = []
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] in inputs:
            bounds = {attribute.name: attribute.i for attribute in node.attribute}
            dimensions = inputs[node.input[0]][bounds.get("start") : bounds.get("end")]
            found = np.array([dimension.dim_value for dimension in dimensions], np.int64)
        elif node.input and not node.domain and all(name in known for name in node.input):
            made = ReferenceEvaluator(node).run(None, {name: known[name] for name in node.input})
            found = np.asarray(next(iter(made)))
        else:
            continue
        known[node.output[0]] = found
        model.graph.initializer.append(numpy_helper.from_array(found, node.output[0]))
        folded.append(node)
    for node in folded:
        model.graph.node.remove(node)


def element_bytes(kind: int) -> int:
    """Bytes of a number of ONNX's type `kind`."""
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize)
