"""TAEHV `taew2_1`: the tiny decoder of Wan 2.1's latents (madebyollin/taehv, MIT), as a stream.

Layer numbers and names are those of its checkpoints. It takes the latents as the transformer makes
them, without the VAE's mean and deviation, and makes pixels in [0, 1]. LightX2V's `lighttaew2_1` has the same
layers and was trained on latents with both: latents * std + mean (LightX2V, `vae_tiny.py`, `need_scaled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.names import check_tensors, is_decoder, without_prefix
from forcingkv.models.tensor_files import open_tensors

WIDTHS = (256, 128, 64, 64)
LATENT_CHANNELS = 16
GROWTH = (1, 2, 2)
"""Frames that each stage makes of one."""

MEMORIES = 3
"""Memory blocks a stage."""

LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""Of each channel of Wan 2.1's latents, as its VAE has them."""


class MemoryBlock(nn.Module):
    """A residual block that sees each frame beside the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, width, 3, padding=1) for channels in (2 * width, width, width)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, frames: Tensor, past: Tensor) -> Tensor:
        """Frames (n, width, h, w) and those before them, of the same shape."""
        return F.relu(self.conv(torch.cat([frames, past], 1)) + frames)


class Grow(nn.Module):
    """Makes `growth` frames of each, then twice the height and width."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, growth * width, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        # Published as upsampling, then this convolution. It looks at single pixels, so the order is
        # free, and this way it has a quarter of the work.
        _, width, height, breadth = frames.shape
        grown = self.conv(frames).reshape(-1, width, height, breadth)
        return F.interpolate(grown, scale_factor=2.0, mode="nearest")


class TaehvDecoder(StreamingDecoder):
    """The decoder half of TAEHV. Caches: for each memory block the last frame it read.

    Args:
        widths: channels of the three stages, and of the last layer's input.
        latent_channels: channels of the latents.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, latent_channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.temporal_stride = 4
        self.spatial_stride = 2 ** len(GROWTH)
        # The places without weights keep the others at the numbers they have in the checkpoints.
        layers = [nn.Identity(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, following, growth in zip(widths[:-1], widths[1:], GROWTH, strict=True):
            layers += [*(MemoryBlock(width) for _ in range(MEMORIES)), nn.Identity(), Grow(width, growth)]
            layers.append(nn.Conv2d(width, following, 3, padding=1, bias=False))
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)
        self._widths = tuple(widths)

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        shapes = [
            (1, channels, height * 2**stage, width * 2**stage)
            for stage, channels in enumerate(self._widths[: len(GROWTH)])
            for _ in range(MEMORIES)
        ]
        return {f"feature.{number}": shape for number, shape in enumerate(shapes)}

    def forward(
        self, latents: Tensor, first: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # `first` changes nothing: empty memory is zeros, which is what the caches start as.
        following: dict[str, Tensor] = {}
        # From here on frames are the batch.
        x = torch.tanh(latents[0].transpose(0, 1) / 3) * 3
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                name = f"feature.{len(following)}"
                past = torch.cat([state[name], x[:-1]]) if x.shape[0] > 1 else state[name]
                following[name] = x[-1:]
                x = layer(x, past)
            else:
                x = layer(x)
        pixels = x.clamp(0, 1) * 2 - 1
        return pixels.transpose(0, 1)[None], following


class LightTaeDecoder(TaehvDecoder):
    """TAEHV for latents with their mean and deviation, which the transformer's do not have.

    Args:
        mean, std: of each channel.
        options: those of `TaehvDecoder`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = LATENTS_MEAN,
        std: Sequence[float] = LATENTS_STD,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        # In the state dict too: an export takes everything with contents from there.
        for name, values in (("mean", mean), ("std", std)):
            # A decoder that is still to be filled has no storage but for these.
            numbers = torch.tensor(values, dtype=torch.float32, device="cpu")
            self.register_buffer(name, numbers.view(1, -1, 1, 1, 1))

    def forward(
        self, latents: Tensor, first: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(latents * self.std + self.mean, first, state)


def sizes_of(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """What a `TaehvDecoder` of those tensors is made with. Raises InputError where they are of no such
    decoder; `where` is their file."""
    # The first convolution, then the last one of each stage.
    convs = [1, *(MEMORIES + 5 + (MEMORIES + 3) * stage for stage in range(len(GROWTH)))]
    shapes = [tuple(state[name].shape) for name in (f"decoder.{n}.weight" for n in convs) if name in state]
    if len(shapes) != len(convs) or any(len(shape) != 4 for shape in shapes):
        raise InputError(
            "is no tiny decoder", where=where, expected=f"convolutions at the layers {convs} of it"
        )
    return {"widths": tuple(shape[0] for shape in shapes), "latent_channels": shapes[0][1]}


def load_taehv(path: Path, kind: type[TaehvDecoder] = TaehvDecoder) -> TaehvDecoder:
    """Read `taew2_1.pth` or `lighttaew2_1.pth`, or .safetensors; the encoder in it is left aside.

    The tensors of both have the same names and shapes: `kind` says which it is.

    Raises InputError where the file cannot be read, or a tensor of the decoder is missing, unexpected or
    wrongly shaped, as in the files for other video models.
    """
    if path.is_dir():
        raise InputError("is a folder", where=str(path), expected="the file in it, such as taew2_1.pth")
    files = open_tensors(path, is_decoder)
    stored = without_prefix(files.shapes)
    with torch.device("meta"):
        decoder = kind()
    check_tensors("taehv", stored, str(path))
    names = {name: held for name, held in stored.items() if not name.startswith("encoder.")}
    return decoder.fill(files, names, "the decoder of taew2_1")
