"""The operators of DynamicPrune as TensorRT plugins, the same for both flavours.

A node of that name, in the namespace `forcingkv`, is the plugin wherever `register_plugins` was called:
before the graph is parsed, and before an engine with the plugin in it is loaded. Building needs no kernels.
Running does: the plugins launch them through the `KernelLauncher` they were given.

TensorRT prints what a callback raises to standard error and goes on with a code of failure; what it raised
is kept here for `raise_plugin_error`.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeAlias, TypeVar, cast

import numpy as np

from forcingkv.prune import launchers
from forcingkv.prune.launcher import KernelLauncher, LaunchSizes, check_candidates
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.flavour import Told, trt
from forcingkv.runtime.kv.segments import Split
from forcingkv.runtime.spec import Dtype

PLUGIN_NAMESPACE, PLUGIN_VERSION = "forcingkv", "1"

Shape: TypeAlias = tuple[int, ...]
if TYPE_CHECKING:  # there is no `trt` before a flavour is chosen
    Exprs: TypeAlias = list[trt.DimsExprs]
    Tensors: TypeAlias = list[trt.PluginTensorDesc]
    Bounds: TypeAlias = list[trt.DynamicPluginTensorDesc]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class DynamicPrune:
    """Score the segments, choose the least similar, collect them.

    The fields are the node's attributes. Inputs: transition keys and values, new keys and values (batch,
    heads, tokens, head_dim). Outputs: retained keys and values, indices.
    """

    frame_tokens: int
    segments: int
    kept: int

    outputs: ClassVar[int] = 3
    indices_place: ClassVar[int] = 6
    """Place of the indices among inputs and outputs."""
    uneven: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.frame_tokens, self.segments, self.kept) < 1 or self.frame_tokens % self.segments:
            raise ValueError(f"no segments of equal size: {self}")

    def sizes(self, inputs: list[Shape]) -> LaunchSizes:
        """What the kernels are to work on."""
        (batch, heads, new, _), segment_tokens = inputs[2], self.frame_tokens // self.segments
        return LaunchSizes(batch, heads, inputs[0][2], new, segment_tokens, self.kept, self.frame_tokens)

    def output_shapes(self, inputs: Exprs, build: trt.IExprBuilder) -> Exprs:
        """Shapes of the outputs."""
        tokens = build.constant(self.kept * (self.frame_tokens // self.segments))
        return [*_retained(inputs, tokens), trt.DimsExprs([build.constant(self.kept)])]


@dataclass(frozen=True)
class DynamicPruneFollow:
    """Collect the segments that the scoring layer chose.

    The field is the node's attribute. Inputs: those of DynamicPrune, and the indices. Outputs: retained keys
    and values.
    """

    segment_tokens: int

    outputs: ClassVar[int] = 2
    indices_place: ClassVar[int] = 4
    uneven: ClassVar[bool] = False

    def sizes(self, inputs: list[Shape]) -> LaunchSizes:
        """What the kernel is to work on."""
        batch, heads, new, _ = inputs[2]
        return LaunchSizes(batch, heads, inputs[0][2], new, self.segment_tokens, inputs[4][0])

    def output_shapes(self, inputs: Exprs, build: trt.IExprBuilder) -> Exprs:
        """Shapes of the outputs."""
        size = build.constant(self.segment_tokens)
        return _retained(inputs, build.operation(trt.DimensionOperation.PROD, inputs[4][0], size))


@dataclass(frozen=True)
class UnevenPrune:
    """DynamicPrune for frames whose segments have not as many tokens each."""

    frame_tokens: int
    segments: int
    kept: int

    outputs: ClassVar[int] = 3
    indices_place: ClassVar[int] = 6
    uneven: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_split(self.frame_tokens, self.segments, self.kept)

    def sizes(self, inputs: list[Shape]) -> LaunchSizes:
        """What the kernels are to work on."""
        (batch, heads, new, _), split = inputs[2], Split(self.frame_tokens, self.segments)
        given = batch, heads, inputs[0][2], new, split.kept_tokens, self.kept
        return LaunchSizes(*given, self.frame_tokens, split)

    def output_shapes(self, inputs: Exprs, build: trt.IExprBuilder) -> Exprs:
        """Shapes of the outputs."""
        tokens = build.constant(self.kept * Split(self.frame_tokens, self.segments).kept_tokens)
        return [*_retained(inputs, tokens), trt.DimsExprs([build.constant(self.kept)])]


@dataclass(frozen=True)
class UnevenPruneFollow:
    """DynamicPruneFollow for frames whose segments have not as many tokens each."""

    frame_tokens: int
    segments: int

    outputs: ClassVar[int] = 2
    indices_place: ClassVar[int] = 4
    uneven: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_split(self.frame_tokens, self.segments)

    def sizes(self, inputs: list[Shape]) -> LaunchSizes:
        """What the kernel is to work on."""
        (batch, heads, new, _), split = inputs[2], Split(self.frame_tokens, self.segments)
        given = batch, heads, inputs[0][2], new, split.kept_tokens, inputs[4][0]
        return LaunchSizes(*given, uneven=split)

    def output_shapes(self, inputs: Exprs, build: trt.IExprBuilder) -> Exprs:
        """Shapes of the outputs."""
        size = build.constant(Split(self.frame_tokens, self.segments).kept_tokens)
        return _retained(inputs, build.operation(trt.DimensionOperation.PROD, inputs[4][0], size))


Operator: TypeAlias = DynamicPrune | DynamicPruneFollow | UnevenPrune | UnevenPruneFollow
OPERATORS: tuple[type[Operator], ...] = (DynamicPrune, DynamicPruneFollow, UnevenPrune, UnevenPruneFollow)


def _check_split(frame_tokens: int, segments: int, kept: int = 1) -> None:
    if not 1 <= segments <= frame_tokens or kept < 1:
        raise ValueError(f"no {segments} segments with a token each in {frame_tokens}, {kept} of them kept")


def _retained(inputs: Exprs, tokens: trt.IDimensionExpr) -> Exprs:
    """Shapes of retained keys and values: that of the new keys, with another number of tokens."""
    return [trt.DimsExprs([inputs[2][0], inputs[2][1], tokens, inputs[2][3]]) for _ in range(2)]


def check(sizes: LaunchSizes) -> None:
    """Raise an error if frames are not whole, or their segments too few or too many to choose from."""
    followed = sizes.uneven.frame_tokens if sizes.uneven else sizes.segment_tokens
    whole = sizes.frame_tokens or followed
    for name, tokens in (("transition", sizes.transition_tokens), ("new", sizes.new_tokens)):
        if tokens % whole:
            raise ValueError(f"{name} keys hold {tokens} tokens, which is no multiple of {whole}")
    if sizes.frame_tokens:
        if sizes.candidates < sizes.kept:
            raise ValueError(f"{sizes.kept} segments are to be kept, and there are {sizes.candidates}")
        check_candidates(sizes.candidates)


def launch(
    launcher: KernelLauncher,
    sizes: LaunchSizes,
    inputs: list[int],
    outputs: list[int],
    workspace: int,
    stream: int,
) -> None:
    """Launch the kernels of an operator on pointers to its inputs, outputs and workspace."""
    if sizes.frame_tokens:
        *retained, indices = outputs
        launcher.score(inputs[0], inputs[2], workspace, indices, sizes, stream)
        launcher.collect([*inputs, indices, *retained], sizes, stream)
    else:
        launcher.collect([*inputs, *outputs], sizes, stream)


def register_plugins(launcher: KernelLauncher | None) -> KernelLauncher | None:
    """Make the plugins known to the flavour of TensorRT in use; any number of times. Building needs no
    launcher.

    Gives the launcher to keep for as long as engines with plugins run: one that is in use already, if it has
    the same kernels (`launchers.shared`). Runs say which is theirs (`launchers.launching`).
    """
    with _registering:
        if launcher is not None:
            launcher = launchers.shared(launcher)
        if _creators:
            return launcher
        # The registry outlives Python's objects, to which it points: a process would end in a crash. What is
        # registered later is done first: the runtime of the engines goes before the plugins.
        atexit.unregister(_deregister)
        atexit.register(_deregister)
        creator_of = _creator_class()
        for operator in OPERATORS:
            creator = creator_of(operator)
            if not trt.get_plugin_registry().register_creator(creator, PLUGIN_NAMESPACE):
                unregister_plugins()
                raise RuntimeError(f"TensorRT already knows a plugin {PLUGIN_NAMESPACE}::{operator.__name__}")
            _creators.append(creator)
    return launcher


def unregister_plugins() -> None:
    """Undo `register_plugins`, launchers included."""
    _deregister()
    launchers.forget()


def _deregister() -> None:
    for creator in _creators:
        trt.get_plugin_registry().deregister_creator(creator)
    _creators.clear()


def raise_plugin_error() -> None:
    """Raise the first error of a callback in this thread since the last call, if there was one.

    Ask after every parse, build and run: after some errors TensorRT goes on, and for example makes an engine
    without a workspace.
    """
    for error in _errors.take():
        raise error


_creators: list[trt.IPluginCreatorV3One] = []
"""The registry does not keep them alive."""
_registering = threading.Lock()
_errors: Told[Exception] = Told()


def _kept(callback: Callable[P, R]) -> Callable[P, R]:
    """A callback of TensorRT whose errors are kept."""

    @wraps(callback)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return callback(*args, **kwargs)
        except Exception as error:
            _errors.add(error)
            raise

    return call


@cache
def key_types() -> dict[trt.DataType, Dtype]:
    """What keys and values may be: TensorRT's type -> the dtype."""
    known = {getattr(trt.DataType, r.tensorrt): r.name for r in DTYPES.values() if r.tensorrt}
    return cast("dict[trt.DataType, Dtype]", known)


def _shapes(descriptions: Tensors) -> list[Shape]:
    return [description.dims[:] for description in descriptions]


@cache
def _creator_class() -> Callable[[type[Operator]], trt.IPluginCreatorV3One]:
    """What TensorRT asks for plugins. Made in each process: the classes inherit from the chosen flavour's."""

    class PrunePlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """What the operators have in common."""

        def __init__(self, operator: Operator) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.operator = operator
            self.plugin_name = type(operator).__name__
            self.plugin_namespace, self.plugin_version = PLUGIN_NAMESPACE, PLUGIN_VERSION
            self.num_outputs = operator.outputs
            self.timing_cache_id = repr(operator)  # nodes with equal attributes take equal time
            self.serialized = _Fields(asdict(operator))

        def get_capability_interface(self, type: trt.PluginCapabilityType) -> trt.IPluginV3:  # noqa: A002
            return self

        @_kept
        def clone(self) -> trt.IPluginV3:
            return PrunePlugin(self.operator)

        @_kept
        def attach_to_context(self, resource_context: Any) -> trt.IPluginV3:
            return self.clone()

        def get_fields_to_serialize(self) -> trt.PluginFieldCollection_:
            return self.serialized.collection

        @_kept
        def get_output_data_types(self, input_types: list[trt.DataType]) -> list[trt.DataType]:
            return [*[input_types[0]] * 2, trt.DataType.INT64][: self.num_outputs]

        @_kept
        def get_output_shapes(
            self, inputs: Exprs, shape_inputs: Exprs, expr_builder: trt.IExprBuilder
        ) -> Exprs:
            return self.operator.output_shapes(inputs, expr_builder)

        @_kept
        def supports_format_combination(self, pos: int, in_out: Bounds, num_inputs: int) -> bool:
            if in_out[pos].desc.format != trt.TensorFormat.LINEAR:
                return False
            if pos == self.operator.indices_place:
                return in_out[pos].desc.type == trt.DataType.INT64
            return in_out[pos].desc.type == in_out[0].desc.type and in_out[0].desc.type in key_types()

        def configure_plugin(self, inputs: Bounds, out: Bounds) -> None:
            pass

        @_kept
        def get_workspace_size(self, inputs: Bounds, out: Bounds) -> int:
            return self.operator.sizes([description.max[:] for description in inputs]).workspace_bytes

        @_kept
        def on_shape_change(self, inputs: Tensors, out: Tensors) -> None:
            check(self.operator.sizes(_shapes(inputs)))

        def set_tactic(self, tactic: int) -> None:
            pass

        @_kept
        def enqueue(
            self,
            input_desc: Tensors,
            output_desc: Tensors,
            inputs: list[int],
            outputs: list[int],
            workspace: int,
            stream: int,
        ) -> None:
            keys = input_desc[0]
            kind, width = key_types()[keys.type], keys.dims[3]
            launcher = launchers.launcher_of((kind, width, self.operator.uneven))
            if launcher is None:
                raise RuntimeError(
                    f"{self.plugin_name} has no kernels for {kind} keys of width {width}: give"
                    " register_plugins the bundle's KernelLauncher before running"
                )
            launch(launcher, self.operator.sizes(_shapes(input_desc)), inputs, outputs, workspace, stream)

    class PruneCreator(trt.IPluginCreatorV3One):
        """Makes the plugin of one operator."""

        def __init__(self, kind: type[Operator]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.kind = kind
            self.name = kind.__name__
            self.plugin_namespace, self.plugin_version = PLUGIN_NAMESPACE, PLUGIN_VERSION
            self.attributes = _Fields(dict.fromkeys((field.name for field in fields(kind)), 0))
            self.field_names = self.attributes.collection

        @_kept
        def create_plugin(
            self, name: str, field_collection: trt.PluginFieldCollection_, phase: trt.TensorRTPhase
        ) -> trt.IPluginV3:
            values = [field_collection[place] for place in range(len(field_collection))]
            given = {field.name: int(field.data[0]) for field in values}
            missing = sorted({field.name for field in fields(self.kind)} - given.keys())
            if missing:
                raise ValueError(f"node {name} of {self.name} lacks the attributes {missing}")
            return PrunePlugin(self.kind(**given))

    return PruneCreator


class _Fields:
    """Integer plugin fields, kept alive: TensorRT's own list of them only points to names and values."""

    def __init__(self, values: dict[str, int]) -> None:
        self._fields = [
            trt.PluginField(trt.FallbackString(name), np.array([value], np.int32), trt.PluginFieldType.INT32)
            for name, value in values.items()
        ]
        self.collection = trt.PluginFieldCollection_(trt.PluginFieldCollection(self._fields))
