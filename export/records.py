"""What a manifest records of graphs, files and versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import torch

import forcingkv
from forcingkv.export.activations import activation_bytes, weight_bytes
from forcingkv.headmaps.files import FileRecord, record_file
from forcingkv.runtime.bundle import GraphRecord, TensorRecord


def graph_record(
    path: Path,
    traced: onnx.ModelProto,
    weights: str | None,
    phases: Sequence[Mapping[str, tuple[int, ...]]] | None,
) -> GraphRecord:
    """The record of a graph that points into the file `weights`.

    `phases` are the shapes of inputs that vary, for each phase; None: ONNX Runtime does not run the graph.
    """
    return GraphRecord(
        file=path.name,
        weights=weights,
        inputs={value.name: _tensor(value) for value in traced.graph.input},
        outputs={value.name: _tensor(value) for value in traced.graph.output},
        weight_bytes=None if phases is None else weight_bytes(traced),
        activation_bytes=None if phases is None else activation_bytes(traced, phases),
    )


def _tensor(value: onnx.ValueInfoProto) -> TensorRecord:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return TensorRecord(str(dtype), tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))


def file_records(folder: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Size and digest of files in a folder, by their names in it."""
    return {path.relative_to(folder).as_posix(): record_file(path) for path in sorted(paths)}


def versions() -> dict[str, str]:
    """What made the bundle."""
    return {
        "forcingkv": forcingkv.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }
