"""What is known of a tensor before a graph runs: dtype, shape, and a few numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.graph_file import Tensor

Shape: TypeAlias = tuple[int, ...]
Numbers: TypeAlias = npt.NDArray[Any]

KINDS = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    16: "bfloat16",
    17: "float8_e4m3fn",
}
"""ONNX's number of each dtype that graphs have."""
NUMBERS = {name: number for number, name in KINDS.items()}
FLOAT, INT64, BOOL = 1, 7, 9
MOST_ELEMENTS = 1 << 42
"""Of a tensor."""
MOST_RANK = 16
"""Dimensions of a tensor."""
MOST_FOLLOWED = 256
"""Elements of a tensor whose values are followed."""
FORCINGKV = "forcingkv"


class SizeError(ValueError):
    """A node whose result cannot be known, or is not what it may be."""


class Known(NamedTuple):
    """What is known of a tensor."""

    kind: int
    shape: Shape
    value: Numbers | None = None
    """Of a few numbers: what is computed of shapes, and constants."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * element_bytes(self.kind)


LEFT_OUT = Known(0, ())
"""An input that is not given."""


def element_bytes(kind: int) -> int:
    """Bytes of a number of that dtype. Raises SizeError for a dtype that graphs do not have."""
    if kind not in KINDS:
        raise SizeError(f"it has a tensor of the type {kind}")
    return DTYPES[KINDS[kind]].bytes


def known_tensor(tensor: Tensor) -> Known:
    """What is known of a tensor with contents."""
    elements, value = math.prod(tensor.dims), None
    if tensor.data_type == INT64 and tensor.external is None and elements <= MOST_FOLLOWED:
        value = np.frombuffer(tensor.raw, "<i8").reshape(tensor.dims)
    if tensor.data_type == FLOAT and tensor.external is None and elements <= MOST_FOLLOWED:
        value = np.frombuffer(tensor.raw, "<f4").reshape(tensor.dims)
    return Known(tensor.data_type, tensor.dims, value)
