"""What only the clean pass needs, in branches that the denoising passes do not take.

ONNX Runtime runs every node of a graph, whatever outputs are asked for, and the next caches are of use in one
pass of a chunk. So the nodes that make them stand in branches of `If`, whose condition is the input `clean`
(docs/decisions/0018).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from forcingkv.export.rewriting import makers
from forcingkv.runtime.bundle import CLEAN

THEN, ELSE = "then_branch", "else_branch"


def branch_on_clean(graph: ir.Graph, groups: Sequence[Sequence[str]]) -> None:
    """Put the nodes that only certain outputs need behind the input `clean`.

    There is an `If` for each group, since what its nodes read must wait for it: of one `If` for all, keys and
    values of every layer would. What several groups need is made by the first of them and handed on.

    Requires: outputs of known dtype, and of known sizes but along their tokens.
    Ensures: with `clean` every output is what it was. Without, the named ones have no tokens (their dimension
    before the last, or the only one), and no node runs that only they need; the others stay.

    Args:
        graph: to be changed; the new nodes stand last, in the order of the groups.
        groups: names of outputs.
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
            same = ir.Node("", "Identity", [value])
            copy = same.outputs[0]
            copy.type, copy.shape = value.type, value.shape
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
    sizes = [f"{value.name}.tokens" if n == _tokens(value) else size for n, size in enumerate(_shape(value))]
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
    sizes = [0 if n == _tokens(value) else size for n, size in enumerate(_shape(value))]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"the shape of {value.name} is not known: {value.shape}")
    content = np.zeros([int(str(size)) for size in sizes], value.dtype.numpy())
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(content, value.dtype))])
    made = node.outputs[0]
    made.name, made.type, made.shape = name, value.type, ir.Shape(content.shape)
    return node


def _shape(value: ir.Value) -> list[int | ir.SymbolicDim]:
    if value.shape is None:
        raise ValueError(f"the shape of {value.name} is not known")
    return list(value.shape)


def _tokens(value: ir.Value) -> int:
    """The dimension of the tokens: of keys (batch, heads, tokens, head_dim), of indices (tokens,)."""
    return max(0, len(_shape(value)) - 2)


def taken_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as it runs with `clean`: a copy in which the branches taken are no branches any more."""
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    del flat.graph.node[:]
    flat.graph.node.extend(node for outer in model.graph.node for node in _taken(outer))
    return flat


def _taken(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """The nodes that run in a node's place, under the names of its outputs."""
    if node.op_type != "If":
        yield node
        return
    branch = next(attribute.g for attribute in node.attribute if attribute.name == THEN)
    names = {value.name: name for value, name in zip(branch.output, node.output, strict=True)}
    for one in branch.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(one)
        copy.input[:] = [names.get(name, name) for name in one.input]
        copy.output[:] = [names.get(name, name) for name in one.output]
        yield copy
