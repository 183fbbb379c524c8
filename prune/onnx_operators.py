"""The ONNX operators DynamicPrune and DynamicPruneFollow (domain `forcingkv`).

Each is one node with a function body in standard operators: ONNX Runtime runs the body, and TensorRT
runs the plugin where one is registered under `plugin_namespace` (docs/decisions/0003). `translation_table`
exports the torch operators to these nodes.

TokenCosines, SelectSegments and DynamicPruneFollow are the three kernels as operators, for plugins that hold
one kernel each: `split_prune` puts them in DynamicPrune's place. They are not nodes of its body, since
TensorRT looks for no plugins inside a body and passes attributes down one level only; instead the bodies are
made of the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import onnx
import torch
from onnx import defs, helper, parser
from onnxscript import values

import forcingkv.prune.reference  # noqa: F401  (registers the torch operators)
from forcingkv.headmaps.errors import InputError
from forcingkv.prune.plugin import PLUGIN_NAMESPACE
from forcingkv.runtime.kv.plan import CachePlan

DOMAIN, VERSION = "forcingkv", 1
OPSET = 23

_TENSORS = "transition_keys, transition_values, new_keys, new_values"
_RETAINED = "retained_keys, retained_values"

_FRAME = """
    frame = Constant <value_int: int = @frame_tokens> ()
"""
_SEGMENT = """
    segment = Constant <value_int: int = @segment_tokens> ()
"""
_SEGMENT_OF_FRAME = """
    pieces = Constant <value_int: int = @segments> ()
    segment = Div (frame, pieces)
"""
_SEGMENT1 = """
    axis0 = Constant <value_ints = [0]> ()
    segment1 = Unsqueeze (segment, axis0)
"""
_KEYS = """
    keys = Concat <axis = 2> (transition_keys, new_keys)
"""
# Tokens are gathered, not sliced: TensorRT's parser makes 27 layers of shape arithmetic of a Slice.
_COSINES = """
    # Batch item 0 decides: (heads, tokens, head_dim), in float32 whatever the keys are.
    zero = Constant <value_int = 0> ()
    decider = Gather <axis = 0> (keys, zero)
    exact = Cast <to = 1> (decider)

    # Each token but those of the last frame, and the one at its place a frame later.
    one = Constant <value_int = 1> ()
    count1 = Shape <start = 1, end = 2> (exact)
    count = Squeeze (count1)
    candidate_tokens = Sub (count, frame)
    earlier = Range (zero, candidate_tokens, one)
    later = Add (earlier, frame)

    # The cosine of the two, heads side by side.
    vector_axes = Constant <value_ints = [0, 2]> ()
    tiny = Constant <value_float = 1e-8> ()
    earlier_keys = Gather <axis = 1> (exact, earlier)
    later_keys = Gather <axis = 1> (exact, later)
    products = Mul (earlier_keys, later_keys)
    dot = ReduceSum <keepdims = 0> (products, vector_axes)
    squares = Mul (exact, exact)
    power = ReduceSum <keepdims = 0> (squares, vector_axes)
    root = Sqrt (power)
    norm = Max (root, tiny)
    earlier_norm = Gather <axis = 0> (norm, earlier)
    later_norm = Gather <axis = 0> (norm, later)
    norms = Mul (earlier_norm, later_norm)
    cosines = Div (dot, norms)
"""
_SELECT = """
    # Mean over each segment; the least similar ones, in ascending order. TopK breaks ties by index.
    rest = Constant <value_ints = [-1]> ()
    axis1 = Constant <value_ints = [1]> ()
    by_segment = Concat <axis = 0> (rest, segment1)
    split_cosines = Reshape (cosines, by_segment)
    similarity = ReduceMean <keepdims = 0> (split_cosines, axis1)
    wanted = Constant <value_int: int = @kept> ()
    wanted1 = Unsqueeze (wanted, axis0)
    least, chosen = TopK <axis = 0, largest = 0, sorted = 1> (similarity, wanted1)
    indices, places = TopK <axis = 0, largest = 0, sorted = 1> (chosen, wanted1)
"""
_COLLECT = """
    # (batch, heads, segments, segment tokens, head_dim); 0 stands for the size there was.
    values = Concat <axis = 2> (transition_values, new_values)
    as_before = Constant <value_ints = [0, 0, -1]> ()
    width = Shape <start = 3, end = 4> (keys)
    split_shape = Concat <axis = 0> (as_before, segment1, width)
    out_shape = Concat <axis = 0> (as_before, width)
    split_keys = Reshape (keys, split_shape)
    picked_keys = Gather <axis = 2> (split_keys, indices)
    retained_keys = Reshape (picked_keys, out_shape)
    split_values = Reshape (values, split_shape)
    picked_values = Gather <axis = 2> (split_values, indices)
    retained_values = Reshape (picked_values, out_shape)
"""


_FUNCTIONS = {
    f"DynamicPrune <frame_tokens, segments, kept, plugin_namespace> ({_TENSORS}) => ({_RETAINED}, indices)": (
        _FRAME + _SEGMENT_OF_FRAME + _SEGMENT1 + _KEYS + _COSINES + _SELECT + _COLLECT
    ),
    f"DynamicPruneFollow <segment_tokens, plugin_namespace> ({_TENSORS}, indices) => ({_RETAINED})": (
        _SEGMENT + _SEGMENT1 + _KEYS + _COLLECT
    ),
    "TokenCosines <frame_tokens, plugin_namespace> (transition_keys, new_keys) => (cosines)": (
        _FRAME + _KEYS + _COSINES
    ),
    "SelectSegments <segment_tokens, kept, plugin_namespace> (cosines) => (indices)": (
        _SEGMENT + _SEGMENT1 + _SELECT
    ),
}
"""What each operator takes and gives -> its body."""


def check_choice(plan: CachePlan) -> None:
    """Raise InputError unless the operators choose segments as the plan says: scored once, and shared."""
    role = plan.choice.role if plan.choice else None
    if role and (role.choose != "least-similar" or not role.shared):
        raise InputError(
            f"has choose = {role.choose!r} and shared = {str(role.shared).lower()}, which is not exported",
            where=f"the policy {plan.policy.name}",
            expected="choose = 'least-similar' and shared = true",
            hint="Other choices run in torch only (models/generate.py).",
        )


def prune_functions() -> list[onnx.FunctionProto]:
    """The function bodies of all operators."""
    imports = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'
    return [parser.parse_function(f"{imports}\n{head}\n{{{body}}}") for head, body in _FUNCTIONS.items()]


def functions_for(model: onnx.ModelProto) -> list[onnx.FunctionProto]:
    """The bodies that a model's nodes need. None contains another."""
    used = {node.op_type for graph in graphs(model) for node in graph.node if node.domain == DOMAIN}
    return [function for function in prune_functions() if function.name in used]


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph of a model, and those of the branches in it."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop(0)
        yield graph
        waiting += [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def split_prune(model: onnx.ModelProto) -> None:
    """Put TokenCosines, SelectSegments and DynamicPruneFollow in the place of each DynamicPrune.

    The model computes the same; its nodes are then one kernel each.
    """
    for graph in graphs(model):
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            nodes += _one_kernel_each(node) if node.op_type == "DynamicPrune" else [node]
        del graph.node[:]
        graph.node.extend(nodes)
    others = [f for f in model.functions if f.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend([*others, *functions_for(model)])


def _one_kernel_each(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    numbers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    frame_tokens, kept = numbers["frame_tokens"], numbers["kept"]
    segment_tokens = frame_tokens // numbers["segments"]
    *retained, indices = node.output
    cosines = f"{indices}.cosines"

    def make(name: str, inputs: list[str], outputs: list[str], **sizes: Any) -> onnx.NodeProto:
        sizes |= {"domain": DOMAIN, "plugin_namespace": PLUGIN_NAMESPACE}
        return helper.make_node(name, inputs, outputs, f"{node.name}.{name}", **sizes)

    keys, _, new_keys, _ = tensors = list(node.input)
    return [
        make("TokenCosines", [keys, new_keys], [cosines], frame_tokens=frame_tokens),
        make("SelectSegments", [cosines], [indices], segment_tokens=segment_tokens, kept=kept),
        make("DynamicPruneFollow", [*tensors, indices], retained, segment_tokens=segment_tokens),
    ]


def translation_table() -> dict[Any, Any]:
    """How torch's exporter turns the torch operators into these nodes."""
    opset = _opset()
    ops = torch.ops.forcingkv

    def score(tk: Any, tv: Any, nk: Any, nv: Any, frame_tokens: int, segments: int, kept: int) -> Any:
        sizes = {"frame_tokens": frame_tokens, "segments": segments, "kept": kept}
        return opset.DynamicPrune(tk, tv, nk, nv, **sizes, plugin_namespace=PLUGIN_NAMESPACE)

    def follow(tk: Any, tv: Any, nk: Any, nv: Any, indices: Any, segment_tokens: int) -> Any:
        sizes = {"segment_tokens": segment_tokens}
        return opset.DynamicPruneFollow(tk, tv, nk, nv, indices, **sizes, plugin_namespace=PLUGIN_NAMESPACE)

    return {ops.dynamic_prune.default: score, ops.dynamic_prune_follow.default: follow}


@cache
def _opset() -> Any:
    """The schemas of the two operators that torch exports to, registered with onnx once a process."""
    kinds = defs.OpSchema.AttrType

    def tensors(names: Iterable[str]) -> list[defs.OpSchema.FormalParameter]:
        formal = defs.OpSchema.FormalParameter
        return [formal(name, "tensor(int64)" if name == "indices" else "T") for name in names]

    keys = [("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "keys and values")]
    for body in prune_functions()[:2]:
        takes, gives, given = tensors(body.input), tensors(body.output), []
        for name in body.attribute:
            kind = kinds.STRING if name == "plugin_namespace" else kinds.INT
            given.append(defs.OpSchema.Attribute(name, kind, "", required=True))
        schema = defs.OpSchema(
            body.name, DOMAIN, VERSION, inputs=takes, outputs=gives, type_constraints=keys, attributes=given
        )
        defs.register_schema(schema)
    return values.Opset(DOMAIN, VERSION)
