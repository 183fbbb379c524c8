"""tensorrt.plugin for tests, where no TensorRT is.

Two of it: NVIDIA's own Python source, driven as TensorRT drives it, with as much of `tensorrt` imitated as
it looks at; and an imitation of that source, which computes with plain numbers.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import operator
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest

from forcingkv.prune.plugin import PLUGIN_NAMESPACE, PLUGIN_VERSION
from forcingkv.prune.quick_plugin import QuickPlugin

__all__ = ["DataType", "Framework", "Imitated", "Kernel", "Real", "TensorRT"]

Described = tuple[tuple[int, ...], Any]
"""Shape and type of a tensor."""

DataType = enum.Enum("DataType", "BF16 HALF FLOAT INT64 INT32 BOOL")
Linear = enum.Enum("Linear", "LINEAR")


class Kernel(NamedTuple):
    """What TensorRT is asked to launch."""

    symbol: str
    ptx: str
    grid: list[int]
    threads: int
    shared_bytes: int
    numbers: list[int]


class Framework(Protocol):
    """tensorrt.plugin, as TensorRT uses it, where every node has the attributes `sizes`."""

    def shapes(self, plugin: QuickPlugin, inputs: list[Described]) -> list[Described]:
        """Shapes and types of a plugin's outputs."""

    def kernel(self, plugin: QuickPlugin, inputs: list[Described]) -> Kernel:
        """What a plugin has launched."""


class Fixed(tuple[int, ...]):
    """A shape with nothing left open."""

    is_dynamic = False


class Imitated(ModuleType):
    """Keeps what is registered, and computes with numbers."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__("tensorrt.plugin")
        self.sizes = sizes
        self.TensorDesc = self.KernelLaunchParams = SimpleNamespace
        self.SymIntExprs = type("SymIntExprs", (), {"from_tuple": staticmethod(list)})
        self.SymInt32 = int
        self.described: dict[str, Callable[..., Any]] = {}
        self.implemented: dict[str, Callable[..., Any]] = {}

    def from_shape_expr(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return SimpleNamespace(shape=Fixed(shape), shape_expr=shape, dtype=dtype)

    def register(self, name: str) -> Callable[..., None]:
        return lambda function: self.described.update({name: function})

    def aot_impl(self, name: str) -> Callable[..., None]:
        return lambda function: self.implemented.update({name: function})

    def shapes(self, plugin: QuickPlugin, inputs: list[Described]) -> list[Described]:
        sizes = {name: self.sizes[name] for name in plugin.sizes}
        made = self.described[f"{PLUGIN_NAMESPACE}::{plugin.name}"](*self.tensors(inputs), **sizes)
        return [(tensor.shape, tensor.dtype) for tensor in made]

    def kernel(self, plugin: QuickPlugin, inputs: list[Described]) -> Kernel:
        sizes = [self.sizes[name] for name in plugin.sizes]
        implement = self.implemented[f"{PLUGIN_NAMESPACE}::{plugin.name}"]
        symbol, ptx, launch, numbers = implement(*self.tensors(inputs), *sizes, [], 0)
        grid = [launch.grid_x, launch.grid_y, launch.grid_z]
        return Kernel(symbol, ptx, grid, launch.block_x, launch.shared_mem, numbers)

    def tensors(self, inputs: list[Described]) -> list[Any]:
        return [self.from_shape_expr(shape, dtype) for shape, dtype in inputs]


class Number:
    """An expression of shapes, known."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Makes expressions."""

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, compute: Callable[[int, int], int], a: Number, b: Number) -> Number:
        return Number(compute(a.value, b.value))


class Expressions(list[Any]):
    """A shape of expressions, of a given length."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class TensorRT(ModuleType):
    """As much of `tensorrt` as its plugin framework looks at; names that are not here are empty classes."""

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.creators: dict[tuple[str, str, str], Any] = {}
        self.DataType, self.TensorFormat = DataType, Linear
        self.IDimensionExpr, self.DimsExprs, self.PluginFieldCollection = Number, Expressions, list
        self.DimensionOperation = SimpleNamespace(
            SUM=operator.add, SUB=operator.sub, PROD=operator.mul, FLOOR_DIV=operator.floordiv
        )
        kinds = ["INT8", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT32", "FLOAT64", "CHAR", "UNKNOWN"]
        self.PluginFieldType = SimpleNamespace(**dict.fromkeys(kinds))
        self.PluginArgType = self.PluginArgDataType = SimpleNamespace(INT=0, INT32=2)
        wishes = ["UNKNOWN", "PREFER_JIT", "PREFER_AOT", "STRICT_JIT", "STRICT_AOT"]
        self.QuickPluginCreationRequest = SimpleNamespace(**{wish: wish for wish in wishes})
        self.Dims = type("Dims", (), {"MAX_DIMS": 8})
        self.Logger = type("Logger", (), {"WARNING": 0, "log": lambda *words: None})
        self.PluginField = lambda name="", data=None, kind=None: SimpleNamespace(name=name, data=data)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return self.__dict__[name]

    def get_plugin_registry(self) -> TensorRT:
        return self

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))


class Real:
    """NVIDIA's source, driven as TensorRT drives it. `tensorrt` must be what imports find."""

    def __init__(self, tensorrt: TensorRT, sizes: dict[str, int]) -> None:
        self.trt, self.sizes = tensorrt, sizes

    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch) -> bool:
        """Make it what imports find, if its source is installed."""
        found = importlib.machinery.PathFinder.find_spec("tensorrt_bindings")
        places = [Path(p, "plugin") for p in (found.submodule_search_locations or [])] if found else []
        for place in places:
            if not (place / "_lib.py").is_file():
                continue
            spec = importlib.util.spec_from_file_location(
                "tensorrt.plugin", place / "__init__.py", submodule_search_locations=[str(place)]
            )
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
            for part in place.glob("_[a-z]*.py"):
                monkeypatch.delitem(sys.modules, f"tensorrt.plugin.{part.stem}", raising=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in its docstrings
                spec.loader.exec_module(module)
            return True
        return False

    def shapes(self, plugin: QuickPlugin, inputs: list[Described]) -> list[Described]:
        made = self.made(plugin)
        types = made.get_output_data_types(
            [dtype for _, dtype in inputs], [len(shape) for shape, _ in inputs]
        )
        shapes = made.get_output_shapes([[Number(n) for n in shape] for shape, _ in inputs], [], Builder())
        return [(tuple(n.value for n in shape), dtype) for shape, dtype in zip(shapes, types, strict=True)]

    def kernel(self, plugin: QuickPlugin, inputs: list[Described]) -> Kernel:
        made = self.made(plugin)
        made.get_output_data_types([dtype for _, dtype in inputs], [len(shape) for shape, _ in inputs])
        expressions = [[Number(n) for n in shape] for shape, _ in inputs]
        made.get_output_shapes(expressions, [], Builder())
        outputs = self.shapes(plugin, inputs)
        every = [self.tensor(shape, dtype) for shape, dtype in (*inputs, *outputs)]
        count = len(inputs)
        supported = made.get_supported_format_combinations(every, count)
        assert [s.type for s in supported] == [dtype for _, dtype in (*inputs, *outputs)]
        made.configure_plugin(every[:count], every[count:])
        assert made.get_valid_tactics() == []
        made.set_tactic(0)
        launch, numbers = SimpleNamespace(), type("Numbers", (dict,), {})()
        made.clone().get_launch_params(expressions, every, count, launch, numbers, Builder())
        tensors = [tensor.desc for tensor in every]
        symbol, ptx = made.get_kernel(tensors[:count], tensors[count:])
        assert numbers.nbSymExprs == len(numbers)
        values = {name: part.expr.value for name, part in vars(launch).items()}
        assert (values["block_y"], values["block_z"]) == (1, 1)
        return Kernel(
            symbol,
            ptx.decode(),
            [values[f"grid_{axis}"] for axis in "xyz"],
            values["block_x"],
            values["shared_mem"],
            [numbers[place].expr.value for place in sorted(numbers)],
        )

    def made(self, plugin: QuickPlugin) -> Any:
        """As the parser makes it: integers of 32 bits, and no wish for one kind of implementation."""
        creator = self.trt.get_creator(plugin.name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
        fields = [
            SimpleNamespace(name=name, data=np.array([self.sizes[name]], np.int32)) for name in plugin.sizes
        ]
        return creator.create_plugin(plugin.name, PLUGIN_NAMESPACE, fields, "build", "UNKNOWN")

    def tensor(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """With the number of tokens left open, as phases leave it."""
        bounded, described = self.trt.DynamicPluginTensorDesc(), self.trt.PluginTensorDesc()
        open_ = (*shape[:2], -1, *shape[3:]) if len(shape) == 4 else (-1,)
        described.dims, described.type, described.format, described.scale = open_, dtype, Linear.LINEAR, 1.0
        bounded.desc, bounded.min, bounded.opt, bounded.max = described, shape, shape, shape
        return bounded
