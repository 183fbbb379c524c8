"""Memory of a lane of torch: tensors, and copies of them on their way to the host."""

from __future__ import annotations

import math

import numpy as np
import torch

from forcingkv.runtime.backends import Array, Queue
from forcingkv.runtime.backends.torch_device import STREAMS, StreamMark, faults, queue_of
from forcingkv.runtime.dtypes import DTYPES


class TorchTensor:
    """A tensor of torch, or a view of one: of the cache's tokens it need not be contiguous.

    Attributes:
        tensor: torch's own.
        shape: of the array.
        dtype: its name.
        nbytes: its size.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.nbytes = tensor.numel() * tensor.element_size()

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: str, device: torch.device) -> TorchTensor:
        """New memory; its contents are not defined. Raises MemoryShortError where there is not enough."""
        with faults(f"taking memory for a tensor of {dtype} {shape}"):
            return cls(torch.empty(shape, dtype=getattr(torch, dtype), device=device))

    def first(self, shape: tuple[int, ...]) -> TorchTensor:
        """Raises ValueError for a shape that needs more."""
        count = math.prod(shape)
        if count > self.tensor.numel():
            raise ValueError(f"{self.dtype} {shape} does not lie within {self.shape}")
        return TorchTensor(self.tensor.view(-1)[:count].view(shape))

    def rows(self, start: int, stop: int) -> TorchTensor:
        """Raises ValueError for places that are not there."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"there are no rows {start} to {stop} of {self.shape}")
        return TorchTensor(self.tensor[start:stop])

    def write(self, array: Array, queue: Queue) -> None:
        """Raises ValueError for an array of another shape or kind; of bfloat16 it takes the bits, uint16."""
        host = np.dtype(DTYPES[self.dtype].bits)
        if array.shape != self.shape or not np.can_cast(array.dtype, host, "same_kind"):
            raise ValueError(f"{array.dtype} {array.shape} does not fit into {self.dtype} {self.shape}")
        given = _as_tensor(np.ascontiguousarray(array, host), self.tensor.dtype)
        with faults("copying an array to the device"), queue_of(queue).work():
            if self.tensor.device.type in STREAMS:
                # Pinned memory is torch's own: it is used again once the copy is done.
                self.tensor.copy_(given.pin_memory(), non_blocking=True)
            else:
                self.tensor.copy_(given)

    def clear(self, queue: Queue) -> None:
        with faults("clearing memory"), queue_of(queue).work():
            self.tensor.zero_()

    def fetch(self, queue: Queue) -> TorchFetch:
        with faults("copying an array to the host"), queue_of(queue).work():
            if self.tensor.device.type not in STREAMS:
                copy = torch.empty(self.shape, dtype=self.tensor.dtype)
                return TorchFetch(copy.copy_(self.tensor), None)
            pinned = torch.empty(self.shape, dtype=self.tensor.dtype, pin_memory=True)
            pinned.copy_(self.tensor, non_blocking=True)
        mark = queue_of(queue).mark()
        assert isinstance(mark, StreamMark)
        return TorchFetch(pinned, mark)

    def copy_from(self, source: TorchTensor, queue: Queue) -> None:
        """Raises DeviceError where the device fails."""
        with faults("copying memory"), queue_of(queue).work():
            self.tensor.copy_(source.tensor)

    def shared(self) -> torch.Tensor:
        """torch's own tensor, which keeps its memory after the session is closed. Whoever reads it must have
        waited for what was to be written."""
        return self.tensor


class TorchFetch:
    """A copy on its way to the host; `mark` None: it is there."""

    def __init__(self, copy: torch.Tensor, mark: StreamMark | None) -> None:
        self._copy, self._mark = copy, mark

    def array(self) -> Array:
        """Raises DeviceError where work before it failed. Asked again it gives the same array."""
        if self._mark is not None:
            self._mark.wait()
            # Pinned memory is scarce: it goes back when the copy is read.
            self._copy, self._mark = self._copy.clone(), None
        return as_array(self._copy)


def as_array(tensor: torch.Tensor) -> Array:
    """A tensor on the host as an array on the same memory; bfloat16 comes as its bits, uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    array: Array = tensor.numpy()
    return array


def _as_tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """An array as a tensor on the same memory; bfloat16 from its bits."""
    if not array.flags.writeable:  # torch would warn
        array = array.copy()
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    tensor: torch.Tensor = torch.from_numpy(array)
    return tensor
