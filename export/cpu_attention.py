"""Attention on a CPU without its scores in memory.

ONNX Runtime's kernel of the standard operator writes the scores of all heads out: at 1080P 57 GB for a
chunk's queries and twice as many keys. Its own operator MultiHeadAttention goes over blocks of queries and
keys instead, if keys and values have rank 3 and there is no mask, bias or past (docs/decisions/0014).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from forcingkv.export.rewriting import constant, replace_node

DOMAIN, VERSION = "com.microsoft", 1
LARGE_SCORES = 1 << 24
"""Bytes of scores from which attention goes over blocks. The standard operator is faster below 9 MB, and
slower above 30 MB (benchmarks/cpu_attention.py)."""


def attend_in_blocks(graph: ir.Graph, lengths: Mapping[str, int], smallest: int | None = None) -> None:
    """Attention whose scores are large becomes MultiHeadAttention, which never holds them all.

    Heads take the place of the batch, (heads, tokens, head_dim) with one head each: a Reshape, which moves
    nothing, where the operator's own layout would take a transposition of queries, keys, values and result.

    Requires: Attention in float32 of batch 1, without mask and cache of its own, with a scale, and queries of
    known shape.
    Ensures: no such Attention with scores of at least that size is left; shapes and results stay.

    Args:
        graph: to be changed.
        lengths: symbol of each dimension that varies -> its largest size.
        smallest: bytes of scores, where keys are most; None: `LARGE_SCORES`.
    """
    smallest = LARGE_SCORES if smallest is None else smallest
    for node in list(graph):
        if node.op_type != "Attention" or node.domain:
            continue
        queries, keys, *_ = node.inputs
        assert queries is not None
        assert keys is not None
        assert queries.shape is not None
        batch, heads, tokens, _ = queries.shape
        assert isinstance(heads, int)
        assert isinstance(tokens, int)
        if batch == 1 and 4 * heads * tokens * _tokens(keys, lengths) >= smallest:
            _replace(graph, node, heads, tokens)
    if any(node.domain == DOMAIN for node in graph):
        graph.opset_imports[DOMAIN] = VERSION


def _tokens(keys: ir.Value, lengths: Mapping[str, int]) -> int:
    """The most keys (batch, heads, tokens, head_dim) there are; joined ones are counted by part."""
    assert keys.shape is not None
    size = keys.shape[2]
    if isinstance(size, int):
        return size
    if size.value is not None and size.value in lengths:
        return lengths[size.value]
    node = keys.producer()
    if node is None or node.op_type != "Concat":
        raise ValueError(f"the length of {keys.name} is not known: {size}")
    return sum(_tokens(part, lengths) for part in node.inputs if part is not None)


def _replace(graph: ir.Graph, node: ir.Node, heads: int, tokens: int) -> None:
    flat, last = [], 0
    for place, value in enumerate(node.inputs[:3]):
        assert value is not None
        assert value.shape is not None
        assert value.dtype == ir.DataType.FLOAT
        width = value.shape[3]
        assert isinstance(width, int)
        last = width
        rows = -1 if place else tokens
        shape = constant(graph, f"heads_{heads}_{rows}_{width}", np.array([heads, rows, width], np.int64))
        reshape = ir.Node("", "Reshape", [value, shape])
        reshape.outputs[0].name = f"{node.outputs[0].name}.{'qkv'[place]}"
        reshape.outputs[0].type = value.type
        reshape.outputs[0].shape = ir.Shape([heads, value.shape[2], width])
        flat.append(reshape)
    attributes = [ir.AttrInt64("num_heads", 1), ir.AttrFloat32("scale", node.attributes["scale"].as_float())]
    attend = ir.Node(DOMAIN, "MultiHeadAttention", [one.outputs[0] for one in flat], attributes)
    seen = attend.outputs[0]
    seen.name = f"{node.outputs[0].name}.heads"
    seen.type, seen.shape = node.outputs[0].type, ir.Shape([heads, tokens, last])
    # Every size is said: onnx infers no shape from an operator it does not know.
    whole = constant(graph, f"all_{heads}_{tokens}_{last}", np.array([1, heads, tokens, last], np.int64))
    back = ir.Node("", "Reshape", [seen, whole])
    back.outputs[0].type, back.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, [*flat, attend, back])
    replace_node(graph, node, back.outputs[0])
