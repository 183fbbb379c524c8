"""The DynamicPrune kernels inside engines of the flavour tensorrt: a C++ program runs them without Python.

TensorRT's quick plugins take a kernel as PTX, with its launch as expressions of the shapes, into the engine:
one kernel a node, no workspace, and no Python where the engine is loaded. So they are the nodes that
`onnx_operators.split_prune` puts in the place of the operator that scores. TensorRT-RTX has no quick plugins.

TensorRT passes a kernel its input pointers, then its 32-bit sizes, then its output pointers. Triton's kernels
take them in the order of their signature, and two pointers more, which these do not use: the PTX is made to
take what it is passed.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from types import GenericAlias
from typing import Any, NamedTuple, TypeAlias

from forcingkv.headmaps.errors import InputError
from forcingkv.prune.kernel_compiler import argument_types, compile_for
from forcingkv.prune.launcher import SELECT_GRID, check_candidates, compact_grid, cosine_grid
from forcingkv.prune.plugin import PLUGIN_NAMESPACE, PLUGIN_VERSION, key_types
from forcingkv.runtime.engines import KernelName
from forcingkv.runtime.flavour import chosen, trt
from forcingkv.runtime.kv.segments import Split
from forcingkv.runtime.spec import Dtype

Size: TypeAlias = Any
"""A number, or TensorRT's expression of one, which is computed with like a number."""
Tensors: TypeAlias = Sequence[Any]
"""tensorrt.plugin.TensorDesc: `shape_expr` always, `shape` where a kernel is asked for."""
Planned: TypeAlias = "tuple[list[tuple[tuple[Size, ...], trt.DataType]], tuple[Size, Size, Size], list[Size]]"
"""Shapes and types of the outputs, the grid, and the kernel's sizes in the order of its signature."""

STATIC_SHARED_BYTES = 48 * 1024
"""Shared memory that a kernel has without asking for more, which TensorRT does not."""


class QuickPlugin(NamedTuple):
    """One node, one kernel."""

    name: str
    kernel: KernelName
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: tuple[str, ...]
    """The node's attributes."""
    plan: Callable[..., Planned]
    """What inputs and attributes come to."""


def _cosines(inputs: Tensors, frame_tokens: int) -> Planned:
    """Transition and new keys -> a cosine for each candidate token."""
    transition, new = (tensor.shape_expr for tensor in inputs)
    tokens = transition[2] + new[2] - frame_tokens
    numbers = [new[1], transition[2], new[2], frame_tokens]
    return [((tokens,), trt.DataType.FLOAT)], cosine_grid(frame_tokens, tokens), numbers


def _select(inputs: Tensors, segment_tokens: int, kept: int) -> Planned:
    """Cosines -> indices of the segments to keep."""
    candidates = inputs[0].shape_expr[0] // segment_tokens
    return [((kept,), trt.DataType.INT64)], SELECT_GRID, [segment_tokens, candidates, kept]


def _collect(inputs: Tensors, segment_tokens: int) -> Planned:
    """Keys, values and indices -> retained keys and values."""
    transition, _, (batch, heads, tokens, width), _, (kept,) = (tensor.shape_expr for tensor in inputs)
    retained = (batch, heads, kept * segment_tokens, width), inputs[2].dtype
    grid = compact_grid(batch, heads, segment_tokens, kept)
    return [retained] * 2, grid, [transition[2], tokens, segment_tokens, kept]


def _select_uneven(inputs: Tensors, frame_tokens: int, segments: int, kept: int) -> Planned:
    """Cosines -> indices of the segments to keep."""
    candidates = inputs[0].shape_expr[0] // frame_tokens * segments
    return [((kept,), trt.DataType.INT64)], SELECT_GRID, [frame_tokens, segments, candidates, kept]


def _collect_uneven(inputs: Tensors, frame_tokens: int, segments: int) -> Planned:
    """Keys, values and indices -> retained keys and values."""
    described, grid, numbers = _collect(inputs, Split(frame_tokens, segments).kept_tokens)
    return described, grid, [*numbers[:2], frame_tokens, segments, numbers[-1]]


_KEYS, _RETAINED = ("transition_keys", "new_keys"), ("retained_keys", "retained_values")
_TENSORS = ("transition_keys", "transition_values", "new_keys", "new_values", "indices")
QUICK_PLUGINS = (
    QuickPlugin("TokenCosines", "token_cosines", _KEYS, ("cosines",), ("frame_tokens",), _cosines),
    QuickPlugin(
        "SelectSegments", "select_segments", ("cosines",), ("indices",), ("segment_tokens", "kept"), _select
    ),
    QuickPlugin("DynamicPruneFollow", "compact_segments", _TENSORS, _RETAINED, ("segment_tokens",), _collect),
    QuickPlugin(
        "SelectUnevenSegments",
        "select_uneven_segments",
        ("cosines",),
        ("indices",),
        ("frame_tokens", "segments", "kept"),
        _select_uneven,
    ),
    QuickPlugin(
        "UnevenPruneFollow",
        "compact_uneven_segments",
        _TENSORS,
        _RETAINED,
        ("frame_tokens", "segments"),
        _collect_uneven,
    ),
)

_sm: list[int] = []
"""What the kernels are compiled for; empty until the plugins are registered."""


def register_quick_plugins(sm: int) -> None:
    """Make the plugins known to TensorRT, for graphs that are parsed from now on.

    Engines are built for compute capability `sm`, 90 for 9.0; to be called again for another. Raises
    InputError where the process uses no flavour of TensorRT with such plugins, RuntimeError where other
    plugins of these names are registered: `prune.plugin` has one, so a process registers one or the other.
    """
    flavour = chosen()
    if flavour is None or flavour.name != "tensorrt" or not hasattr(trt, "QuickPluginCreationRequest"):
        raise InputError(
            "has no plugins that are compiled into engines",
            where=flavour.name if flavour else "a process without TensorRT",
            expected="tensorrt 10.15 or newer",
        )
    if not _sm:
        trtp = importlib.import_module(f"{flavour.module}.plugin")
        for plugin in QUICK_PLUGINS:
            identity = (plugin.name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
            if trt.get_plugin_registry().get_creator(*identity) is not None:
                raise RuntimeError(f"another plugin {plugin.name} is registered in this process")
            _register(trtp, plugin)
    _sm[:] = [sm]


def _candidates(
    tokens: int, segment_tokens: int = 0, frame_tokens: int = 0, segments: int = 0, **_: int
) -> int:
    """Segments that so many cosines are of, by what a node that selects is told of how frames are split."""
    return tokens // segment_tokens if segment_tokens else tokens // frame_tokens * segments


def _register(trtp: Any, plugin: QuickPlugin) -> None:
    name = f"{PLUGIN_NAMESPACE}::{plugin.name}"
    count = len(plugin.inputs)

    def describe(*inputs: Any, **sizes: int) -> tuple[Any, ...]:
        described, *_ = plugin.plan(inputs, **sizes)
        return tuple(trtp.from_shape_expr(shape, dtype) for shape, dtype in described)

    def implement(*values: Any) -> tuple[str, str, Any, Any]:
        # TensorRT passes inputs, attributes, outputs and a tactic, of which there is one.
        inputs, sizes = values[:count], dict(zip(plugin.sizes, values[count:-2], strict=True))
        shape = inputs[0].shape
        if plugin.inputs == ("cosines",):  # checked now: when the engine runs, nothing else does
            tokens = (shape.max if shape.is_dynamic else shape)[0]
            check_candidates(_candidates(tokens, **sizes))
        width = shape[3] if len(shape) == 4 else 1  # cosines have no width, and need none
        dtype = key_types()[inputs[0].dtype]
        ptx, made = kernel_text(plugin.kernel, len(plugin.outputs), dtype, width, _sm[0])
        _, grid, numbers = plugin.plan(inputs, **sizes)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = grid
        launch.block_x, launch.shared_mem = 32 * made.num_warps, made.shared
        extra = trtp.SymIntExprs.from_tuple([trtp.SymInt32(number) for number in numbers])
        return made.name, ptx, launch, extra

    described = dict.fromkeys(plugin.inputs, trtp.TensorDesc) | dict.fromkeys(plugin.sizes, int)
    outputs = GenericAlias(tuple, (trtp.TensorDesc,) * len(plugin.outputs))
    trtp.register(name)(_signed(describe, described, outputs))
    untyped = dict.fromkeys(("outputs", "tactic"), inspect.Parameter.empty)
    result = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
    trtp.aot_impl(name)(_signed(implement, described | untyped, result))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], result: Any) -> Callable[..., Any]:
    """The function with that signature: TensorRT reads inputs, attributes and their types from it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=result)  # type: ignore[attr-defined]
    return function


@cache
def kernel_text(kernel: KernelName, outputs: int, dtype: Dtype, width: int, sm: int) -> tuple[str, Any]:
    """A kernel as TensorRT launches it: PTX that takes inputs, sizes, outputs, and Triton's metadata of it.

    The last `outputs` of its pointers are outputs; dtype and width are those of keys and values. Raises
    RuntimeError where the kernel cannot be launched that way.
    """
    ptx, made = compile_for(kernel, dtype, width, sm)
    if made.shared > STATIC_SHARED_BYTES:
        raise RuntimeError(
            f"{kernel} needs {made.shared} bytes of shared memory; expected at most {STATIC_SHARED_BYTES}"
        )
    types = [kind for kind in argument_types(kernel, dtype).values() if kind != "constexpr"]
    pointers = sum(kind.startswith("*") for kind in types)
    places = list(range(len(types)))
    inputs, results = places[: pointers - outputs], places[pointers - outputs : pointers]
    return _arranged(ptx, [*inputs, *places[pointers:], *results]), made


def _arranged(ptx: str, order: Sequence[int]) -> str:
    """PTX whose kernel takes the parameters at those places, in that order, and no others.

    Its code names parameters, so only their declaration has an order.
    """
    head = re.search(r"\.entry \w+\(\n(.*?)\n\)", ptx, re.DOTALL)
    if head is None:
        raise RuntimeError("no kernel was found in Triton's PTX")
    declared = [line.rstrip(",") for line in head[1].splitlines()]
    for line in (declared[place] for place in range(len(declared)) if place not in order):
        name = line.split()[-1]
        if re.search(rf"\b{name}\b", ptx[head.end() :]):
            raise RuntimeError(f"the kernel reads {name}, which TensorRT does not pass")
    kept = ",\n".join(declared[place] for place in order)
    return ptx[: head.start(1)] + kept + ptx[head.end(1) :]
