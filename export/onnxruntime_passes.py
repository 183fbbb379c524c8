"""Passes for ONNX Runtime on a CPU: attention without its scores in memory, caches in clean passes only.

Each says what it requires of a graph and what it ensures; `onnx_writer.write_onnx` runs them in order.

Attention in blocks. ONNX Runtime's kernel of the standard operator writes the scores of all heads out: at
1080P 57 GB for a chunk's queries and twice as many keys. Its own operator MultiHeadAttention goes over blocks
of queries and keys instead, if keys and values have rank 3 and there is no mask, bias or past
(docs/decisions/0014).

Branches. ONNX Runtime runs every node of a graph, whatever outputs are asked for, and the next caches are of
use in one pass of a chunk. So the nodes that make them stand in branches of `If`, whose condition is the
input `clean` (docs/decisions/0018).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from forcingkv.export.passes import constant, input_of, make, makers, read_by, replace_node, shape_of, size_of
from forcingkv.runtime.bundle import CLEAN

ORT_DOMAIN, ORT_VERSION = "com.microsoft", 1
"""ONNX Runtime's own operators."""
LARGE_SCORES = 1 << 24
"""Bytes of scores from which attention goes over blocks. The standard operator is faster below 9 MB, and
slower above 30 MB (measured in docs/decisions/0014)."""

THEN, ELSE = "then_branch", "else_branch"


def attend_in_blocks(graph: ir.Graph, lengths: Mapping[str, int]) -> None:
    """Attention whose scores are large becomes MultiHeadAttention, which never holds them all.

    Heads take the place of the batch, (heads, tokens, head_dim) with one head each: a Reshape, which moves
    nothing, where the operator's own layout would take a transposition of queries, keys, values and result.

    Requires: Attention in float32 of batch 1, without mask and cache of its own, with a scale, and queries of
    known shape but for their number, which may vary.
    Ensures: no such Attention with scores of at least `LARGE_SCORES` is left; shapes and results stay.

    `lengths`: symbol of each dimension that varies -> its largest size.
    """
    for node in list(graph):
        if node.op_type != "Attention" or node.domain:
            continue
        queries, keys = (input_of(node, place) for place in range(2))
        batch, heads = (size_of(queries, axis) for axis in range(2))
        scores = _most_tokens(queries, lengths) * _most_tokens(keys, lengths)
        if batch == 1 and 4 * heads * scores >= LARGE_SCORES:
            _attend_by_head(graph, node, heads, shape_of(queries)[2])
            graph.opset_imports[ORT_DOMAIN] = ORT_VERSION


def _most_tokens(keys: ir.Value, lengths: Mapping[str, int]) -> int:
    """The most keys (batch, heads, tokens, head_dim), or queries; joined ones are counted by part, and those
    that some are cut off as if they were whole."""
    size = shape_of(keys)[2]
    if isinstance(size, int):
        return size
    if size.value is not None and size.value in lengths:
        return lengths[size.value]
    node = keys.producer()
    if node is not None and node.op_type == "Slice":
        return _most_tokens(input_of(node, 0), lengths)
    if node is None or node.op_type != "Concat":
        raise ValueError(f"the length of {keys.name} is not known: {size}")
    return sum(_most_tokens(part, lengths) for part in node.inputs if part is not None)


def _attend_by_head(graph: ir.Graph, node: ir.Node, heads: int, tokens: int | ir.SymbolicDim) -> None:
    old, queries = node.outputs[0], tokens if isinstance(tokens, int) else -1
    reshapes, flat = [], []
    for place, part in enumerate("qkv"):
        value = input_of(node, place)
        assert value.dtype == ir.DataType.FLOAT
        rows, width = -1 if place else queries, size_of(value, 3)
        shape = constant(graph, f"heads_{heads}_{rows}_{width}", np.array([heads, rows, width], np.int64))
        sizes = [heads, shape_of(value)[2], width]
        reshape, result = make("Reshape", [value, shape], value, sizes, f"{old.name}.{part}")
        reshapes.append(reshape)
        flat.append(result)
    attributes = {"num_heads": 1, "scale": node.attributes["scale"].as_float()}
    name, sizes = f"{old.name}.heads", [heads, tokens, width]
    attend, seen = make("MultiHeadAttention", flat, old, sizes, name, attributes, domain=ORT_DOMAIN)
    # Every size is given, where it is known: onnx infers no shape from an operator it does not know.
    whole = constant(graph, f"all_{heads}_{queries}_{width}", np.array([1, heads, queries, width], np.int64))
    back, result = make("Reshape", [seen, whole], old)
    graph.insert_before(node, [*reshapes, attend, back])
    replace_node(graph, node, result)


def branch_on_clean(graph: ir.Graph, groups: Sequence[Sequence[str]]) -> None:
    """Put the nodes that only certain outputs need, named in `groups`, behind the input `clean`.

    There is an `If` for each group, since what its nodes read must wait for it: of one `If` for all, keys and
    values of every layer would. What several groups need is made by the first of them and handed on.

    Requires: outputs of known dtype, and of known sizes but along their tokens.
    Ensures: with `clean` every output is what it was. Without, the named ones have no tokens (their dimension
    before the last, or the only one), and no node runs that only they need; the others stay. The new nodes
    stand last, in the order of the groups.
    """
    clean = ir.Value(name=CLEAN, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    graph.inputs.append(clean)
    named = {name for group in groups for name in group}
    outside = makers([value for value in graph.outputs if value.name not in named])
    for group in groups:
        _copy_what_is_made_outside(graph, group, outside)
        needed = makers([value for value in graph.outputs if value.name in group], outside)
        branch = _branch(graph, clean, [node for node in graph if node in needed])
        graph.append(branch)
        outside.add(branch)


def _copy_what_is_made_outside(graph: ir.Graph, group: Sequence[str], outside: set[ir.Node]) -> None:
    """A named output that is also needed in every pass gets a node of its own."""
    for place, value in enumerate(graph.outputs):
        if value.name in group and value.producer() in outside:
            same, copy = make("Identity", [value], value)
            graph.append(same)
            graph.outputs[place] = copy
            copy.name, value.name = value.name, f"{value.name}.passed"


def _branch(graph: ir.Graph, clean: ir.Value, nodes: Sequence[ir.Node]) -> ir.Node:
    """Move nodes into the branch of an `If`, whose outputs take the places of what others read of them."""
    inside = set(nodes)
    given = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]
    results = [_stand_in(graph, value, inside) for value in given]
    graph.remove(nodes)
    name = results[0].name
    then = ir.Graph((), given, nodes=nodes, name=f"{name}.{THEN}")
    empty = [_empty(value, f"{result.name}.none") for value, result in zip(given, results, strict=True)]
    otherwise = ir.Graph((), [node.outputs[0] for node in empty], nodes=empty, name=f"{name}.{ELSE}")
    branches = [ir.AttrGraph(THEN, then), ir.AttrGraph(ELSE, otherwise)]
    return ir.Node("", "If", [clean], branches, outputs=results)


def _stand_in(graph: ir.Graph, value: ir.Value, inside: set[ir.Node]) -> ir.Value:
    """The value that all but the nodes inside the branch see from now on, under the name there was."""
    assert value.name is not None
    tokens = f"{value.name}.tokens"
    sizes = [tokens if n == _token_axis(value) else size for n, size in enumerate(shape_of(value))]
    seen = ir.Value(name=value.name, type=value.type, shape=ir.Shape(sizes))
    for use in tuple(value.uses()):
        if use.node not in inside:
            use.node.replace_input_with(use.idx, seen)
    for place, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[place] = seen
    value.name = f"{value.name}.made"
    return seen


def _empty(value: ir.Value, name: str) -> ir.Node:
    """A constant of the value's dtype and shape, but without tokens."""
    assert value.dtype is not None
    sizes = [0 if n == _token_axis(value) else size_of(value, n) for n in range(len(shape_of(value)))]
    content = ir.tensor(np.zeros(sizes, value.dtype.numpy()), value.dtype)
    node = ir.node("Constant", [], {"value": content})
    made = node.outputs[0]
    made.name, made.type, made.shape = name, value.type, ir.Shape(sizes)
    return node


def _token_axis(value: ir.Value) -> int:
    """The dimension of the tokens: of keys (batch, heads, tokens, head_dim), of indices (tokens,)."""
    return max(0, len(shape_of(value)) - 2)


def make_caches_early(graph: ir.Graph) -> None:
    """Nodes that only outputs need are moved to right behind the nodes that make what they read.

    A trace makes the next caches last, and until then keys and values of all layers would stay in memory.

    Ensures: the same nodes, in an order in which those that the first output does not depend on come right
    after the last node that makes one of their inputs.
    """
    needed = makers(graph.outputs[:1])
    after: dict[ir.Node, int] = {}
    for number, node in enumerate(graph):
        # What is made inside a branch has no place of its own.
        places = [after.get(maker) for value in read_by(node) if (maker := value.producer())]
        earliest = max((place for place in places if place is not None), default=-1)
        after[node] = number if node in needed else earliest
    order = sorted(graph, key=after.__getitem__)  # stable: of those that may stand there, as they stood
    graph.remove(order)
    graph.extend(order)


def taken_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as it runs with `clean`: a copy in which the branches taken are no branches any more."""
    flat = copy.deepcopy(model)
    del flat.graph.node[:]
    for outer in model.graph.node:
        if outer.op_type != "If":
            flat.graph.node.append(outer)
            continue
        branch = next(attribute.g for attribute in outer.attribute if attribute.name == THEN)
        names = {value.name: name for value, name in zip(branch.output, outer.output, strict=True)}
        for inner in branch.node:
            node = flat.graph.node.add()
            node.CopyFrom(inner)
            node.input[:] = [names.get(name, name) for name in inner.input]
            node.output[:] = [names.get(name, name) for name in inner.output]
    return flat
