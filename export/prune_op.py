"""The ONNX operators DynamicPrune and DynamicPruneFollow (domain `forcingkv`).

Each is one node with a function body in standard operators: ONNX Runtime runs the body, and TensorRT
runs the plugin where one is registered under `plugin_namespace` (docs/decisions). The body is the
reference that plugin and kernels are tested against. Definitions: METHOD.md section 3.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx
import torch
from onnx import defs, parser
from onnxscript import values

import forcingkv.models.prune  # noqa: F401  (registers the torch operators)

__all__ = ["DOMAIN", "OPSET", "PLUGIN_NAMESPACE", "prune_functions", "translation_table"]

DOMAIN, VERSION = "forcingkv", 1
PLUGIN_NAMESPACE = "forcingkv"
OPSET = 23

_TENSORS = ["transition_keys", "transition_values", "new_keys", "new_values"]
_KEPT = ["retained_keys", "retained_values"]
_HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'

_SCORE_BODY = (
    _HEADER
    + """
DynamicPrune <frame_tokens, segments, kept, plugin_namespace>
    (transition_keys, transition_values, new_keys, new_values)
    => (retained_keys, retained_values, indices)
{
    frame = Constant <value_int: int = @frame_tokens> ()
    pieces = Constant <value_int: int = @segments> ()
    wanted = Constant <value_int: int = @kept> ()
    axis0 = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    tiny = Constant <value_float = 1e-8> ()

    keys = Concat <axis = 2> (transition_keys, new_keys)
    values = Concat <axis = 2> (transition_values, new_values)

    # Batch item 0 decides: (heads, tokens, head_dim) -> (heads, frames, frame tokens, head_dim).
    zero = Constant <value_int = 0> ()
    decider = Gather <axis = 0> (keys, zero)
    head_count = Shape <start = 0, end = 1> (decider)
    width = Shape <start = 2, end = 3> (decider)
    frame1 = Unsqueeze (frame, axis0)
    by_frame = Concat <axis = 0> (head_count, rest, frame1, width)
    frames = Reshape (decider, by_frame)

    # Cosine between a token's key and the one at its place a frame later, heads side by side.
    frame_axis = Constant <value_ints = [1]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    vector_axes = Constant <value_ints = [0, 3]> ()
    earlier = Slice (frames, first, last, frame_axis)
    later = Slice (frames, second, end, frame_axis)
    product = Mul (earlier, later)
    dot = ReduceSum <keepdims = 0> (product, vector_axes)
    squares = Mul (frames, frames)
    power = ReduceSum <keepdims = 0> (squares, vector_axes)
    root = Sqrt (power)
    tiny_like = CastLike (tiny, root)
    norm = Max (root, tiny_like)
    norm_earlier = Slice (norm, first, last, first)
    norm_later = Slice (norm, second, end, first)
    norms = Mul (norm_earlier, norm_later)
    cosine = Div (dot, norms)

    # Mean over each segment; the least similar ones, in ascending order. TopK breaks ties by index.
    segment = Div (frame, pieces)
    segment1 = Unsqueeze (segment, axis0)
    by_segment = Concat <axis = 0> (rest, segment1)
    cosines = Reshape (cosine, by_segment)
    similarity = ReduceMean <keepdims = 0> (cosines, second)
    wanted1 = Unsqueeze (wanted, axis0)
    least, chosen = TopK <axis = 0, largest = 0, sorted = 1> (similarity, wanted1)
    indices, places = TopK <axis = 0, largest = 0, sorted = 1> (chosen, wanted1)

    start_shape = Shape <start = 0, end = 2> (keys)
    split_shape = Concat <axis = 0> (start_shape, rest, segment1, width)
    out_shape = Concat <axis = 0> (start_shape, rest, width)
    split_keys = Reshape (keys, split_shape)
    picked_keys = Gather <axis = 2> (split_keys, indices)
    retained_keys = Reshape (picked_keys, out_shape)
    split_values = Reshape (values, split_shape)
    picked_values = Gather <axis = 2> (split_values, indices)
    retained_values = Reshape (picked_values, out_shape)
}
"""
)

_FOLLOW_BODY = (
    _HEADER
    + """
DynamicPruneFollow <segment_tokens, plugin_namespace>
    (transition_keys, transition_values, new_keys, new_values, indices)
    => (retained_keys, retained_values)
{
    segment = Constant <value_int: int = @segment_tokens> ()
    axis0 = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    keys = Concat <axis = 2> (transition_keys, new_keys)
    values = Concat <axis = 2> (transition_values, new_values)
    segment1 = Unsqueeze (segment, axis0)
    start_shape = Shape <start = 0, end = 2> (keys)
    width = Shape <start = 3, end = 4> (keys)
    split_shape = Concat <axis = 0> (start_shape, rest, segment1, width)
    out_shape = Concat <axis = 0> (start_shape, rest, width)
    split_keys = Reshape (keys, split_shape)
    picked_keys = Gather <axis = 2> (split_keys, indices)
    retained_keys = Reshape (picked_keys, out_shape)
    split_values = Reshape (values, split_shape)
    picked_values = Gather <axis = 2> (split_values, indices)
    retained_values = Reshape (picked_values, out_shape)
}
"""
)


def prune_functions() -> list[onnx.FunctionProto]:
    """The function bodies, to be put into a model that uses the operators."""
    return [parser.parse_function(body) for body in (_SCORE_BODY, _FOLLOW_BODY)]


def translation_table() -> dict[Any, Any]:
    """How torch's exporter turns the torch operators into these nodes."""
    opset = _opset()
    ops = torch.ops.forcingkv

    def score(tk: Any, tv: Any, nk: Any, nv: Any, frame_tokens: int, segments: int, kept: int) -> Any:
        return opset.DynamicPrune(
            tk, tv, nk, nv,
            frame_tokens=frame_tokens, segments=segments, kept=kept, plugin_namespace=PLUGIN_NAMESPACE,
        )  # fmt: skip

    def follow(tk: Any, tv: Any, nk: Any, nv: Any, indices: Any, segment_tokens: int) -> Any:
        return opset.DynamicPruneFollow(
            tk, tv, nk, nv, indices, segment_tokens=segment_tokens, plugin_namespace=PLUGIN_NAMESPACE
        )

    return {ops.dynamic_prune.default: score, ops.dynamic_prune_follow.default: follow}


@cache
def _opset() -> Any:
    """The operators' schemas, registered with onnx once a process."""
    tensors = [(name, "T") for name in _TENSORS]
    kept = [(name, "T") for name in _KEPT]
    indices = ("indices", "tensor(int64)")
    _register("DynamicPrune", tensors, [*kept, indices], ["frame_tokens", "segments", "kept"])
    _register("DynamicPruneFollow", [*tensors, indices], kept, ["segment_tokens"])
    return values.Opset(DOMAIN, VERSION)


def _register(
    name: str, inputs: list[tuple[str, str]], outputs: list[tuple[str, str]], numbers: list[str]
) -> None:
    formal, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    kinds = defs.OpSchema.AttrType
    attributes = [attribute(n, kinds.INT, "", required=True) for n in numbers]
    attributes.append(attribute("plugin_namespace", kinds.STRING, "", required=True))
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    defs.register_schema(
        defs.OpSchema(
            name,
            DOMAIN,
            VERSION,
            inputs=[formal(n, kind) for n, kind in inputs],
            outputs=[formal(n, kind) for n, kind in outputs],
            type_constraints=[("T", floats, "keys and values")],
            attributes=attributes,
        )
    )
