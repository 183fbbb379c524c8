"""From a graph to an ONNX file whose weights lie in a safetensors file.

Graphs are traced on fake tensors: shapes without contents. So a model of any size is traced in the
memory of its graph, and its weights, written once by `export.bake`, are only pointed at.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from forcingkv.export import fp8, int8
from forcingkv.export.codes import multiply_by_matrices
from forcingkv.export.graphs import Graph
from forcingkv.export.onnxruntime_passes import attend_in_blocks, branch_on_clean, make_caches_early
from forcingkv.export.passes import make_of_weights_late, scale_attention, shape_of, use_transposed
from forcingkv.export.tensorrt_passes import (
    align_parameters,
    allow_decomposition,
    fold_modulation,
    narrow_indices,
    pair_lone_heads,
    split_slices,
)
from forcingkv.models.baked_names import is_matrix
from forcingkv.prune.onnx_operators import OPSET, functions_for, graphs, split_prune, translation_table
from forcingkv.runtime.bundle import TensorRecord
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
    int8_layers: Collection[str] = (),
    folded: bool = True,
) -> onnx.ModelProto:
    """Trace a graph and write it; inputs, outputs and varying dimensions get their names.

    Args:
        make: makes the graph. Called with fake tensors on, so that parameters made there take no memory.
        path: the ONNX file.
        weights: where each parameter of the graph's model lies. Those that are stored in another dtype than
            the graph computes in are cast.
        file: the safetensors file they lie in, named relative to the ONNX file.
        tensorrt: for TensorRT; what its parser makes few layers of is slower in ONNX Runtime (multiplying
            by a matrix of rank 3) or no faster.
        single_kernels: write DynamicPrune as nodes of one kernel each (`split_prune`).
        input_scales: name of each linear layer that multiplies in FP8 -> the scale of its input. They
            are written into the graph; the scales of weights lie in the file.
        int8_layers: names of those that multiply in int8.
        folded: whether what follows from weights alone is computed when the graph is loaded. Else it is made
            in every pass, right before it is used, and layers multiply by what their codes stand for.
    """
    graph, model = _traced(make)
    traced = model.graph
    parameters = [value for value in traced.inputs if (value.name or "").startswith(_WRAPPED)]
    used = {_bare(value.name): value for value in parameters if value.uses()}
    # First, while matrices have the shapes they were made with.
    use_transposed(traced, [value for name, value in used.items() if is_matrix(name, shape_of(value))])
    scale_attention(traced)
    if tensorrt:
        fold_modulation(traced)
        split_slices(traced)
        narrow_indices(traced)
        pair_lone_heads(traced)
        allow_decomposition(traced)
        align_parameters(parameters)  # behind use_transposed, which reverses the two sizes of a matrix
    else:
        # The example inputs are of the last phase, in which each dimension that varies is largest.
        longest = {symbol: graph.inputs[name].shape[axis] for name, (axis, symbol) in graph.dynamic.items()}
        attend_in_blocks(traced, longest)  # behind scale_attention: MultiHeadAttention takes over the scale
        if graph.clean_outputs:
            branch_on_clean(traced, graph.clean_outputs)  # last but one: passes do not look into branches
        make_caches_early(traced)
    # Last: align_parameters knows matrices only in a MatMul.
    scales = input_scales or {}
    in_fp8, in_int8 = (
        {layer: used[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in used}
        for layers in (scales, int8_layers)
    )
    if folded:
        parameters += fp8.quantize_linears(traced, in_fp8, scales, tensorrt=tensorrt)
        parameters += int8.quantize_linears(traced, in_int8)
    else:
        parameters += multiply_by_matrices(traced, in_fp8, ir.DataType.FLOAT8E4M3FN)
        parameters += multiply_by_matrices(traced, in_int8, ir.DataType.INT8)
    RemoveUnusedNodesPass()(model)
    for value in parameters:
        _point(traced, value, weights[_bare(value.name)], file)
    if not folded:
        make_of_weights_late(traced)
    written = ir.to_proto(model)
    written.functions.extend(functions_for(written))
    if single_kernels:
        split_prune(written)
    _strip(written)
    onnx.save_model(_without_symbols(written) if tensorrt else written, path)
    return written


def value_records(values: Iterable[onnx.ValueInfoProto]) -> dict[str, TensorRecord]:
    """What manifests say of a graph's inputs or outputs."""
    records = {}
    for value in values:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
        records[value.name] = TensorRecord(str(dtype), shape)
    return records


def _traced(make: Callable[[], Graph]) -> tuple[Graph, ir.Model]:
    """Make a graph and trace it; behind its inputs come its parameters, whose contents nothing looks at."""
    graph, program = _trace(make)
    _initializers_to_inputs(program.model.graph, graph.model.state_dict() if graph.model else ())
    with _quiet(), _uncollected():
        program.optimize()
    return graph, program.model


def _trace(make: Callable[[], Graph]) -> tuple[Graph, torch.onnx.ONNXProgram]:
    """Make a graph and trace it, with fake tensors on."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _quiet(), _uncollected():
        graph = make()
        varying = _dimensions(graph.dynamic)
        program = torch.onnx.export(
            _Flat(graph),
            tuple(mode.from_tensor(tensor) for tensor in graph.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(tuple(varying.get(name) for name in graph.inputs),),
            custom_translation_table=translation_table(),
            optimize=False,  # it would look at the contents of the weights
            verbose=False,
        )
    assert program is not None
    return graph, program


def _dimensions(dynamic: Mapping[str, tuple[int, str]]) -> dict[str, dict[int, Any]]:
    """Input name -> the dimension that varies, as torch has it."""
    split = {symbol: symbol.rpartition("*") for symbol in sorted({symbol for _, symbol in dynamic.values()})}
    known = {name: Dim(name, min=2) for name in sorted({name for _, _, name in split.values()})}
    made = {
        symbol: int(times) * known[name] if times else known[name]
        for symbol, (times, _, name) in split.items()
    }
    return {name: {axis: made[symbol]} for name, (axis, symbol) in dynamic.items()}


class _Flat(torch.nn.Module):
    """The graph as a module, called with its inputs by position."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.module = torch.nn.ModuleDict({"model": graph.model} if graph.model else {})

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.graph.run(dict(zip(self.graph.inputs, tensors, strict=True)))


_WRAPPED = "module.model."
"""What `_Flat` puts before the name of a parameter; values that are made of parameters keep it in bundles."""


def _bare(name: str | None) -> str:
    return (name or "").removeprefix(_WRAPPED)


def _initializers_to_inputs(graph: ir.Graph, names: Collection[str]) -> None:
    """Make the parameters of those names inputs, so that optimizing takes none of them for a constant. What a
    layer makes anew is one, though it has the layer's name."""
    parameters = [value for name, value in graph.initializers.items() if _bare(name) in names]
    for value in parameters:
        assert value.name is not None
        graph.initializers.pop(value.name)
        value.const_value = None
        graph.inputs.append(value)


def _point(graph: ir.Graph, parameter: ir.Value, stored: StoredTensor, file: str) -> None:
    """Turn a parameter that is an input back into an initializer, with its contents in the file."""
    graph.inputs.remove(parameter)
    if not parameter.uses():
        return
    kind, name, shape = ir.DataType[STORED_AS[stored.dtype].onnx], _bare(parameter.name), parameter.shape
    assert shape is not None
    content = ir.ExternalTensor(file, stored.offset, stored.bytes, kind, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=content)
    graph.initializers[name] = value
    if parameter.dtype != kind:
        assert parameter.dtype is not None
        cast = ir.node("Cast", [value], {"to": int(parameter.dtype)})
        graph.insert_before(graph[0], cast)
        value = cast.outputs[0]
        value.name = f"{name}.cast"
    ir.convenience.replace_all_uses_with(parameter, value)


def _without_symbols(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which dimensions that vary have no names.

    An engine would hold a line for each pair of equal ones, in an order that differs from build to
    build. Profiles give TensorRT every length as a number.
    """
    copied = copy.deepcopy(model)
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
def _uncollected() -> Iterator[None]:
    """Tracing makes objects by the million, few of them garbage: looking for it costs 8% of an export."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter warns about its own internals and about torchvision's absence."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)
