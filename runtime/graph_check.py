"""A graph of a bundle, looked at before ONNX Runtime sees it: it is one that export could have written.

A bundle is a program, and perhaps a stranger's. So only what export writes is taken: its operators and
attributes, the bodies of DynamicPrune to the letter, weights from the one file that the manifest names,
inputs and outputs that follow from the plan, and no more memory and arithmetic than the manifest says and the
model needs (docs/security.md, docs/decisions/0028).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.runtime.cost import encoding_flops, pass_flops, prompt_flops
from forcingkv.runtime.graph_file import Graph, Model, Node, Reference, Tensor, Value, read_graph
from forcingkv.runtime.graph_memory import peak_bytes, weight_bytes
from forcingkv.runtime.graph_records import CLEAN, STREAMING, UNFOLDED
from forcingkv.runtime.graph_sizes import Sizes, flat_nodes, follow
from forcingkv.runtime.graph_tensors import FORCINGKV, KINDS, Known, SizeError, element_bytes, known_tensor
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.rebuild import encoding_shapes, encodings

if TYPE_CHECKING:
    from forcingkv.runtime.bundle import GraphRecord, TensorRecord

IR_VERSIONS = range(10, 14)
OPSETS = {"": 23, "com.microsoft": 1, FORCINGKV: 1}
"""Domain of operators -> the version of them that export writes."""
MOST_WRITTEN = 4 << 20
"""Bytes of a tensor whose contents stand in the graph: lists of rows, at 1080P 100 kB."""
MORE_OPERATIONS = 2
"""As many times the operations that follow from the plan a graph may have: norms and the like are not counted
there, and come to 13% in the smallest model of the tests."""
OPERATIONS_OF_A_SECOND = 1e9
"""Added to them: in tiny models the arithmetic is all norms."""
OPERATIONS_A_NUMBER = 20_000_000
"""Operations that a decoder or encoder may take for a number of a frame: decoding with the VAE takes some 3
million, with that of Wan 2.2 6, encoding 2, TAEHV 110,000."""
MOST_NODES = 2_000_000
"""Nodes in all phases; 30 layers have 2,800, and a policy some phases."""
KEPT_AT_LOAD = 64 << 20
"""Bytes of what is computed once, beyond twice the weights."""

FOR_TENSORRT = "TRT_"
"""How attributes begin that TensorRT's parser alone knows: ONNX Runtime takes no graph with one."""

_NORM = ("axis", "epsilon", "stash_type")
_SEGMENTS = ("frame_tokens", "segments", "plugin_namespace")
OPERATORS: dict[tuple[str, str], tuple[str, ...]] = {
    **dict.fromkeys([("", name) for name in ("Add", "Clip", "Div", "Expand", "Greater", "Identity")], ()),
    **dict.fromkeys([("", name) for name in ("MatMulInteger", "Max", "Neg")], ()),
    **dict.fromkeys([("", name) for name in ("MatMul", "Mul", "Relu", "Round", "Sigmoid", "Slice")], ()),
    **dict.fromkeys([("", name) for name in ("Squeeze", "Sub", "Tanh", "Tile", "Unsqueeze", "Where")], ()),
    ("", "Attention"): ("is_causal", "qk_matmul_output_mode", "scale", "softcap", "TRT_decomposable"),
    ("", "Cast"): ("to",),
    ("", "Concat"): ("axis",),
    ("", "Constant"): ("value",),
    ("", "Conv"): ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"),
    ("", "CumSum"): ("exclusive", "reverse"),
    ("", "DequantizeLinear"): ("axis", "output_dtype"),
    ("", "Gather"): ("axis",),
    ("", "Gelu"): ("approximate",),
    ("", "Gemm"): ("alpha", "beta", "transA", "transB"),
    ("", "If"): ("then_branch", "else_branch"),
    ("", "LayerNormalization"): _NORM,
    ("", "QuantizeLinear"): ("axis", "output_dtype"),
    ("", "RMSNormalization"): _NORM,
    **dict.fromkeys([("", name) for name in ("ReduceL2", "ReduceSum")], ("keepdims", "noop_with_empty_axes")),
    **dict.fromkeys([("", name) for name in ("ReduceMax", "ReduceMin")], ("keepdims",)),
    ("", "Reshape"): ("allowzero",),
    ("", "Resize"): (
        *("antialias", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside"),
        *("extrapolation_value", "keep_aspect_ratio_policy", "mode", "nearest_mode"),
    ),
    ("", "RotaryEmbedding"): ("interleaved",),
    ("", "ScatterElements"): ("axis", "reduction"),
    ("", "Shape"): ("start", "end"),
    ("", "Softmax"): ("axis",),
    ("", "Split"): ("axis", "num_outputs"),
    ("", "Transpose"): ("perm",),
    ("com.microsoft", "MultiHeadAttention"): ("num_heads", "scale"),
    (FORCINGKV, "DynamicPrune"): (*_SEGMENTS, "kept"),
    (FORCINGKV, "DynamicPruneFollow"): ("segment_tokens", "plugin_namespace"),
    (FORCINGKV, "TokenCosines"): ("frame_tokens", "plugin_namespace"),
    (FORCINGKV, "SelectSegments"): ("segment_tokens", "kept", "plugin_namespace"),
    (FORCINGKV, "UnevenPrune"): (*_SEGMENTS, "kept"),
    (FORCINGKV, "UnevenPruneFollow"): _SEGMENTS,
    (FORCINGKV, "SelectUnevenSegments"): (*_SEGMENTS, "kept"),
}
"""Domain and name of each operator that export writes -> its attributes. What is not here is refused, and
`tests/hostile/test_what_export_writes.py` compares the table with what export writes."""
BODIES = {
    "DynamicPrune": "6bec3d27a74d4bbdfe719687daead185dd9fa7b3d6b57664ef8173fd1a9e0821",
    "DynamicPruneFollow": "08d1e69289caef7ad1edb10a7568f1cc08a8e07173d56877c5a15feedad1140e",
    "TokenCosines": "9658edd67d4cbda938cff51ded7c4f03a3dddfe314b53dacccca83b6eb51c433",
    "SelectSegments": "1097cdc067e7319ebd69d6ad4b6b15a583641aabc8672caf320b724a72795c39",
    "UnevenPrune": "365fc13efe79caf02be2a0fe483d871ced3cae6da4023d3047fa84c24e0b1b84",
    "UnevenPruneFollow": "423813fa52e0f8f1cde5be5edce5bb0955f642a61e34c7c85f3c377357890030",
    "SelectUnevenSegments": "eaab9a90d8f933b86316a2b1a7ad7fb34b2fac27088bf29f48677642ad1103e5",
}
"""Functions -> the digest of their body (`graph_file.Function`): they are written word for word."""

AGAIN = "Export the bundle again, or do not trust it (docs/security.md)."


def check_graph(
    content: bytes,
    where: str,
    name: str,
    record: GraphRecord,
    plan: CachePlan,
    *,
    runs: bool,
    weights: int | None,
) -> None:
    """Raise InputError unless the bytes of an ONNX file are a graph of that plan as export writes it.

    Args:
        content: the bytes.
        where: the file, for messages.
        name: `prompt`, `step`, `decode`, ...
        record: what the manifest says of it, which follows from the plan (`graph_records.check_records`).
        plan: the bundle's plan.
        runs: whether ONNX Runtime is to run it; else engines made of it are run, and its sizes are theirs.
        weights: bytes of the file of its weights; None if it has none.
    """
    model = read_graph(content, where)
    _check_versions(model, where)
    known = {value.name for value in model.graph.input}
    _check_nodes(model, plan, where, told=CLEAN in known, runs=runs)
    for tensor in model.graph.initializer:
        _check_tensor(tensor, record.weights, weights, where)
    _check_order(model.graph, where)
    for kind, values, records in (
        ("input", model.graph.input, record.inputs),
        ("output", model.graph.output, record.outputs),
    ):
        _check_ends(kind, values, records, where, symbols=runs)
    if runs:
        try:
            _check_sizes(model, name, record, plan, where)
        except SizeError as error:
            refuse(str(error), where)


def refuse(what: str, where: str, expected: str | None = None) -> NoReturn:
    """Raise the InputError of a graph that is refused."""
    raise InputError(f"holds what export does not write: {what}", where=where, expected=expected, hint=AGAIN)


def _check_versions(model: Model, where: str) -> None:
    if model.ir_version not in IR_VERSIONS:
        refuse(f"its version is {model.ir_version}", where)
    for domain, version in model.opsets.items():
        if OPSETS.get(domain) != version:
            refuse(f"operators of {shown(domain)} version {version}", where, "those of " + _listed(OPSETS))
    names = [function.name for function in model.functions]
    for function in model.functions:
        body = BODIES.get(function.name) if function.domain == FORCINGKV else None
        if body is None or function.opsets != {"": OPSETS[""]} or names.count(function.name) > 1:
            refuse(f"the function {shown(function.name)}", where, f"those of {', '.join(BODIES)}, each once")
        if body != function.digest:
            refuse(f"another body of the function {function.name}", where, "the one of forcingkv")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names)


def _check_nodes(model: Model, plan: CachePlan, where: str, *, told: bool, runs: bool) -> None:
    bodies = {function.name for function in model.functions}
    for node in model.graph.all_nodes():
        attributes = OPERATORS.get((node.domain, node.op_type))
        if attributes is None:
            refuse(f"the operator {shown(node.op_type)} of the domain {shown(node.domain)}", where)
        others = {
            name
            for name in node.attributes
            if name not in attributes or (runs and name.startswith(FOR_TENSORRT))
        }
        if others:
            refuse(f"the attribute {shown(min(others))} of {node.op_type}", where)
        if node.domain and node.domain not in model.opsets:
            refuse(f"operators of {node.domain}, which it does not import", where)
        for name, value in node.attributes.items():
            if isinstance(value, Reference) or (isinstance(value, Graph) and node.op_type != "If"):
                refuse(f"{name} of {node.op_type} as a reference or a branch", where)
            if isinstance(value, Tensor):
                if node.op_type != "Constant":
                    refuse(f"{name} of {node.op_type} as a tensor", where)
                _check_tensor(value, None, None, where)
        if node.domain == FORCINGKV:
            if node.op_type not in bodies:
                refuse(f"the operator {node.op_type} without its body", where)
            _check_segments(node, plan, where)
    made: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "If":
            _check_branches(node, where, told=told)
            made.update(node.output)
        elif not made.isdisjoint(
            node.input
        ):  # so passes that take no branch run some of the nodes of those that do
            refuse(f"{node.op_type} of what a branch makes", where)


def _check_segments(node: Node, plan: CachePlan, where: str) -> None:
    """A body divides by these numbers: they have to be the plan's."""
    choice = plan.choice
    wanted = {"frame_tokens": plan.frame_tokens}
    if choice:
        wanted |= {"segments": choice.split.segments, "kept": choice.kept}
        wanted |= {"segment_tokens": choice.split.kept_tokens}
    for name in OPERATORS[node.domain, node.op_type]:
        found = node.attributes.get(name)
        if name == "plugin_namespace":
            continue
        if choice is None or type(found) is not int or found != wanted[name]:
            refuse(f"{name} of {node.op_type} is {shown(found)}", where, f"{wanted.get(name)}, from its plan")


def _check_branches(node: Node, where: str, *, told: bool) -> None:
    if node.input != [CLEAN] or not told:
        refuse(f"an If on {shown(node.input)}", where, f"on the input {CLEAN}")
    branches = [node.attributes.get(name) for name in OPERATORS["", "If"]]
    for branch in branches:
        if not isinstance(branch, Graph) or branch.initializer or branch.input:
            refuse("an If without two plain branches", where)
        if branch is branches[1] and any(inner.op_type != "Constant" for inner in branch.node):
            refuse("an If that computes where it is not taken", where)
        if any(inner.op_type == "If" for inner in branch.node):
            refuse("an If in a branch", where)
        if len(branch.output) != len(node.output):
            refuse("an If whose branches give more or less than it does", where)
        made = {name for inner in branch.node for name in inner.output}
        if not {value.name for value in branch.output} <= made:
            refuse("a branch that does not make what it gives", where)


def _check_tensor(tensor: Tensor, file: str | None, size: int | None, where: str) -> None:
    """Raise InputError unless a tensor's contents are all there, in the graph or in the file of weights."""
    name = shown(tensor.name)
    if tensor.data_type not in KINDS:
        refuse(f"the tensor {name} of the type {tensor.data_type}", where)
    if min(tensor.dims, default=0) < 0 or len(tensor.dims) > 8:
        refuse(f"the tensor {name} of the shape {shown(list(tensor.dims))}", where)
    wanted = math.prod(tensor.dims) * element_bytes(tensor.data_type)
    if tensor.external is None:
        if len(tensor.raw) != wanted or wanted > MOST_WRITTEN:
            expected = f"{wanted}, at most {MOST_WRITTEN}"
            refuse(f"the tensor {name} with {len(tensor.raw)} bytes", where, expected)
        return
    entries = dict(tensor.external)
    location = entries.get("location", "")
    if file is None or location != file:
        raise InputError(
            f"takes weights from the file {shown(location)}",
            where=where,
            expected=f"{file!r}, as its manifest says" if file else "no file: its manifest names none",
            hint=AGAIN,
        )
    numbers = [entries.get(key, "") for key in ("offset", "length")]
    plain = all(text.isascii() and text.isdigit() and str(int(text[:20])) == text for text in numbers)
    if not plain or len(tensor.external) != 3 or len(entries) != 3:
        refuse(f"the place {shown(entries)} of the tensor {name}", where, "location, offset and length")
    offset, length = map(int, numbers)
    if length != wanted or size is None or offset + length > size:
        place = f"{length} bytes from {offset} on"
        refuse(f"the tensor {name} of {place}", where, f"{wanted}, within the {size} of the file")


def _check_order(graph: Graph, where: str) -> None:
    """Every name is made once, and before it is read: of two of one name, readers might take either."""
    made: set[str] = set()

    def make(names: Sequence[str]) -> None:
        for name in names:
            if not name or name in made:
                refuse(f"the name {shown(name)}, which is empty or taken", where)
            made.add(name)

    def read(names: Sequence[str]) -> None:
        for name in names:
            if name and name not in made:
                refuse(f"the name {shown(name)} before it is made", where)

    def run(nodes: Sequence[Node]) -> None:
        for node in nodes:
            read(node.input)
            for value in node.attributes.values():
                if isinstance(value, Graph):
                    run(value.node)
                    read([output.name for output in value.output])
            make(node.output)

    make([tensor.name for tensor in graph.initializer])
    make([value.name for value in graph.input])
    run(graph.node)
    read([value.name for value in graph.output])


def _check_ends(
    kind: str, values: Sequence[Value], records: Mapping[str, TensorRecord], where: str, *, symbols: bool
) -> None:
    """The inputs or outputs of the graph are those of its record. Graphs for TensorRT name no symbols."""
    if sorted(value.name for value in values) != sorted(records):
        names = ", ".join(shown(value.name) for value in values[:5])
        refuse(f"the {kind}s {names}, ...", where, f"those of its manifest: {', '.join([*records][:5])}, ...")
    for value in values:
        record = records[value.name]
        wanted = tuple(size if symbols or isinstance(size, int) else None for size in record.shape)
        if KINDS.get(value.data_type) != record.dtype or value.shape != wanted:
            found = f"{KINDS.get(value.data_type)} {shown(value.shape)}"
            refuse(f"the {kind} {value.name} is {found}", where, f"{record.dtype} {list(record.shape)}")


def _check_sizes(model: Model, name: str, record: GraphRecord, plan: CachePlan, where: str) -> None:
    """Memory and arithmetic of the graph, in every phase, are what the manifest says and the model needs."""
    contents = {tensor.name: known_tensor(tensor) for tensor in model.graph.initializer}
    phases = shapes_of(name, plan)
    nodes, most = flat_nodes(model.graph), _most_operations(name, plan)
    folded = name not in UNFOLDED
    if len(nodes) * len(phases) > MOST_NODES:
        refuse(f"{len(nodes)} nodes to be looked at in {len(phases)} phases", where, f"{MOST_NODES} in all")
    outputs = {value.name for value in model.graph.output}
    found: Sizes | None = None
    for shapes in phases:
        given = {v.name: _given(v, shapes) for v in model.graph.input}
        found = follow(nodes, given if found else contents | given, found)
        operations = sum(found.operations.values())
        if operations > most:
            refuse(f"{operations:.1e} operations", where, f"at most {most:.1e}, which the model takes")
        _check_outputs(model.graph.output, found.tensors, where)
        needed = peak_bytes(nodes, contents if folded else (), outputs, found.shapes, found.bytes)
        _check_bytes("activation_bytes", record.activation_bytes, needed, where)
        kept = _kept_at_load(nodes, contents, found.bytes)
        if folded and kept > 2 * (record.weight_bytes or 0) + KEPT_AT_LOAD:
            refuse(f"constants that come to {kept} bytes", where)
    _check_bytes("weight_bytes", record.weight_bytes, weight_bytes(model, folded=folded), where)


def shapes_of(name: str, plan: CachePlan) -> Sequence[Mapping[str, tuple[int, ...]]]:
    """The shapes of a graph's inputs that vary, in each phase or pass; of one in which none does, nothing."""
    if name == "recache":
        return [encoding_shapes(plan, one) for one in encodings(plan)]
    return [plan.phase_shapes(phase) for phase in plan.phases] if name == "step" else [{}]


def _given(value: Value, shapes: Mapping[str, tuple[int, ...]]) -> Known:
    shape = shapes.get(value.name, value.shape)
    if shape is None or not all(isinstance(size, int) for size in shape):
        raise SizeError(f"the input {value.name} has no size")
    return Known(value.data_type, shape)  # type: ignore[arg-type]


def _check_outputs(outputs: Sequence[Value], tensors: Mapping[str, Known], where: str) -> None:
    for value in outputs:
        made, shape = tensors[value.name], value.shape or ()
        fits = len(made.shape) == len(shape) and all(
            size == wanted for size, wanted in zip(made.shape, shape, strict=True) if isinstance(wanted, int)
        )
        if made.kind != value.data_type or not fits:
            refuse(f"{value.name} comes out as {KINDS.get(made.kind)} {list(made.shape)}", where, f"{shape}")


def _check_bytes(field: str, said: int | None, needed: int, where: str) -> None:
    if said is None or said < needed:
        raise InputError(
            f"needs {needed} bytes, and the manifest says {field} = {said}",
            where=where,
            expected=f"{needed} or more",
            hint=AGAIN,
        )


def _kept_at_load(nodes: Sequence[Node], contents: Mapping[str, Known], sizes: Mapping[str, int]) -> int:
    """Bytes of what ONNX Runtime may compute once, when the graph is loaded, and keep."""
    constant, kept = {"", *contents}, 0
    for node in nodes:
        if constant.issuperset(node.input):
            constant.update(node.output)
            if node.op_type != "DequantizeLinear":  # stays a node, and is four times its weight at most
                kept += sum(sizes[name] for name in node.output)
    return kept


def _most_operations(name: str, plan: CachePlan) -> float:
    """Operations that a pass may have: those of the model, and some for what is not counted there."""
    if name in STREAMING:
        width, height = plan.geometry.width, plan.geometry.height
        return OPERATIONS_A_NUMBER * 3.0 * width * height * max(1, plan.spec.decoder.temporal_stride)
    if name == "recache":
        counted = max(encoding_flops(plan, one) for one in encodings(plan))
    else:
        counted = prompt_flops(plan.spec) if name == "prompt" else pass_flops(plan).total
    return MORE_OPERATIONS * float(counted) + OPERATIONS_OF_A_SECOND
