"""Baking: a head map put into the weights, as a stream from a checkpoint to one safetensors file.

One tensor is in memory at a time, so the size of a model does not matter. The graphs of a bundle
point into the file as their external data: the weights lie on disk once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.export.codes import CODES, dequantize
from forcingkv.export.precision import (
    ExportDtype,
    Precision,
    dtype_record,
    torch_dtype,
)
from forcingkv.models.baked_names import is_matrix, scale_name
from forcingkv.models.checkpoint import build_model, weight_shapes
from forcingkv.models.heads import permute_tensor
from forcingkv.models.tensor_files import open_tensors
from forcingkv.models.wan import WanModel
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import StoredTensor, new_tensors

Planned = dict[str, tuple[ExportDtype, tuple[int, ...]]]
"""Name -> what a tensor is to be stored as, and its shape."""


def bake_weights(
    weights: Mapping[str, Tensor],
    spec: ModelSpec,
    orders: Sequence[Sequence[int]],
    path: Path,
    precision: Precision,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, StoredTensor]:
    """Reorder the heads of every layer and write the safetensors file; matrices lie as (in, out).

    Before each weight in FP8 or int8 lie its scales (out,), as `baked_names.scale_name` names them. `weights`
    are tensors by Wan name, read one at a time; `orders` has for each layer the old index of the head at each
    new place. Returns name -> where each tensor lies in the file.
    """
    shapes = weight_shapes(spec)
    scaled = {scale_name(name): name for name in shapes if precision.quantizes(name)}
    codes: dict[str, Tensor] = {}  # of the weight whose scales were written last

    def permuted(name: str) -> Tensor:
        progress(f"baking {name}")
        return permute_tensor(name, weights[name], spec, orders)

    def baked(name: str) -> Tensor:
        if name in scaled:
            assert precision.linear is not None
            kind, weight = CODES[precision.linear], permuted(scaled[name])
            scales = kind.weight_scales(weight)
            codes[scaled[name]] = kind.quantize(weight, scales.unsqueeze(1))
            return scales
        tensor = codes.pop(name) if name in codes else permuted(name)
        return tensor.t() if is_matrix(name, shapes[name]) else tensor

    return store_tensors(_planned(shapes, precision), baked, path)


def baked_bytes(spec: ModelSpec, precision: Precision) -> int:
    """Bytes of the tensors of a baked file."""
    planned = _planned(weight_shapes(spec), precision).values()
    return sum(math.prod(shape) * dtype_record(dtype).bytes for dtype, shape in planned)


def _planned(shapes: Mapping[str, tuple[int, ...]], precision: Precision) -> Planned:
    """The tensors of a baked file, in order."""
    planned: Planned = {}
    for name, shape in shapes.items():
        if precision.linear is not None and precision.quantizes(name):
            planned[scale_name(name)] = (CODES[precision.linear].scales, shape[:1])
        planned[name] = (precision.stored_as(name), shape[::-1] if is_matrix(name, shape) else shape)
    return planned


def store_tensors(planned: Planned, read: Callable[[str], Tensor], path: Path) -> dict[str, StoredTensor]:
    """Write tensors to a safetensors file, one at a time, in that order."""
    formats = {name: (dtype_record(dtype).code, shape) for name, (dtype, shape) in planned.items()}
    with new_tensors(path, formats) as writer:
        for name, (dtype, _) in planned.items():
            # The bits, whatever the dtype: numpy has no bfloat16.
            tensor = read(name).detach().to(torch_dtype(dtype)).contiguous()
            writer.write(name, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return writer.tensors


def baked_model(spec: ModelSpec, path: Path) -> WanModel:
    """The model of a baked file, in float32: what graphs are verified against.

    Weights in FP8 or int8 are what they stand for; the layers' inputs are not rounded (see
    `fp8.rounded_inputs`, `int8.rounded_inputs`).
    """
    baked = open_tensors(path)

    def read(name: str) -> Tensor:
        tensor = baked.read(name)
        if scale_name(name) in baked.shapes:
            tensor = dequantize(tensor, baked.read(scale_name(name)))
        return tensor.t() if is_matrix(name, tensor.shape) else tensor

    return build_model(spec, {name: read(name) for name in weight_shapes(spec)})
