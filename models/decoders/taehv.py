"""TAEHV `taew2_1` and `taew2_2`: the tiny decoders of Wan's latents (madebyollin/taehv, MIT), as a stream.

Layer numbers and names are those of its checkpoints. It takes the latents as the transformer makes
them, without the VAE's mean and deviation, and makes pixels in [0, 1]; of Wan 2.2's latents each of its
pixels is a square of 2 x 2. LightX2V's `lighttaew2_1` and `lighttaew2_2` have the same layers and were
trained on latents with both: latents * std + mean (LightX2V, `vae_tiny.py`, `need_scaled`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.latents import KNOWN, WAN21, WAN22, Scale, scale_of
from forcingkv.models.decoders.names import check_tensors, is_decoder, without_prefix
from forcingkv.models.tensor_files import Shapes, open_tensors

WIDTHS = (256, 128, 64, 64)
LATENT_CHANNELS = len(WAN21.mean)
GROWTH = (1, 2, 2)
"""Frames that each stage makes of one."""

MEMORIES = 3
"""Memory blocks a stage."""

COLOURS = 3
PATCHES = {len(WAN21.mean): 1, len(WAN22.mean): 2}
"""Number of latent channels -> side of the square that a pixel of the last layer becomes, as published."""


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
        patch: side of the square of pixels that each of the last layer's becomes.
    """

    def __init__(
        self, widths: Sequence[int] = WIDTHS, latent_channels: int = LATENT_CHANNELS, patch: int = 1
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.temporal_stride = 4
        self.patch = patch
        self.spatial_stride = patch * 2 ** len(GROWTH)
        # The places without weights keep the others at the numbers they have in the checkpoints.
        layers = [nn.Identity(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, following, growth in zip(widths[:-1], widths[1:], GROWTH, strict=True):
            layers += [*(MemoryBlock(width) for _ in range(MEMORIES)), nn.Identity(), Grow(width, growth)]
            layers.append(nn.Conv2d(width, following, 3, padding=1, bias=False))
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], COLOURS * patch**2, 3, padding=1)]
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
        pixels = _unshuffled(x.clamp(0, 1) * 2 - 1, self.patch)
        return pixels.transpose(0, 1)[None], following


def _unshuffled(x: Tensor, patch: int) -> Tensor:
    """Channels -> squares of pixels: (n, 3 * patch**2, h, w) -> (n, 3, patch * h, patch * w), rows first.

    As `torch.nn.functional.pixel_shuffle`, in operators that graphs have anyway.
    """
    if patch == 1:
        return x
    frames, channels, height, width = x.shape
    squares = x.reshape(frames, channels // patch**2, patch, patch, height, width)
    return squares.permute(0, 1, 4, 2, 5, 3).reshape(frames, -1, patch * height, patch * width)


class LightTaeDecoder(TaehvDecoder):
    """TAEHV for latents with their mean and deviation, which the transformer's do not have.

    Args:
        scale: mean and deviation of each channel; None: those of latents of so many channels (`latents`), or,
            where they are not known, what is still to be filled.
        options: those of `TaehvDecoder`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, scale: Scale | None = None, **options: Any) -> None:
        super().__init__(**options)
        channels = self.latent_channels
        scale = scale or KNOWN.get(channels) or Scale((0.0,) * channels, (1.0,) * channels)
        # In the state dict too: an export takes everything with contents from there.
        for name, values in scale._asdict().items():
            # A decoder that is still to be filled has no storage but for these.
            numbers = torch.tensor(values, dtype=torch.float32, device="cpu")
            self.register_buffer(name, numbers.view(1, -1, 1, 1, 1))

    def forward(
        self, latents: Tensor, first: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(latents * self.std + self.mean, first, state)


def published_sizes(channels: int) -> dict[str, Any]:
    """What the published `TaehvDecoder` for latents of so many channels is made with; Wan 2.1's, where none
    has so many."""
    known = channels if channels in PATCHES else LATENT_CHANNELS
    return {"latent_channels": known, "patch": PATCHES[known]}


def sizes_of(shapes: Shapes, where: str) -> dict[str, Any]:
    """What a `TaehvDecoder` of tensors of those shapes is made with. Raises InputError where they are of no
    such decoder; `where` is their file."""
    # The first convolution, then the last one of each stage, then the last of all.
    convs = [1, *(MEMORIES + 5 + (MEMORIES + 3) * stage for stage in range(len(GROWTH)))]
    convs.append(convs[-1] + 2)
    found = [shapes.get(f"decoder.{number}.weight", ()) for number in convs]
    patch = math.isqrt(found[-1][0] // COLOURS) if len(found[-1]) == 4 else 0
    if any(len(shape) != 4 for shape in found) or not patch or COLOURS * patch**2 != found[-1][0]:
        raise InputError(
            "is no tiny decoder",
            where=where,
            expected=f"convolutions at the layers {convs} of it, the last to {COLOURS} channels for each of a"
            " square of pixels",
        )
    widths = tuple(shape[0] for shape in found[:-1])
    return {"widths": widths, "latent_channels": found[0][1], "patch": patch}


def load_taehv(path: Path, kind: type[TaehvDecoder] = TaehvDecoder) -> TaehvDecoder:
    """Read `taew2_1.pth`, `taew2_2.pth` or `lighttaew2_1.pth`, `lighttaew2_2.pth`, or .safetensors; the
    encoder in it is left aside. Its sizes are those of its tensors.

    The tensors of a TAEHV and a LightTAE have the same names and shapes: `kind` says which it is.

    Raises InputError where the file cannot be read, or a tensor of the decoder is missing, unexpected or
    wrongly shaped, as in the files for other video models.
    """
    if path.is_dir():
        raise InputError("is a folder", where=str(path), expected="the file in it, such as taew2_1.pth")
    files = open_tensors(path, is_decoder)
    stored = without_prefix(files.shapes)
    check_tensors("taehv", stored, str(path))
    names = {name: held for name, held in stored.items() if not name.startswith("encoder.")}
    sizes = sizes_of({name: files.shapes[held] for name, held in names.items()}, str(path))
    if issubclass(kind, LightTaeDecoder):
        sizes["scale"] = scale_of(sizes["latent_channels"], str(path))
    with torch.device("meta"):
        decoder = kind(**sizes)
    return decoder.fill(files, names, "a tiny decoder")
