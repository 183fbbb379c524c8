"""What weights are stored as and what graphs compute in, and which tensors are apart from that."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import Dtype

__all__ = ["DTYPES", "Precision", "Target", "is_matrix", "precision_of"]

Target: TypeAlias = Literal["onnx", "tensorrt", "tensorrt-rtx"]

DTYPES: dict[Dtype, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
}
"""The dtype in torch and in safetensors."""

EXACT = (".norm_q.weight", ".norm_k.weight", "modulation")
"""How names end of the small tensors that are always float32: they are used in float32."""


@dataclass(frozen=True)
class Precision:
    """What a bundle's graphs compute in, and what its weights are stored as."""

    compute: Dtype
    stored: Dtype

    def stored_as(self, name: str) -> Dtype:
        """What the tensor of that name is stored as."""
        return "float32" if name.endswith(EXACT) else self.stored

    def computed_in(self, name: str) -> torch.dtype:
        """The dtype that a parameter of that name has in the graphs."""
        return torch.float32 if name.endswith(EXACT) else DTYPES[self.compute][0]


def precision_of(dtype: Dtype, target: Target) -> Precision:
    """The precision of a bundle.

    ONNX Runtime computes in float32 on a CPU, whatever the weights are stored as; TensorRT computes in
    what they are stored as, and has no fused attention in float32.

    Raises InputError for float32 with TensorRT.
    """
    if target == "onnx":
        return Precision("float32", dtype)
    if dtype == "float32":
        raise InputError(
            "TensorRT has no attention kernel in float32",
            where=f"--dtype float32 --target {target}",
            expected="bfloat16, or float16",
            mend="Leave --dtype out: bfloat16 is the default.",
        )
    return Precision(dtype, dtype)


def is_matrix(name: str, shape: Sized) -> bool:
    """Whether a tensor is a linear layer's weight, which bundles hold as (in, out).

    Checkpoints hold them as (out, in). Stored the way they multiply, no graph has to transpose them.
    """
    return len(shape) == 2 and name.endswith(".weight")
