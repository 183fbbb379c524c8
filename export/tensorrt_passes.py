"""Passes after which TensorRT's parser makes fewer layers of a graph, or finds fused kernels for them.

Each says what it requires of a graph and what it ensures; `onnx_writer.write_onnx` runs them in order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from forcingkv.export.passes import constant, input_of, make, replace_node, shape_of, size_of

Range = tuple[int, int]

DECOMPOSABLE = "TRT_decomposable"
"""An attribute of Attention that TensorRT's parser reads."""


def split_slices(graph: ir.Graph) -> None:
    """Slices of one tensor along one axis become one Split, and a lone one a Gather.

    TensorRT's parser writes a Slice's bounds as some 25 layers of shape arithmetic, whether they are
    known or not. A Split costs one layer a part, a Gather of constant rows one layer.

    Requires: constant bounds, step 1, one axis of known size. Slices that overlap get an operator each.
    Ensures: no such Slice is left.
    """
    found: dict[tuple[ir.Value, int], dict[Range, list[ir.Node]]] = defaultdict(lambda: defaultdict(list))
    order: dict[ir.Node, int] = {}
    for node in graph:
        place = _known_slice(node)
        if place is not None:
            data, axis, part = place
            found[data, axis][part].append(node)
            order[node] = len(order)
    for (_, axis), parts in found.items():
        for disjoint in _disjoint(sorted(parts)):
            _split(graph, axis, disjoint, parts, order)


def _known_slice(node: ir.Node) -> tuple[ir.Value, int, Range] | None:
    if node.op_type != "Slice" or node.domain:
        return None
    data, *bounds = node.inputs
    known = [ir.convenience.get_const_tensor(value) for value in bounds if value is not None]
    if data is None or data.shape is None or len(known) < 3:
        return None
    numbers = [tensor.numpy().reshape(-1).tolist() for tensor in known if tensor is not None]
    if len(numbers) < len(known):
        return None
    (start, *_), (end, *_), axes, *steps = numbers
    if len(axes) != 1 or any(step != [1] for step in steps):
        return None
    axis = axes[0] % len(data.shape)
    size = data.shape[axis]
    if not isinstance(size, int):
        return None
    start, stop, _ = slice(start, end).indices(size)
    return (data, axis, (start, stop)) if start < stop else None


def _disjoint(ranges: list[Range]) -> list[list[Range]]:
    """Ranges, sorted, put together such that those of a group do not overlap."""
    groups: list[list[Range]] = []
    for part in ranges:
        for group in groups:
            if group[-1][1] <= part[0]:
                group.append(part)
                break
        else:
            groups.append([part])
    return groups


def _split(
    graph: ir.Graph,
    axis: int,
    wanted: list[Range],
    slices: dict[Range, list[ir.Node]],
    order: dict[ir.Node, int],
) -> None:
    data = input_of(slices[wanted[0]][0], 0)  # as it is now: it may have been a slice itself
    cuts = sorted({0, size_of(data, axis), *(bound for part in wanted for bound in part)})
    nodes = [node for part in wanted for node in slices[part]]
    if len(cuts) == 2:  # the whole: nothing is cut off
        for node in nodes:
            replace_node(graph, node, data)
        return
    places = list(pairwise(cuts))
    first = min(nodes, key=order.__getitem__)
    if len(wanted) == 1:
        start, stop = wanted[0]
        rows = constant(graph, f"rows_{start}_{stop}", np.arange(start, stop, dtype=np.int32))
        cut = ir.node("Gather", [data, rows], {"axis": axis})
        places = wanted
    else:
        sizes = [stop - start for start, stop in places]
        parts = constant(graph, f"parts_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
        cut = ir.node("Split", [data, parts], {"axis": axis}, num_outputs=len(places))
    graph.insert_before(first, cut)
    stem, shape = nodes[0].outputs[0].name, shape_of(data)
    for number, (place, output) in enumerate(zip(places, cut.outputs, strict=True)):
        output.name = f"{stem}.part.{number}"
        output.type = data.type
        output.shape = ir.Shape([*shape[:axis], place[1] - place[0], *shape[axis + 1 :]])
        for node in slices.get(place, ()) if place in wanted else ():
            replace_node(graph, node, output)


def narrow_indices(graph: ir.Graph) -> None:
    """Gather by 32-bit indices as they are; the tracer widens them, and TensorRT narrows them again.

    Requires: indices cast from 32 to 64 bits for Gather.
    Ensures: Gather takes them from before the cast.
    """
    for node in list(graph):
        cast = input_of(node, 1).producer() if node.op_type == "Gather" else None
        if cast is not None and cast.op_type == "Cast" and input_of(cast, 0).dtype == ir.DataType.INT32:
            node.replace_input_with(1, input_of(cast, 0))
            if not cast.outputs[0].uses():
                graph.remove(cast, safe=True)


def pair_lone_heads(graph: ir.Graph) -> None:
    """Attention of a single head becomes that of two heads with one head of keys and values.

    TensorRT finds no fused kernel for one head of 1,560 queries, nor for 4,680 queries and 504 keys
    (RTX 1.7, whatever the width), but does for two. The first half of the queries as one head and the
    second as another is the same computation, and no bytes move.

    Requires: an even, known number of queries.
    Ensures: no Attention over one head.
    """
    for node in list(graph):
        if node.op_type != "Attention":
            continue
        queries = input_of(node, 0)
        batch, heads, tokens, _ = shape_of(queries)
        if heads != 1 or not isinstance(tokens, int) or tokens % 2:
            continue
        width = size_of(queries, 3)
        halves = constant(graph, f"halves_{tokens}", np.array([1, 2, tokens // 2, width], np.int64))
        whole = constant(graph, f"whole_{tokens}", np.array([1, 1, tokens, width], np.int64))
        half = [batch, 2, tokens // 2, width]
        pairing, paired = make("Reshape", [queries, halves], queries, half)
        graph.insert_before(node, pairing)
        node.replace_input_with(0, paired)
        seen = node.outputs[0]
        joining, joined = make("Reshape", [seen, whole], seen)
        ir.convenience.replace_all_uses_with(seen, joined, replace_graph_outputs=True)
        joining.replace_input_with(0, seen)
        seen.shape = ir.Shape(half)
        graph.insert_after(node, joining)


def allow_decomposition(graph: ir.Graph) -> None:
    """TensorRT may compute an Attention in steps that write out its scores, where no fused kernel serves it.

    Without that the whole build fails for one such node, and which there are depends on flavour, version and
    GPU. `engine_builder` asks for fused kernels first, and judges what is built without.

    Requires: a graph for TensorRT's parser; ONNX Runtime refuses the attribute.
    Ensures: every Attention says so.
    """
    for node in graph:
        if node.op_type == "Attention":
            node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)


def fold_modulation(graph: ir.Graph) -> None:
    """A normalisation without weights, scaled and shifted, becomes a normalisation with them.

    Requires: Add(Mul(LayerNormalization(x, ones), gain), shift) with gain and shift (1, 1, width).
    Ensures: LayerNormalization(x, gain, shift): one kernel instead of three. In less than float32 the
    result is rounded once instead of three times. (In float32 ONNX Runtime ends up a little further from
    torch by it, 9e-6 against 8e-6 in the demo model's values.)
    """
    for norm in list(graph):
        if norm.op_type != "LayerNormalization" or not _is_ones(norm):
            continue
        scaled = _only_use(norm.outputs[0], "Mul")
        shifted = scaled and _only_use(scaled.outputs[0], "Add")
        if scaled is None or shifted is None:
            continue
        gain, shift = _other(scaled, norm.outputs[0]), _other(shifted, scaled.outputs[0])
        if not (_is_row(gain) and _is_row(shift)):
            continue
        inputs, name = [input_of(norm, 0), gain, shift], f"{norm.outputs[0].name}.modulated"
        kept = {name: norm.attributes[name] for name in ("axis", "epsilon", "stash_type")}
        folded, result = make("LayerNormalization", inputs, shifted.outputs[0], None, name, kept)
        graph.insert_before(shifted, folded)
        replace_node(graph, shifted, result)
        graph.remove([scaled, norm], safe=True)


def _is_ones(norm: ir.Node) -> bool:
    constant = ir.convenience.get_const_tensor(input_of(norm, 1))
    return len(norm.inputs) == 2 and constant is not None and bool((constant.numpy() == 1).all())


def _only_use(value: ir.Value, op_type: str) -> ir.Node | None:
    users = value.consumers()
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0] if alone and users[0].op_type == op_type else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value:
    return input_of(node, 1 if node.inputs[0] is value else 0)


def _is_row(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and len(shape) == 3 and list(shape)[:2] == [1, 1]


def align_parameters(parameters: Sequence[ir.Value]) -> None:
    """Parameters get the rank of what they meet.

    A vector beside (1, tokens, width) is (1, 1, width), and a matrix is (1, rows, columns): the same
    bytes, and TensorRT's parser adds no layer to make the ranks equal.

    Requires: parameters whose contents lie elsewhere, so that their shape is all that is written here.
    Ensures: those that meet operands of rank 3 alone, have rank 3.
    """
    for parameter in parameters:
        meetings = list(_meetings(parameter))
        if meetings and all(_fits(node, value) for node, value in meetings):
            _raise_rank(parameter)


def _meetings(value: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    """The nodes that use a value, and as which of their operands: seen through casts."""
    for node in value.consumers():
        if node.op_type == "Cast":
            yield from _meetings(node.outputs[0])
        else:
            yield node, value


def _fits(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node computes the same for an operand of rank 3."""
    other = node.inputs[0]
    if other is value or other is None or other.shape is None or len(other.shape) != 3:
        return False
    return node.op_type in ("Add", "Mul", "MatMul", "LayerNormalization", "RMSNormalization")


def _raise_rank(value: ir.Value) -> None:
    shape = shape_of(value)
    value.shape = ir.Shape([*[1] * (3 - len(shape)), *shape])
    for node in value.consumers():
        if node.op_type == "Cast":
            _raise_rank(node.outputs[0])
