"""DynamicPrune and DynamicPruneFollow as TensorRT plugins, the same for both flavours.

A node of that name, in the namespace `forcingkv`, is the plugin wherever `register_plugins` was called:
before the graph is parsed, and before an engine with the plugin in it is loaded. Building needs no kernels.
Running does: the plugins launch them through the `KernelLauncher` they were given.

TensorRT prints what a callback raises to standard error and goes on with a code of failure; what it raised
is kept here for `raise_plugin_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from forcingkv.runtime.flavour import trt
from forcingkv.runtime.kernels import KernelLauncher
from forcingkv.runtime.prune_operators import OPERATORS, Operator, Shape
from forcingkv.runtime.spec import Dtype

PLUGIN_NAMESPACE, PLUGIN_VERSION = "forcingkv", "1"

P = ParamSpec("P")
R = TypeVar("R")


def register_plugins(launcher: KernelLauncher | None) -> None:
    """Make both plugins known to the flavour of TensorRT in use; any number of times.

    Args:
        launcher: launches the kernels for keys of its type and width, in the place of an earlier one for
            such keys. Building needs none.
    """
    if launcher is not None:
        _launchers[launcher.dtype, launcher.width] = launcher
    if _creators:
        return
    creator_of = _creator_class()
    for kind in OPERATORS:
        creator = creator_of(kind)
        if not trt.get_plugin_registry().register_creator(creator, PLUGIN_NAMESPACE):
            unregister_plugins()
            raise RuntimeError(f"TensorRT already knows a plugin {PLUGIN_NAMESPACE}::{kind.name}")
        _creators.append(creator)


def unregister_plugins() -> None:
    """Undo `register_plugins`, launchers included."""
    for creator in _creators:
        trt.get_plugin_registry().deregister_creator(creator)
    _creators.clear()
    _launchers.clear()


def raise_plugin_error() -> None:
    """Raise the first error of a callback since the last call, if there was one.

    Ask after every parse, build and run: after some errors TensorRT goes on, and makes an engine that has
    no workspace, say.
    """
    errors, _errors[:] = _errors[:], []
    if errors:
        raise errors[0]


_creators: list[trt.IPluginCreatorV3One] = []
"""The registry does not keep them alive."""
_launchers: dict[tuple[Dtype, int], KernelLauncher] = {}
_errors: list[Exception] = []


def _kept(callback: Callable[P, R]) -> Callable[P, R]:
    """A callback of TensorRT whose errors are kept."""

    @wraps(callback)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return callback(*args, **kwargs)
        except Exception as error:
            if not _errors:
                _errors.append(error)
            raise

    return call


@cache
def _dtypes() -> dict[trt.DataType, Dtype]:
    """What keys and values may be."""
    return {trt.DataType.BF16: "bfloat16", trt.DataType.HALF: "float16", trt.DataType.FLOAT: "float32"}


def _shapes(descriptions: list[trt.PluginTensorDesc]) -> list[Shape]:
    return [description.dims[:] for description in descriptions]


@cache
def _plugin_class() -> Callable[[Operator], trt.IPluginV3]:
    """The plugin; a class of its own in each process, as it inherits from the chosen flavour's."""

    class PrunePlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """What the two operators have in common."""

        def __init__(self, operator: Operator) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.operator = operator
            self.plugin_name = operator.name
            self.plugin_namespace, self.plugin_version = PLUGIN_NAMESPACE, PLUGIN_VERSION
            self.num_outputs = operator.outputs
            self.timing_cache_id = ""
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
            self,
            inputs: list[trt.DimsExprs],
            shape_inputs: list[trt.DimsExprs],
            expr_builder: trt.IExprBuilder,
        ) -> list[trt.DimsExprs]:
            return self.operator.output_shapes(inputs, expr_builder)

        @_kept
        def supports_format_combination(
            self, pos: int, in_out: list[trt.DynamicPluginTensorDesc], num_inputs: int
        ) -> bool:
            if in_out[pos].desc.format != trt.TensorFormat.LINEAR:
                return False
            if pos == self.operator.indices_place:
                return in_out[pos].desc.type == trt.DataType.INT64
            return in_out[pos].desc.type == in_out[0].desc.type and in_out[0].desc.type in _dtypes()

        def configure_plugin(
            self, inputs: list[trt.DynamicPluginTensorDesc], out: list[trt.DynamicPluginTensorDesc]
        ) -> None:
            pass

        @_kept
        def get_workspace_size(
            self, inputs: list[trt.DynamicPluginTensorDesc], out: list[trt.DynamicPluginTensorDesc]
        ) -> int:
            return self.operator.workspace_bytes([description.max[:] for description in inputs])

        @_kept
        def on_shape_change(
            self, inputs: list[trt.PluginTensorDesc], out: list[trt.PluginTensorDesc]
        ) -> None:
            self.operator.check(_shapes(inputs))

        def set_tactic(self, tactic: int) -> None:
            pass

        @_kept
        def enqueue(
            self,
            input_desc: list[trt.PluginTensorDesc],
            output_desc: list[trt.PluginTensorDesc],
            inputs: list[int],
            outputs: list[int],
            workspace: int,
            stream: int,
        ) -> None:
            keys = input_desc[0]
            launcher = _launchers.get((_dtypes()[keys.type], keys.dims[3]))
            if launcher is None:
                raise RuntimeError(
                    f"{self.operator.name} has no kernels for {_dtypes()[keys.type]} keys of width"
                    f" {keys.dims[3]}: give register_plugins the bundle's KernelLauncher before running"
                )
            self.operator.run(launcher, _shapes(input_desc), [*inputs, *outputs], workspace, stream)

    return PrunePlugin


@cache
def _creator_class() -> Callable[[type[Operator]], trt.IPluginCreatorV3One]:
    """The class whose instances TensorRT asks for plugins."""
    plugin_of = _plugin_class()

    class PruneCreator(trt.IPluginCreatorV3One):
        """Makes the plugin of one operator."""

        def __init__(self, kind: type[Operator]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.kind = kind
            self.name = kind.name
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
                raise ValueError(f"node {name} of {self.kind.name} lacks the attributes {missing}")
            return plugin_of(self.kind(**given))

    return PruneCreator


class _Fields:
    """Integer plugin fields, kept alive: TensorRT's own list of them only points to names and values."""

    def __init__(self, values: dict[str, int]) -> None:
        self._fields = [
            trt.PluginField(trt.FallbackString(name), np.array([value], np.int32), trt.PluginFieldType.INT32)
            for name, value in values.items()
        ]
        self.collection = trt.PluginFieldCollection_(trt.PluginFieldCollection(self._fields))
