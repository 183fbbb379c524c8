"""A lane that counts the bytes it is asked for and has none: buffers of any size can be asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from forcingkv.runtime.dtypes import DTYPES


class CountedTensor:
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        known = {name: record.bytes for name, record in DTYPES.items()}
        element = known[dtype] if dtype in known else np.dtype(dtype).itemsize
        self.nbytes = math.prod(shape) * element

    def write(self, array: Any, queue: Any) -> None:
        assert array.shape == self.shape


class CountingLane:
    """`state_bytes` is what was asked for as state: keys, values, and what else a session saves."""

    main = side = None
    lookahead = 1
    in_place = False
    copies = True

    def __init__(self) -> None:
        self.state_bytes = 0

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> CountedTensor:
        made = CountedTensor(shape, dtype)
        self.state_bytes += made.nbytes if state else 0
        return made
