"""What a decoder and an encoder of a VAE have in common: caches in and out, and weights of files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from forcingkv.headmaps.errors import InputError
from forcingkv.models.tensor_files import Shapes, TensorFiles, check_fit, listed


class InPlace(dict[str, Tensor]):
    """Caches whose next contents take their place as soon as they are read, so that no second set is held.

    What a call gives under their names are then the same tensors.
    """


def kept(state: Mapping[str, Tensor], name: str, part: Tensor) -> Tensor:
    """The next content of a cache that was read: a part of a larger tensor, in memory of its own, since a
    view would keep all of it. Graphs have no copy."""
    return state[name].copy_(part) if isinstance(state, InPlace) else part.clone()


class StreamingModule(nn.Module, ABC):
    """Goes through a video in any number of calls.

    The caches come in and go out; the module keeps nothing between calls, and one static graph serves the
    first call and all later ones. A video in one call or in many comes out the same.
    """

    latent_channels: int
    temporal_stride: int
    """Pixel frames a latent frame."""
    spatial_stride: int
    """Pixels a latent pixel, in height and in width."""

    @abstractmethod
    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape (batch 1) of every feature cache, for latents of that height and width."""

    def empty_state(self, height: int, width: int) -> dict[str, Tensor]:
        """The caches before a video's first call: zeros, of the dtype and on the device of the weights."""
        weight = next(self.parameters())
        shapes = self.state_shapes(height, width)
        return {name: weight.new_zeros(shape, requires_grad=False) for name, shape in shapes.items()}

    def fill(
        self, files: TensorFiles, names: Mapping[str, str], what: str, optional: Shapes | None = None
    ) -> Self:
        """Take over the parameters that files hold, in float32. Arguments and errors as in `check_fit`."""
        wanted = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        check_fit(files, names, wanted, what, optional)
        stored = {name: files.read(names[name]) for name in wanted}
        others = [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if not _readable(tensor)]
        if others:
            fault = f"does not hold {what} in floats: {listed(others)}"
            raise InputError(fault, where=str(files.where), expected="float32, bfloat16 or float16")
        state = {name: tensor.to(torch.float32, copy=True) for name, tensor in stored.items()}
        spoilt = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
        if spoilt:
            fault = f"holds values that are no finite numbers: {listed(spoilt)}"
            raise InputError(fault, where=str(files.where), hint="Fetch it again.")
        self.load_state_dict({**dict(self.named_buffers()), **state}, assign=True)
        return self


def _readable(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def filled_with(module: StreamingModule, state: Mapping[str, Tensor], what: str, where: str) -> None:
    """Give a module without contents the parameters and buffers of a bundle, where and as they are.

    Raises InputError, naming the file `where`, for tensors that are not those of such a module.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise InputError(
            f"is not {what}: {wrong[0]} has the shape {found.get(wrong[0])}",
            where=where,
            expected=str(wanted.get(wrong[0])),
            hint="Export the bundle again with this version of forcingkv.",
        )
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)
