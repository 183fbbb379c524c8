"""Memory of a provider's own device, in which the caches of a session lie from pass to pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from forcingkv.runtime.backends import Array, Queue
from forcingkv.runtime.backends.host import Fetched
from forcingkv.runtime.faults import DeviceError, MemoryShortError

Viewer = Callable[["StateTensor"], Any]
"""Gives an OrtValue on the memory of a tensor, in its shape."""


def viewer_of(session: Any) -> Viewer:
    """Makes views with a loaded graph.

    An OrtValue is copied as a whole, and Python can make none on a part of another. But what is bound as
    an output becomes an OrtValue of that address, shape and dtype, and can be had back before anything runs.
    """
    name = session.get_outputs()[0].name

    def view(tensor: StateTensor) -> Any:
        binding = session.io_binding()
        place = tensor.device, tensor.number, np.dtype(tensor.dtype), tensor.shape, tensor.address
        binding.bind_output(name, *place)
        return binding.get_outputs()[0]

    return view


class StateTensor:
    """A part of an OrtValue: memory on the provider's device, which the host seldom touches.

    Only what the tensor has is copied, once, between the host and the device. Clearing copies zeros there:
    Python has nothing that fills memory of a device. It is done once a video, and of edges of strips, which
    are small, once a latent frame.
    """

    def __init__(
        self,
        value: Any,
        device: str,
        number: int,
        shape: tuple[int, ...],
        dtype: str,
        viewer: Viewer | None,
        offset: int = 0,
    ) -> None:
        """The part from `offset` on, in bytes."""
        self._value, self._viewer, self._offset = value, viewer, offset
        self.device, self.number, self.shape, self.dtype = device, number, shape, dtype
        self.nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.address = value.data_ptr() + offset

    @classmethod
    def make(
        cls, shape: tuple[int, ...], dtype: str, device: str, number: int = 0, viewer: Viewer | None = None
    ) -> Self:
        """New memory. `viewer` is needed to read or write a part of it.

        Raises MemoryShortError where the device has none left.
        """
        try:
            size = (max(1, math.prod(shape)),)
            value = ort.OrtValue.ortvalue_from_shape_and_type(size, np.dtype(dtype), device, number)
        except Exception as error:  # of ONNX Runtime's many classes
            raise MemoryShortError(
                f"no memory on {device} for a tensor of {dtype} {shape} ({error})"
            ) from error
        return cls(value, device, number, shape, dtype, viewer)

    def first(self, shape: tuple[int, ...]) -> StateTensor:
        return self._part(shape, self._offset)

    def rows(self, start: int, stop: int) -> StateTensor:
        offset = start * (self.nbytes // max(1, self.shape[0]))
        return self._part((stop - start, *self.shape[1:]), self._offset + offset)

    def _part(self, shape: tuple[int, ...], offset: int) -> StateTensor:
        value, viewer = self._value, self._viewer
        return StateTensor(value, self.device, self.number, shape, self.dtype, viewer, offset)

    def write(self, array: Array, queue: Queue) -> None:
        if self.nbytes:
            self._own().update_inplace(np.ascontiguousarray(array, np.dtype(self.dtype)))

    def clear(self, queue: Queue) -> None:
        self.write(np.zeros(self.shape, np.dtype(self.dtype)), queue)

    def fetch(self, queue: Queue) -> Fetched:
        if not self.nbytes:
            return Fetched(np.empty(self.shape, np.dtype(self.dtype)))
        # On the device "cpu" it is the memory itself, and no copy.
        return Fetched(np.array(self._own().numpy()).reshape(self.shape))

    def copy_from(self, source: StateTensor, queue: Queue) -> None:
        # `copy_tensors` of newer versions knows the devices of plugins alone.
        raise DeviceError("ONNX Runtime copies nothing from a device to itself")

    def shared(self) -> Any:
        return self._own()

    def _own(self) -> Any:
        """An OrtValue of what this tensor has, and no more."""
        if not self._offset and math.prod(self.shape) == math.prod(self._value.shape()):
            return self._value
        if self._viewer is None:
            raise DeviceError("a part of an OrtValue is reached through a loaded graph, and there is none")
        return self._viewer(self)
