"""The ONNX operators of DynamicPrune (domain `forcingkv`): one that scores, and one that follows.

DynamicPrune and DynamicPruneFollow are for frames whose segments have as many tokens each, UnevenPrune and
UnevenPruneFollow for all others (`runtime.kv.segments`). Each is one node with a function body in standard
operators: ONNX Runtime runs the body, and TensorRT runs the plugin where one is registered under
`plugin_namespace` (docs/decisions/0003). `translation_table` exports the torch operators to these nodes.

TokenCosines, SelectSegments (or SelectUnevenSegments) and the operator that follows are the three kernels as
operators, for plugins that hold one kernel each: `split_prune` puts them in the place of the operator that
scores. They are not nodes of its body, since TensorRT looks for no plugins inside a body and passes
attributes down one level only; instead the bodies are made of the same text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import onnx
import torch
from onnx import defs, helper, parser
from onnxscript import values

import forcingkv.prune.reference  # noqa: F401  (registers the torch operators)
from forcingkv.headmaps.errors import InputError
from forcingkv.prune.plugin import PLUGIN_NAMESPACE
from forcingkv.runtime.graph_memory import SCORING
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
from forcingkv.runtime.kv.roles import Recent
from forcingkv.runtime.kv.segments import Split

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

_SPLIT = """
    pieces = Constant <value_int: int = @segments> ()
    kept_tokens = Div (frame, pieces)
    nought = Constant <value_int = 0> ()
    step1 = Constant <value_int = 1> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
"""
_SELECT_UNEVEN = """
    # Where each segment begins, and where the last one ends: frame * tokens + place * tokens / segments.
    scored1 = Shape (cosines)
    scored = Squeeze (scored1)
    candidate_frames = Div (scored, frame)
    candidates = Mul (candidate_frames, pieces)
    past_candidates = Add (candidates, step1)
    counted = Range (nought, past_candidates, step1)
    counted_frame = Div (counted, pieces)
    counted_before = Mul (counted_frame, pieces)
    counted_place = Sub (counted, counted_before)
    counted_tokens = Mul (counted_place, frame)
    counted_within = Div (counted_tokens, pieces)
    counted_first = Mul (counted_frame, frame)
    bounds = Add (counted_first, counted_within)
    first_places = Range (nought, candidates, step1)
    next_places = Range (step1, past_candidates, step1)
    begins = Gather <axis = 0> (bounds, first_places)
    ends = Gather <axis = 0> (bounds, next_places)
    sizes = Sub (ends, begins)

    # Mean over each segment's own tokens, the longest segments having one more than is kept.
    longest = Add (kept_tokens, step1)
    offsets = Range (nought, longest, step1)
    begin_column = Unsqueeze (begins, axis_1)
    size_column = Unsqueeze (sizes, axis_1)
    offset_row = Unsqueeze (offsets, axis_0)
    tokens = Add (begin_column, offset_row)
    last_token = Sub (scored, step1)
    there = Min (tokens, last_token)
    read_cosines = Gather <axis = 0> (cosines, there)
    own = Less (offset_row, size_column)
    nothing = Constant <value_float = 0.0> ()
    own_cosines = Where (own, read_cosines, nothing)
    sums = ReduceSum <keepdims = 0> (own_cosines, axis_1)
    divisors = Cast <to = 1> (sizes)
    similarity = Div (sums, divisors)

    # The least similar ones, in ascending order. TopK breaks ties by index.
    wanted = Constant <value_int: int = @kept> ()
    wanted1 = Unsqueeze (wanted, axis_0)
    least, chosen = TopK <axis = 0, largest = 0, sorted = 1> (similarity, wanted1)
    indices, places = TopK <axis = 0, largest = 0, sorted = 1> (chosen, wanted1)
"""
_COLLECT_UNEVEN = """
    # The first tokens of each chosen segment, as many as the shortest has.
    values = Concat <axis = 2> (transition_values, new_values)
    chosen_frame = Div (indices, pieces)
    chosen_before = Mul (chosen_frame, pieces)
    chosen_place = Sub (indices, chosen_before)
    chosen_tokens = Mul (chosen_place, frame)
    chosen_within = Div (chosen_tokens, pieces)
    chosen_first = Mul (chosen_frame, frame)
    chosen_start = Add (chosen_first, chosen_within)
    start_column = Unsqueeze (chosen_start, axis_1)
    kept_offsets = Range (nought, kept_tokens, step1)
    kept_row = Unsqueeze (kept_offsets, axis_0)
    row_table = Add (start_column, kept_row)
    flat = Constant <value_ints = [-1]> ()
    rows = Reshape (row_table, flat)
    retained_keys = Gather <axis = 2> (keys, rows)
    retained_values = Gather <axis = 2> (values, rows)
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
    f"UnevenPrune <frame_tokens, segments, kept, plugin_namespace> ({_TENSORS}) => ({_RETAINED}, indices)": (
        _FRAME + _SPLIT + _KEYS + _COSINES + _SELECT_UNEVEN + _COLLECT_UNEVEN
    ),
    f"UnevenPruneFollow <frame_tokens, segments, plugin_namespace> ({_TENSORS}, indices) => ({_RETAINED})": (
        _FRAME + _SPLIT + _KEYS + _COLLECT_UNEVEN
    ),
    "SelectUnevenSegments <frame_tokens, segments, kept, plugin_namespace> (cosines) => (indices)": (
        _FRAME + _SPLIT + _SELECT_UNEVEN
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

    for group in plan.groups if role else ():
        _check_recent(plan, group)


def _check_recent(plan: CachePlan, group: HeadGroup) -> None:
    """Raise InputError where segments are first chosen while a group's recent frames are still coming in."""
    recent = [one for one in group.roles if isinstance(one, Recent)]
    if not recent or not any(one.chooses for one in group.roles):
        return
    first = next(chunk for chunk in itertools.count() if plan.chooses(chunk))
    held, whole = (
        sum(sizes) // plan.frame_tokens
        for sizes in (
            [one.tokens(plan, group, first) for one in recent],
            [one.steady_tokens(plan, group) for one in recent],
        )
    )
    if held < whole:
        raise InputError(
            f"chooses segments from chunk {first} on, which finds {held} of {whole} recent frames",
            where=f"the policy {plan.policy.name}",
            expected=f"{whole} recent frames by then: fewer of them, or a larger ar_start",
            hint="The backend torch runs it without graphs (export --target torch).",
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
    """Put an operator for each kernel in the place of each operator that scores.

    The model computes the same; its nodes are then one kernel each.
    """
    for graph in graphs(model):
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            nodes += _one_kernel_each(node) if node.op_type in SCORING else [node]
        del graph.node[:]
        graph.node.extend(nodes)
    others = [f for f in model.functions if f.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend([*others, *functions_for(model)])


def _one_kernel_each(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    numbers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    frame_tokens, kept = numbers["frame_tokens"], numbers["kept"]
    split = _split_of(frame_tokens, numbers["segments"])
    *retained, indices = node.output
    cosines = f"{indices}.cosines"

    def make(name: str, inputs: list[str], outputs: list[str], **sizes: Any) -> onnx.NodeProto:
        sizes |= {"domain": DOMAIN, "plugin_namespace": PLUGIN_NAMESPACE}
        return helper.make_node(name, inputs, outputs, f"{node.name}.{name}", **sizes)

    keys, _, new_keys, _ = tensors = list(node.input)
    return [
        make("TokenCosines", [keys, new_keys], [cosines], frame_tokens=frame_tokens),
        make(split.select, [cosines], [indices], **split.sizes, kept=kept),
        make(split.follow, [*tensors, indices], retained, **split.sizes),
    ]


class _Split(NamedTuple):
    """The operators for frames that are split in one way, and what they are told of it."""

    score: str
    select: str
    follow: str
    sizes: dict[str, int]


def _split_of(frame_tokens: int, segments: int) -> _Split:
    split = Split(frame_tokens, segments)
    if split.is_even:
        sizes = {"segment_tokens": split.kept_tokens}
        return _Split("DynamicPrune", "SelectSegments", "DynamicPruneFollow", sizes)
    sizes = {"frame_tokens": frame_tokens, "segments": segments}
    return _Split("UnevenPrune", "SelectUnevenSegments", "UnevenPruneFollow", sizes)


def translation_table() -> dict[Any, Any]:
    """How torch's exporter turns the torch operators into these nodes."""
    opset = _opset()
    ops = torch.ops.forcingkv

    def score(tk: Any, tv: Any, nk: Any, nv: Any, frame_tokens: int, segments: int, kept: int) -> Any:
        sizes = {"frame_tokens": frame_tokens, "segments": segments, "kept": kept}
        make = getattr(opset, _split_of(frame_tokens, segments).score)
        return make(tk, tv, nk, nv, **sizes, plugin_namespace=PLUGIN_NAMESPACE)

    def follow(tk: Any, tv: Any, nk: Any, nv: Any, indices: Any, frame_tokens: int, segments: int) -> Any:
        split = _split_of(frame_tokens, segments)
        make = getattr(opset, split.follow)
        return make(tk, tv, nk, nv, indices, **split.sizes, plugin_namespace=PLUGIN_NAMESPACE)

    return {ops.dynamic_prune.default: score, ops.dynamic_prune_follow.default: follow}


@cache
def _opset() -> Any:
    """The schemas of the operators that torch exports to, registered with onnx once a process."""
    kinds = defs.OpSchema.AttrType

    def tensors(names: Iterable[str]) -> list[defs.OpSchema.FormalParameter]:
        formal = defs.OpSchema.FormalParameter
        return [formal(name, "tensor(int64)" if name == "indices" else "T") for name in names]

    keys = [("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "keys and values")]
    for body in (function for function in prune_functions() if len(function.input) >= 4):
        takes, gives, given = tensors(body.input), tensors(body.output), []
        for name in body.attribute:
            kind = kinds.STRING if name == "plugin_namespace" else kinds.INT
            given.append(defs.OpSchema.Attribute(name, kind, "", required=True))
        schema = defs.OpSchema(
            body.name, DOMAIN, VERSION, inputs=takes, outputs=gives, type_constraints=keys, attributes=given
        )
        defs.register_schema(schema)
    return values.Opset(DOMAIN, VERSION)
