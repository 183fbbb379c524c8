"""Memory of ONNX Runtime's own, on the device its provider runs on: for what the host seldom touches."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort

from forcingkv.runtime.backends import Array, Queue
from forcingkv.runtime.backends.onnxruntime import Fetched
from forcingkv.runtime.faults import DeviceError, MemoryShortError


class OrtStateTensor:
    """A view of an OrtValue's start. Reading and writing copy the whole OrtValue."""

    def __init__(self, value: ort.OrtValue, device: str, shape: tuple[int, ...], dtype: str) -> None:
        self._value, self.device, self.shape, self.dtype = value, device, shape, dtype
        self.nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.address = value.data_ptr()

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: str, device: str) -> OrtStateTensor:
        """New memory. Raises MemoryShortError where the device has none left."""
        try:
            size = (max(1, math.prod(shape)),)
            value = ort.OrtValue.ortvalue_from_shape_and_type(size, np.dtype(dtype), device, 0)
        except Exception as error:  # of ONNX Runtime's many classes
            raise MemoryShortError(
                f"no memory on {device} for a tensor of {dtype} {shape} ({error})"
            ) from error
        return cls(value, device, shape, dtype)

    def first(self, shape: tuple[int, ...]) -> OrtStateTensor:
        return OrtStateTensor(self._value, self.device, shape, self.dtype)

    def rows(self, start: int, stop: int) -> OrtStateTensor:
        raise DeviceError("state is not read by rows")

    def write(self, array: Array, queue: Queue) -> None:
        whole = self._value.numpy()
        whole[: array.size] = np.ravel(array)
        self._value.update_inplace(whole)

    def clear(self, queue: Queue) -> None:
        self.write(np.zeros(self.shape, np.dtype(self.dtype)), queue)

    def fetch(self, queue: Queue) -> Fetched:
        return Fetched(self._value.numpy()[: math.prod(self.shape)].reshape(self.shape).copy())

    def shared(self) -> ort.OrtValue:
        return self._value
