"""From a graph to an ONNX file whose weights lie in a safetensors file.

Graphs are traced on fake tensors: shapes without contents. So a model of any size is traced in the
memory of its graph, and its weights, written once by `export.bake`, are only pointed at.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from forcingkv.export.graphs import Graph
from forcingkv.export.passes import rewrite
from forcingkv.export.precision import is_matrix
from forcingkv.prune.onnx_operators import OPSET, functions_for, graphs, split_prune, translation_table
from forcingkv.runtime.dtypes import STORED_AS
from forcingkv.runtime.tensors import StoredTensor


def write_onnx(
    make: Callable[[], Graph],
    path: Path,
    weights: Mapping[str, StoredTensor],
    file: str,
    *,
    tensorrt: bool = False,
    single_kernels: bool = False,
    input_scales: Mapping[str, float] | None = None,
) -> onnx.ModelProto:
    """Trace a graph and write it; inputs, outputs and varying dimensions get their names.

    Args:
        make: makes the graph. Called with fake tensors on, so that the parameters of a module it
            makes take no memory.
        path: the ONNX file.
        weights: where each parameter of the graph's model lies.
        file: the safetensors file they lie in, named relative to the ONNX file.
        tensorrt: for TensorRT; what its parser makes few layers of is slower in ONNX Runtime (multiplying
            by a matrix of rank 3) or no faster.
        single_kernels: write DynamicPrune as nodes of one kernel each (`split_prune`).
        input_scales: name of each linear layer that multiplies in FP8 -> the scale of its input. They
            are written into the graph; the scales of weights lie in the file.

    Returns:
        The model. Parameters that are stored in another dtype than the graph computes in are cast.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _quiet():
        graph = make()
        inputs = tuple(mode.from_tensor(tensor) for tensor in graph.inputs.values())
        program = torch.onnx.export(
            _Flat(graph),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(_dynamic_shapes(graph),),
            custom_translation_table=translation_table(),
            optimize=False,  # it would look at the contents of the weights
            verbose=False,
        )
    assert program is not None
    parameters = _initializers_to_inputs(program.model.graph)
    with _quiet():
        program.optimize()
    traced = program.model.graph
    weight_of = {_bare(p.name).removesuffix(".weight"): p for p in parameters if p.uses()}
    scales = input_scales or {}
    parameters += rewrite(
        traced,
        [parameter for parameter in parameters if _is_stored_transposed(parameter)],
        parameters,
        tensorrt=tensorrt,
        lengths=_longest(graph),
        clean_outputs=graph.clean_outputs,
        quantized={layer: weight_of[layer] for layer in scales if layer in weight_of},
        input_scales=scales,
    )
    RemoveUnusedNodesPass()(program.model)
    for value in parameters:
        _point(traced, value, weights[_bare(value.name)], file)
    model = ir.to_proto(program.model)
    model.functions.extend(functions_for(model))
    if single_kernels:
        split_prune(model)
    _strip(model)
    onnx.save_model(_without_symbols(model) if tensorrt else model, path)
    return model


class _Flat(torch.nn.Module):
    """The graph's module, called with its inputs by position."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module, self.names = graph.module, list(graph.inputs)

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.module(dict(zip(self.names, tensors, strict=True)))


_WRAPPED = "module.model."
"""What `_Flat` and the graph's module put before the name of a parameter."""


def _bare(name: str | None) -> str:
    return (name or "").removeprefix(_WRAPPED)


def _dynamic_shapes(graph: Graph) -> tuple[dict[int, Any] | None, ...]:
    symbols = {symbol: Dim(symbol, min=2) for symbol in sorted({s for _, s in graph.dynamic.values()})}
    places = {name: {place: symbols[symbol]} for name, (place, symbol) in graph.dynamic.items()}
    return tuple(places.get(name) for name in graph.inputs)


def _longest(graph: Graph) -> dict[str, int]:
    """The size of each dimension that varies in the last phase, which its example inputs are of."""
    return {symbol: graph.inputs[name].shape[place] for name, (place, symbol) in graph.dynamic.items()}


def _initializers_to_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Make the parameters inputs, so that optimizing takes none of them for a constant."""
    parameters = [value for name, value in graph.initializers.items() if name.startswith(_WRAPPED)]
    for value in parameters:
        assert value.name is not None
        graph.initializers.pop(value.name)
        value.const_value = None
        graph.inputs.append(value)
    return parameters


def _is_stored_transposed(parameter: ir.Value) -> bool:
    assert parameter.shape is not None
    return is_matrix(_bare(parameter.name), parameter.shape) and bool(parameter.uses())


def _point(graph: ir.Graph, parameter: ir.Value, stored: StoredTensor, file: str) -> None:
    """Turn a parameter that is an input back into an initializer, with its contents in the file."""
    graph.inputs.remove(parameter)
    if not parameter.uses():
        return
    kind, name = ir.DataType[STORED_AS[stored.dtype].onnx], _bare(parameter.name)
    shape = parameter.shape
    assert shape is not None
    content = ir.ExternalTensor(file, stored.offset, stored.bytes, kind, shape=shape, name=name)
    initializer = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=content)
    graph.initializers[name] = initializer
    value = initializer
    if parameter.dtype != kind:
        assert parameter.dtype is not None
        cast = ir.node("Cast", [initializer], {"to": int(parameter.dtype)})
        cast.outputs[0].name = f"{name}.cast"
        graph.insert_before(graph[0], cast)
        value = cast.outputs[0]
    ir.convenience.replace_all_uses_with(parameter, value)


def _without_symbols(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which dimensions that vary have no names.

    An engine would hold a line for each pair of equal ones, in an order that differs from build to
    build. Profiles give TensorRT every length as a number.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for value in (*copied.graph.input, *copied.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            dimension.ClearField("dim_param")
    return copied


def _strip(model: onnx.ModelProto) -> None:
    """Drop the tracer's notes, which hold source lines and paths of the exporting machine."""
    for graph in graphs(model):
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for value in (*graph.input, *graph.output, *graph.initializer):
            del value.metadata_props[:]
        del graph.metadata_props[:]
        del graph.value_info[:]
    del model.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter warns about its own internals and about torchvision's absence."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
