"""What weights are stored as and what graphs compute in, and which tensors are exceptions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from forcingkv.headmaps.errors import InputError
from forcingkv.models.baked_names import EXACT
from forcingkv.runtime.dtypes import DTYPES, DtypeRecord
from forcingkv.runtime.spec import Dtype, Linear

Target: TypeAlias = Literal["onnx", "torch", "tensorrt", "tensorrt-rtx"]

ExportDtype: TypeAlias = Literal[Dtype, Linear]
"""What an export is asked for, and what a tensor is stored as."""

QUANTIZED = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.[02])\.weight")
"""The linear layers that every pass runs for every token: nearly all of a pass's products with weights.
Keys and values of the prompt, embeddings, time and head run once a prompt or are small."""

FP8_FROM = 89
"""The first compute capability with FP8 tensor cores (8.9: Ada)."""


@dataclass(frozen=True)
class Precision:
    """What a bundle's graphs compute in, and what its weights are stored as."""

    compute: Dtype
    stored: Dtype
    linear: Linear | None = None
    """What the linear layers of the blocks are stored as and multiply in, where that is another."""

    def quantizes(self, name: str) -> bool:
        """Whether the tensor of that name is the weight of a linear layer in FP8 or int8."""
        return self.linear is not None and QUANTIZED.fullmatch(name) is not None

    def linears(self, names: Iterable[str]) -> list[str]:
        """The linear layers in FP8 or int8 of a model whose tensors have those names."""
        return [name.removesuffix(".weight") for name in names if self.quantizes(name)]

    def stored_as(self, name: str) -> ExportDtype:
        """What the tensor of that name is stored as."""
        if self.linear is not None and self.quantizes(name):
            return self.linear
        return "float32" if name.endswith(EXACT) else self.stored

    def computed_in(self, name: str) -> torch.dtype:
        """The dtype that a parameter of that name has in the graphs, before linear layers are quantized."""
        return torch.float32 if name.endswith(EXACT) else torch_dtype(self.compute)


def dtype_record(dtype: ExportDtype) -> DtypeRecord:
    """What is known of a dtype that tensors are stored as."""
    return DTYPES["float8_e4m3fn" if dtype == "fp8" else dtype]


def torch_dtype(dtype: ExportDtype) -> torch.dtype:
    """The dtype in torch."""
    found: torch.dtype = getattr(torch, dtype_record(dtype).name)
    return found


def precision_of(
    dtype: ExportDtype, target: Target, sms: Sequence[int] = (), rest: Dtype = "bfloat16"
) -> Precision:
    """The precision of a bundle.

    ONNX Runtime computes in float32 on a CPU, whatever the weights are stored as; torch and TensorRT in what
    they are stored as, and TensorRT has no fused attention in float32. With fp8 all but the linear layers of
    the blocks is as with bfloat16; with int8 it is stored as `rest`. `sms` are compute capabilities of the
    GPUs that engines are built for.

    Raises InputError for float32 with TensorRT, for fp8 with torch and with a GPU that has none, and for int8
    with all but ONNX Runtime.
    """
    if dtype == "int8" and target != "onnx":
        raise InputError(
            "is what ONNX Runtime multiplies in, with scales that it finds in every pass",
            where=f"--dtype int8 --target {target}",
            expected="--target onnx, or bfloat16, float16" + (", float32" if target == "torch" else ", fp8"),
        )
    if dtype == "int8":
        return Precision("float32", rest, dtype)
    if dtype == "fp8" and target == "torch":
        raise InputError(
            "is not among what the backend torch computes in",
            where="--dtype fp8 --target torch",
            expected="float32, bfloat16 or float16",
        )
    if dtype == "fp8":
        old = ", ".join(f"sm_{sm}" for sm in sms if sm < FP8_FROM)
        if old:
            raise InputError(
                f"{old} cannot multiply in FP8",
                where="--dtype fp8",
                expected=f"GPUs from sm_{FP8_FROM} on",
                hint="Leave --dtype out for these GPUs: bfloat16 is the default.",
            )
        return Precision("float32" if target == "onnx" else "bfloat16", "bfloat16", dtype)
    if target == "onnx":
        return Precision("float32", dtype)
    if dtype == "float32" and target != "torch":
        raise InputError(
            "TensorRT has no attention kernel in float32",
            where=f"--dtype float32 --target {target}",
            expected="bfloat16, float16 or fp8",
            hint="Leave --dtype out: bfloat16 is the default.",
        )
    return Precision(dtype, dtype)
