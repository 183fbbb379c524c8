"""Baking: a head map put into the weights, as a stream from a checkpoint to one safetensors file.

One tensor is in memory at a time, so the size of a model does not matter. The graphs of a bundle
point into the file as their external data: the weights lie on disk once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.heads import permute_tensor
from forcingkv.runtime.spec import Dtype, ModelSpec
from forcingkv.runtime.tensors import StoredTensor, TensorWriter

__all__ = ["bake_weights", "store_tensors"]

_STORED = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


def bake_weights(
    weights: Mapping[str, Tensor],
    spec: ModelSpec,
    orders: Sequence[Sequence[int]],
    path: Path,
    dtype: Dtype,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, StoredTensor]:
    """Reorder the heads of every layer and write the file.

    Args:
        weights: tensors by Wan name, read one at a time.
        spec: the model.
        orders: for each layer the old index of the head at each new place.
        path: the safetensors file.
        dtype: what every tensor is stored as.
        say: told what is being done.

    Returns:
        Name -> where each tensor lies in the file.
    """

    def baked(name: str) -> Tensor:
        say(f"baking {name}")
        return permute_tensor(name, weights[name], spec, orders)

    return store_tensors(weight_shapes(spec), baked, path, dtype)


def store_tensors(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], path: Path, dtype: Dtype
) -> dict[str, StoredTensor]:
    """Write tensors to a safetensors file, one at a time, in the order of `shapes`."""
    kind, stored_as = _STORED[dtype]
    planned = {name: (stored_as, tuple(shape)) for name, shape in shapes.items()}
    with TensorWriter(path, planned) as writer:
        for name in planned:
            # The bits, whatever the dtype: numpy has no bfloat16.
            tensor = read(name).detach().to(kind).contiguous()
            writer.write(name, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return writer.tensors
