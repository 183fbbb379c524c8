"""From a traced graph to an ONNX file with its weights beside it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.export import Dim

from forcingkv.export.graphs import Graph
from forcingkv.export.prune_op import OPSET, prune_functions, translation_table

__all__ = ["to_onnx", "write_onnx"]


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """Trace a graph with torch's exporter; inputs, outputs and varying dimensions get their names."""
    names = list(graph.inputs)
    symbols = {symbol: Dim(symbol, min=2) for symbol in sorted(set(graph.dynamic.values()))}
    shapes = tuple({2: symbols[graph.dynamic[name]]} if name in graph.dynamic else None for name in names)
    flat = _Flat(graph)
    with _quiet():
        program = torch.onnx.export(
            flat,
            tuple(graph.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=list(graph.outputs),
            dynamic_shapes=(shapes,) if shapes else None,
            custom_translation_table=translation_table(),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    used = {node.op_type for node in model.graph.node}
    model.functions.extend(f for f in prune_functions() if f.name in used)
    _strip(model)
    return model


def write_onnx(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Write `path` and, for a graph with weights, `path` with the ending .weights; return the files."""
    weights = path.with_suffix(".weights")
    if model.graph.initializer:
        onnx.save_model(model, path, save_as_external_data=True, location=weights.name, size_threshold=1024)
    else:
        onnx.save_model(model, path)
    return [path, weights] if weights.exists() else [path]


class _Flat(torch.nn.Module):
    """The graph's module, called with its inputs by position."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module, self.names = graph.module, list(graph.inputs)

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.module(dict(zip(self.names, tensors, strict=True)))


def _strip(model: onnx.ModelProto) -> None:
    """Drop the tracer's notes: they hold source lines and paths of the machine that exported."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
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
