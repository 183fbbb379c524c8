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

from forcingkv.export.precision import DTYPES, Precision, is_matrix
from forcingkv.models.checkpoint import build_model, weight_shapes
from forcingkv.models.heads import permute_tensor
from forcingkv.models.tensor_files import open_tensors
from forcingkv.models.wan import WanModel
from forcingkv.runtime.spec import Dtype, ModelSpec
from forcingkv.runtime.tensors import StoredTensor, TensorWriter

__all__ = ["bake_weights", "baked_bytes", "baked_model", "store_tensors"]


def bake_weights(
    weights: Mapping[str, Tensor],
    spec: ModelSpec,
    orders: Sequence[Sequence[int]],
    path: Path,
    precision: Precision,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, StoredTensor]:
    """Reorder the heads of every layer and write the file; matrices lie as (in, out).

    Args:
        weights: tensors by Wan name, read one at a time.
        spec: the model.
        orders: for each layer the old index of the head at each new place.
        path: the safetensors file.
        precision: what each tensor is stored as.
        say: told what is being done.

    Returns:
        Name -> where each tensor lies in the file.
    """
    shapes = weight_shapes(spec)
    planned = {
        name: (precision.stored_as(name), shape[::-1] if is_matrix(name, shape) else shape)
        for name, shape in shapes.items()
    }

    def baked(name: str) -> Tensor:
        say(f"baking {name}")
        tensor = permute_tensor(name, weights[name], spec, orders)
        return tensor.t() if is_matrix(name, shapes[name]) else tensor

    return store_tensors(planned, baked, path)


def baked_bytes(spec: ModelSpec, precision: Precision) -> int:
    """Bytes of the tensors of a baked file."""
    return sum(
        math.prod(shape) * DTYPES[precision.stored_as(name)][0].itemsize
        for name, shape in weight_shapes(spec).items()
    )


def store_tensors(
    planned: Mapping[str, tuple[Dtype, tuple[int, ...]]], read: Callable[[str], Tensor], path: Path
) -> dict[str, StoredTensor]:
    """Write tensors {name: (dtype, shape)} to a safetensors file, one at a time, in that order."""
    formats = {name: (DTYPES[dtype][1], tuple(shape)) for name, (dtype, shape) in planned.items()}
    with TensorWriter(path, formats) as writer:
        for name, (dtype, _) in planned.items():
            # The bits, whatever the dtype: numpy has no bfloat16.
            tensor = read(name).detach().to(DTYPES[dtype][0]).contiguous()
            writer.write(name, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return writer.tensors


def baked_model(spec: ModelSpec, path: Path) -> WanModel:
    """The model of a baked file, in float32: what graphs are verified against."""
    baked = open_tensors(path)
    shapes = weight_shapes(spec)
    return build_model(
        spec,
        {
            name: baked.read(name).t() if is_matrix(name, shape) else baked.read(name)
            for name, shape in shapes.items()
        },
    )
