"""What each operator makes of tensors of known shapes: a rule for every operator that export writes.

`graph_sizes` asks them. Small whole numbers are followed too, since lengths are computed in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from forcingkv.runtime.graph_file import Node, Reference, Tensor
from forcingkv.runtime.graph_tensors import (
    BOOL,
    FLOAT,
    FORCINGKV,
    INT64,
    KINDS,
    MOST_ELEMENTS,
    MOST_FOLLOWED,
    NUMBERS,
    Known,
    Numbers,
    Shape,
    SizeError,
    element_bytes,
    known_tensor,
)

Rule: TypeAlias = Callable[[Node, list[Known]], list[Known]]


def _attribute(node: Node, name: str, default: Any = None) -> Any:
    value = node.attributes.get(name, default)
    if value is None or isinstance(value, Reference):
        raise SizeError(f"it lacks {name}")
    return value


def _numbers(known: Known) -> list[int]:
    """The whole numbers of a tensor that has to be known."""
    if known.value is None or known.kind not in (INT64, NUMBERS["int32"]):
        raise SizeError("its sizes are not written in the graph and do not follow from inputs")
    return [int(number) for number in known.value.reshape(-1)]


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise SizeError(f"it has no axis {axis}")
    return axis % rank


def _joined(*shapes: Shape) -> Shape:
    """The shape that shapes are broadcast to."""
    sizes = []
    rank = max(map(len, shapes))
    for column in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        others = set(column) - {1}
        if len(others) > 1:
            raise SizeError(f"sizes {sorted(others)} meet")
        sizes.append(others.pop() if others else 1)
    return tuple(sizes)


def _like_first(node: Node, inputs: list[Known]) -> list[Known]:
    return [Known(inputs[0].kind, inputs[0].shape)]


def _identity(node: Node, inputs: list[Known]) -> list[Known]:
    return [inputs[0]]


def _elementwise(node: Node, inputs: list[Known]) -> list[Known]:
    first, second = inputs
    if first.kind != second.kind:
        raise SizeError("its two types differ")
    shape = _joined(first.shape, second.shape)
    kind = BOOL if node.op_type == "Greater" else first.kind
    # Division of whole numbers by 0, or of the least one by -1, would end the process.
    if node.op_type == "Div" and kind != FLOAT and KINDS.get(kind) not in ("float16", "bfloat16"):
        raise SizeError("it divides whole numbers")
    fold = _FOLDS.get(node.op_type) if kind == INT64 else None
    known = first.value is not None and second.value is not None and math.prod(shape) <= MOST_FOLLOWED
    return [Known(kind, shape, fold(first.value, second.value) if fold and known else None)]


_FOLDS: dict[str, Callable[..., Numbers]] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


def _where(node: Node, inputs: list[Known]) -> list[Known]:
    condition, yes, no = inputs
    return [Known(yes.kind, _joined(condition.shape, yes.shape, no.shape))]


def _matmul(node: Node, inputs: list[Known]) -> list[Known]:
    left, right = inputs
    if len(left.shape) < 2 or len(right.shape) < 2 or left.shape[-1] != right.shape[-2]:
        raise SizeError(f"{list(left.shape)} meets {list(right.shape)}")
    return [Known(left.kind, (*_joined(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1]))]


def _matmul_integer(node: Node, inputs: list[Known]) -> list[Known]:
    """Of codes without a sign and weights with one, which are told apart when they are packed."""
    if [known.kind for known in inputs[:2]] != [NUMBERS["uint8"], NUMBERS["int8"]]:
        raise SizeError("its two types are not uint8 and int8")
    return [Known(NUMBERS["int32"], _matmul(node, inputs[:2])[0].shape)]


def _gemm(node: Node, inputs: list[Known]) -> list[Known]:
    left, right = (
        known.shape[::-1] if node.attributes.get(name) else known.shape
        for known, name in zip(inputs[:2], ("transA", "transB"), strict=True)
    )
    (rows, inner), (outer, columns) = left, right
    whole = rows, columns
    if inner != outer or any(_joined(known.shape, whole) != whole for known in inputs[2:]):
        raise SizeError(f"{list(left)} meets {list(right)}")
    return [Known(inputs[0].kind, whole)]


def _conv(node: Node, inputs: list[Known]) -> list[Known]:
    data, weights = inputs[:2]
    count = len(data.shape) - 2
    pads = _attribute(node, "pads", (0,) * 2 * count)
    strides, dilations = (_attribute(node, name, (1,) * count) for name in ("strides", "dilations"))
    kernel, groups = weights.shape[2:], _attribute(node, "group", 1)
    if _attribute(node, "auto_pad", b"NOTSET") != b"NOTSET" or _attribute(node, "kernel_shape") != kernel:
        raise SizeError("its pads or kernel are not said")
    if data.shape[1] != weights.shape[1] * groups or min(*strides, *dilations, groups) < 1 or min(pads) < 0:
        raise SizeError(f"{list(data.shape)} meets {list(weights.shape)}")
    sizes = []
    for n, (size, width) in enumerate(zip(data.shape[2:], kernel, strict=True)):
        reach = dilations[n] * (width - 1) + 1
        if max(pads[n], pads[n + count]) > reach:
            raise SizeError(f"it pads {list(pads)}")
        sizes.append((size + pads[n] + pads[n + count] - reach) // strides[n] + 1)
    return [Known(data.kind, (data.shape[0], weights.shape[0], *sizes))]


def _attention(node: Node, inputs: list[Known]) -> list[Known]:
    """(batch, heads, tokens, width) each, or in blocks (heads, tokens, width)."""
    queries, keys, values = inputs
    fits = keys.shape[:-1] == values.shape[:-1] and queries.shape[-1] == keys.shape[-1]
    ranks = {len(known.shape) for known in inputs} == {4 if node.op_type == "Attention" else 3}
    if not (fits and ranks and queries.shape[0] == keys.shape[0]):
        raise SizeError(f"{list(queries.shape)} meets {list(keys.shape)} and {list(values.shape)}")
    if len(queries.shape) == 4 and (not keys.shape[1] or queries.shape[1] % keys.shape[1]):
        raise SizeError(f"{queries.shape[1]} heads meet {keys.shape[1]}")
    if node.op_type == "MultiHeadAttention" and node.attributes.get("num_heads") != 1:
        raise SizeError("it has several heads")
    return [Known(queries.kind, (*queries.shape[:-1], values.shape[-1]))]


def _concat(node: Node, inputs: list[Known]) -> list[Known]:
    first = inputs[0]
    axis = _axis(_attribute(node, "axis"), len(first.shape))
    rest = {(known.kind, *known.shape[:axis], *known.shape[axis + 1 :]) for known in inputs}
    if len(rest) > 1 or len({len(known.shape) for known in inputs}) > 1:
        raise SizeError("what it joins differs")
    total = sum(known.shape[axis] for known in inputs)
    parts = [known.value for known in inputs if known.value is not None]
    value = np.concatenate(parts, axis) if len(parts) == len(inputs) else None
    shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
    return [Known(first.kind, shape, value if value is None or value.size <= MOST_FOLLOWED else None)]


def _constant(node: Node, inputs: list[Known]) -> list[Known]:
    value = _attribute(node, "value")
    assert isinstance(value, Tensor)
    return [known_tensor(value)]


def _cast(node: Node, inputs: list[Known]) -> list[Known]:
    kind, value = _attribute(node, "to"), inputs[0].value
    element_bytes(kind)
    if value is None or not {inputs[0].kind, kind} <= {INT64, NUMBERS["int32"]}:
        return [Known(kind, inputs[0].shape)]
    return [Known(kind, inputs[0].shape, value.astype(np.int64 if kind == INT64 else np.int32))]


def _quantize(node: Node, inputs: list[Known]) -> list[Known]:
    kind = _attribute(node, "output_dtype")
    element_bytes(kind)
    return [Known(kind, inputs[0].shape)]


def _expand(node: Node, inputs: list[Known]) -> list[Known]:
    return [Known(inputs[0].kind, _joined(inputs[0].shape, tuple(_numbers(inputs[1]))))]


def _tile(node: Node, inputs: list[Known]) -> list[Known]:
    times = _numbers(inputs[1])
    sizes = (size * many for size, many in zip(inputs[0].shape, times, strict=True))
    return [Known(inputs[0].kind, tuple(sizes))]


def _gather(node: Node, inputs: list[Known]) -> list[Known]:
    data, places = inputs
    axis = _axis(_attribute(node, "axis", 0), len(data.shape))
    shape = (*data.shape[:axis], *places.shape, *data.shape[axis + 1 :])
    known = data.value is not None and places.value is not None and math.prod(shape) <= MOST_FOLLOWED
    return [Known(data.kind, shape, np.take(data.value, places.value, axis) if known else None)]  # type: ignore[arg-type]


def _reduce(node: Node, inputs: list[Known]) -> list[Known]:
    shape = inputs[0].shape
    axes = {_axis(axis, len(shape)) for axis in _numbers(inputs[1])}
    if not axes:
        raise SizeError("it names no axis")
    kept = _attribute(node, "keepdims", 1)
    sizes = [1 if n in axes else size for n, size in enumerate(shape) if kept or n not in axes]
    return [Known(inputs[0].kind, tuple(sizes))]


def _reshape(node: Node, inputs: list[Known]) -> list[Known]:
    data, wanted = inputs[0], _numbers(inputs[1])
    zero_is_zero = _attribute(node, "allowzero", 0)
    sizes = [data.shape[n] if size == 0 and not zero_is_zero else size for n, size in enumerate(wanted)]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = data.elements // rest
    if min(sizes, default=1) < 0 or math.prod(sizes) != data.elements:
        raise SizeError(f"{list(data.shape)} is no {wanted}")
    return [Known(data.kind, tuple(sizes), None if data.value is None else data.value.reshape(sizes))]


def _resize(node: Node, inputs: list[Known]) -> list[Known]:
    data, _, scales = inputs[:3]
    if scales.value is None or scales.kind != FLOAT or scales.value.shape != (len(data.shape),):
        raise SizeError("its scales are not written in the graph")
    factors = [float(factor) for factor in scales.value]
    return [Known(data.kind, tuple(math.floor(s * f) for s, f in zip(data.shape, factors, strict=True)))]


def _scatter(node: Node, inputs: list[Known]) -> list[Known]:
    data, places, updates = (known.shape for known in inputs)
    if places != updates or _axis(_attribute(node, "axis", 0), len(data)) >= len(places):
        raise SizeError(f"{list(updates)} goes to {list(places)} of {list(data)}")
    return _like_first(node, inputs)


def _shape(node: Node, inputs: list[Known]) -> list[Known]:
    shape = inputs[0].shape
    sizes = shape[_attribute(node, "start", 0) : _attribute(node, "end", len(shape))]
    return [Known(INT64, (len(sizes),), np.array(sizes, np.int64))]


def _slice(node: Node, inputs: list[Known]) -> list[Known]:
    data, starts, ends, axes = inputs[0], *map(_numbers, inputs[1:4])
    steps = _numbers(inputs[4]) if len(inputs) > 4 else [1] * len(starts)
    cuts = [slice(None)] * len(data.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise SizeError(f"it steps by {step}")
        cuts[_axis(axis, len(cuts))] = slice(start, end, step)
    sizes = (len(range(*cut.indices(size))) for cut, size in zip(cuts, data.shape, strict=True))
    return [Known(data.kind, tuple(sizes), None if data.value is None else data.value[tuple(cuts)])]


def _split(node: Node, inputs: list[Known]) -> list[Known]:
    data = inputs[0]
    axis = _axis(_attribute(node, "axis", 0), len(data.shape))
    if len(inputs) > 1:
        parts = _numbers(inputs[1])
    else:
        count = len(node.output)
        if _attribute(node, "num_outputs") != count:
            raise SizeError("it splits into another number of parts")
        whole = -(-data.shape[axis] // count)
        parts = [*[whole] * (count - 1), data.shape[axis] - whole * (count - 1)]
    if sum(parts) != data.shape[axis] or min(parts) < 0:
        raise SizeError(f"{data.shape[axis]} does not split into {parts}")
    return [Known(data.kind, (*data.shape[:axis], size, *data.shape[axis + 1 :])) for size in parts]


def _squeeze(node: Node, inputs: list[Known]) -> list[Known]:
    data = inputs[0]
    named = _numbers(inputs[1]) if len(inputs) > 1 else [n for n, size in enumerate(data.shape) if size == 1]
    axes = {_axis(axis, len(data.shape)) for axis in named}
    if any(data.shape[axis] != 1 for axis in axes):
        raise SizeError(f"{list(data.shape)} has other sizes than 1 there")
    shape = tuple(size for n, size in enumerate(data.shape) if n not in axes)
    return [Known(data.kind, shape, None if data.value is None else data.value.reshape(shape))]


def _unsqueeze(node: Node, inputs: list[Known]) -> list[Known]:
    data, axes = inputs[0], _numbers(inputs[1])
    rank = len(data.shape) + len(axes)
    placed, rest = {_axis(axis, rank) for axis in axes}, iter(data.shape)
    if len(placed) != len(axes):
        raise SizeError("an axis is named twice")
    shape = tuple(1 if n in placed else next(rest) for n in range(rank))
    return [Known(data.kind, shape, None if data.value is None else data.value.reshape(shape))]


def _transpose(node: Node, inputs: list[Known]) -> list[Known]:
    order = _attribute(node, "perm")
    if sorted(order) != list(range(len(inputs[0].shape))):
        raise SizeError(f"it orders axes as {list(order)}")
    return [Known(inputs[0].kind, tuple(inputs[0].shape[axis] for axis in order))]


def _retained(node: Node, inputs: list[Known], chosen: int, tokens: int) -> list[Known]:
    """Keys and values of so many segments of as many tokens."""
    keys, values, new_keys, new_values = inputs[:4]
    joined = [_concat(_AXIS_2, pair)[0].shape for pair in ([keys, new_keys], [values, new_values])]
    if joined[0] != joined[1] or len(joined[0]) != 4 or joined[0][2] < chosen * tokens:
        raise SizeError(f"{chosen} segments of {tokens} tokens are kept of {joined}")
    batch, heads, _, width = joined[0]
    return [Known(keys.kind, (batch, heads, chosen * tokens, width))] * 2


_AXIS_2 = Node("Concat", "", [], [], {"axis": 2})


def _whole(node: Node, *names: str) -> list[int]:
    """Attributes that are whole numbers from 1: what kernels and bodies divide by."""
    found = [_attribute(node, name) for name in names]
    if any(type(number) is not int or not 1 <= number <= MOST_ELEMENTS for number in found):
        raise SizeError(f"{', '.join(names)} are {found}")
    return found


def _prune(node: Node, inputs: list[Known]) -> list[Known]:
    frame, segments, kept = _whole(node, "frame_tokens", "segments", "kept")
    return [*_retained(node, inputs, kept, frame // segments), Known(INT64, (kept,))]


def _follow(node: Node, inputs: list[Known]) -> list[Known]:
    (tokens,) = _whole(node, "segment_tokens")
    return _retained(node, inputs, inputs[4].elements, tokens)


def _follow_uneven(node: Node, inputs: list[Known]) -> list[Known]:
    frame, segments = _whole(node, "frame_tokens", "segments")
    return _retained(node, inputs, inputs[4].elements, frame // segments)


def _cosines(node: Node, inputs: list[Known]) -> list[Known]:
    (frame,) = _whole(node, "frame_tokens")
    keys = _concat(_AXIS_2, inputs)[0]
    return [Known(FLOAT, (keys.shape[2] - frame,))]


def _select(node: Node, inputs: list[Known]) -> list[Known]:
    _whole(node, *node.attributes.keys() - {"plugin_namespace"})
    (kept,) = _whole(node, "kept")
    return [Known(INT64, (kept,))]


_ELEMENTWISE: dict[str, Rule] = dict.fromkeys(("Add", "Sub", "Mul", "Div", "Greater", "Max"), _elementwise)
_UNCHANGED: dict[str, Rule] = dict.fromkeys(
    (
        *("Clip", "Gelu", "LayerNormalization", "Relu", "RMSNormalization", "RotaryEmbedding", "Round"),
        *("CumSum", "Neg", "Sigmoid", "Softmax", "Tanh"),
    ),
    _like_first,
)
RULES: dict[tuple[str, str], Rule] = {
    ("", name): rule
    for name, rule in {
        **_ELEMENTWISE,
        **_UNCHANGED,
        "Attention": _attention,
        "Cast": _cast,
        "Concat": _concat,
        "Constant": _constant,
        "Conv": _conv,
        "Expand": _expand,
        "Gather": _gather,
        "Gemm": _gemm,
        "Identity": _identity,
        "MatMul": _matmul,
        "MatMulInteger": _matmul_integer,
        **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _quantize),
        **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMin", "ReduceSum"), _reduce),
        "Reshape": _reshape,
        "Resize": _resize,
        "ScatterElements": _scatter,
        "Shape": _shape,
        "Slice": _slice,
        "Split": _split,
        "Squeeze": _squeeze,
        "Tile": _tile,
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
        "Where": _where,
    }.items()
} | {
    ("com.microsoft", "MultiHeadAttention"): _attention,
    (FORCINGKV, "DynamicPrune"): _prune,
    (FORCINGKV, "DynamicPruneFollow"): _follow,
    (FORCINGKV, "UnevenPrune"): _prune,
    (FORCINGKV, "UnevenPruneFollow"): _follow_uneven,
    (FORCINGKV, "TokenCosines"): _cosines,
    (FORCINGKV, "SelectSegments"): _select,
    (FORCINGKV, "SelectUnevenSegments"): _select,
}
