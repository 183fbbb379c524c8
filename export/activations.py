"""What ONNX Runtime needs in memory for a graph, from the graph alone.

A tensor lives from the node that makes it to the last one that reads it. So it does in ONNX Runtime 1.31 with
options that order nodes by their place in the file, keep no buffers for later tensors, and do not lay them
out ahead (docs/decisions/0014). It runs every node of a graph, whatever outputs are asked for, but those of
branches that are not taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from forcingkv.export.onnxruntime_passes import taken_branches
from forcingkv.prune.onnx_operators import DOMAIN, SCORING

Shape = tuple[int, ...]

MOVES_NOTHING = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
"""Operators whose output is their first input's memory."""
IN_PLACE = {"Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh"}
"""Operators that may write over an operand of the output's size that nothing else reads."""


def activation_bytes(model: onnx.ModelProto, phases: Sequence[Mapping[str, Shape]]) -> int:
    """Bytes that a pass needs at most for what is neither input nor output nor weight.

    Nodes run in the order of the graph. Of passes that take branches and passes that do not, those that do
    count: the others run some of the same nodes. `phases` has for each phase the shape of every input that
    varies; one empty mapping if none does.
    """
    flat = taken_branches(model)
    return max(_peak(flat, shapes) for shapes in phases)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph's weights as ONNX Runtime holds them once it is loaded.

    Those that are cast are held as what they are cast to. Of matrices to multiply by there is one copy, in an
    order of the processor's own: the file's pages are let go.
    """
    kinds = {value.name: value.data_type for value in model.graph.initializer}
    sizes = {value.name: math.prod(value.dims) for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in kinds:
            kinds[node.input[0]] = node.attribute[0].i
    return sum(size * _element_bytes(kinds[name]) for name, size in sizes.items())


def _peak(model: onnx.ModelProto, given: Mapping[str, Shape]) -> int:
    shapes, sizes = _shapes(model, given)
    nodes = list(_running(model))
    last = {name: place for place, node in enumerate(nodes) for name in node.input}
    outputs = {value.name for value in model.graph.output}
    owners: dict[str, str] = {}
    """Tensor -> the tensor whose memory it is in."""
    ends: dict[str, int] = {}
    live: dict[str, int] = {}
    peak = 0
    for place, node in enumerate(nodes):
        reads = [owners.get(name, name) for name in node.input]
        for name in node.output:
            if name and name not in outputs:
                owner = name
                if node.op_type in MOVES_NOTHING:
                    owner = reads[0]
                elif node.op_type in IN_PLACE:
                    ending = (r for r in reads if ends.get(r) == place and live.get(r) == sizes[name])
                    owner = next(ending, name)
                owners[name] = owner
                ends[owner] = max(ends.get(owner, 0), last.get(name, place))
                if owner == name:
                    live[name] = sizes[name]
        peak = max(peak, sum(live.values()) + _scratch(node, shapes, sizes))
        live = {name: size for name, size in live.items() if ends[name] > place}
    return peak


def _running(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes that are not computed once, when the graph is loaded."""
    constant = {value.name for value in model.graph.initializer}
    for node in model.graph.node:
        if constant.issuperset(node.input):
            constant.update(node.output)
        else:
            yield node


def _scratch(node: onnx.NodeProto, shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> int:
    """Bytes a node needs while it runs, beyond its inputs and outputs."""
    given = [sizes.get(name, 0) for name in node.input]
    if node.op_type == "MultiHeadAttention":
        return sum(given[:3])  # a copy of each, in its own order
    if node.op_type == "Attention":
        _, heads, queries, _ = shapes[node.input[0]]
        return 4 * heads * queries * shapes[node.input[1]][2]
    if node.domain == DOMAIN:  # transition and new keys and values, joined; for scores four times the keys
        keys, values = given[0] + given[2], given[1] + given[3]
        return max(keys + values, 5 * keys) if node.op_type in SCORING else keys + values
    return 0


def _shapes(model: onnx.ModelProto, given: Mapping[str, Shape]) -> tuple[dict[str, Shape], dict[str, int]]:
    """The shape of every tensor, and its bytes; 0 bytes for a function's outputs of unknown shape."""
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
            seen = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, sizes_of)
            sized.graph.value_info.append(seen)
    _fold_lengths(sized)
    sized = onnx.shape_inference.infer_shapes(sized, strict_mode=True, data_prop=True)
    shapes: dict[str, Shape] = {v.name: tuple(v.dims) for v in sized.graph.initializer}
    sizes = {v.name: math.prod(v.dims) * _element_bytes(v.data_type) for v in sized.graph.initializer}
    for value in (*sized.graph.input, *sized.graph.value_info, *sized.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
            sizes[value.name] = math.prod(shapes[value.name]) * _element_bytes(kind.elem_type)
    made = {name for node in model.graph.node if node.domain == DOMAIN for name in node.output}
    unknown = {name for node in sized.graph.node for name in node.output if name} - made - set(sizes)
    if unknown:
        raise ValueError(f"the shapes of {', '.join(sorted(unknown)[:5])} are not known")
    return shapes, dict.fromkeys(made, 0) | sizes


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


def _element_bytes(kind: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize)
