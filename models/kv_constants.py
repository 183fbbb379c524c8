"""Tensors that torch halves of roles need and that never change: made once for a device, and kept there.

A clean pass that is captured as a CUDA graph can copy nothing from the host, and goes on reading what lay on
the device when it was captured. So nothing of this is ever let go: a few kB for a model at a frame size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_KEPT: dict[tuple[Hashable, torch.device], Tensor] = {}


def constant(key: Hashable, device: torch.device, make: Callable[[], npt.NDArray[np.generic]]) -> Tensor:
    """The tensor of what `make` gives, on a device; `key` says what it is, and all that it is made of."""
    found = _KEPT.get((key, device))
    if found is not None and not torch.compiler.is_exporting():
        return found
    made = torch.from_numpy(make()).to(device)
    # While a graph is traced tensors have no contents.
    if not torch.compiler.is_exporting() and type(made) is Tensor:
        _KEPT[key, device] = made
    return made
