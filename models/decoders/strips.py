"""A decoder in strips: the shapes of what goes into its two parts and comes out, found by running it without
contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.rows import StripRows
from forcingkv.runtime.decode_strips import OPTION, Strips, choose_strips
from forcingkv.runtime.spec import Geometry

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class StripShapes:
    """Shapes of a decoder in strips, batch 1."""

    features: tuple[int, ...]
    """(rows, channels, frames, width), of a whole frame."""
    whole: Shapes
    """Caches of the part that sees whole frames."""
    state: Shapes
    """Caches of a strip."""
    edges: Shapes
    """What a strip hands on to the next."""


def strips_of(
    decoder: StreamingDecoder | None, geometry: Geometry, count: int | None = None
) -> Strips | None:
    """The strips in which a decoder decodes frames of a size; None: as a whole (`choose_strips`).

    Raises InputError where a count is asked for and the decoder is in one part, or there cannot be so many.
    """
    if decoder is None or not decoder.begun:
        if count not in (None, 1):
            what = f"is {count}, and this decoder decodes frames as a whole"
            raise InputError(what, where=OPTION, expected="1, or a decoder wan-vae")
        return None
    lag, scale = _lateness(decoder)
    return choose_strips(geometry.width, geometry.height, lag, scale, count)


def strip_shapes(decoder: StreamingDecoder, strips: Strips, height: int, width: int) -> StripShapes:
    """The shapes of a decoder in strips, for latents of that height and width."""
    shapes, begun = decoder.state_shapes(height, width), decoder.begun
    whole = dict(list(shapes.items())[:begun])
    features = _features(decoder, height, width)
    state = {
        name: (*shape[:-2], shape[-2] * strips.rows // features.shape[-2], shape[-1])
        for name, shape in list(shapes.items())[begun:]
    }
    strip = features[..., : strips.rows, :]
    if strip.shape[-2] < strips.rows:
        strip = features.new_empty(*features.shape[:-2], strips.rows, features.shape[-1])
    _, edges = _finished(decoder, strip, state)
    _, channels, frames, rows, across = features.shape
    return StripShapes((rows, channels, frames, across), whole, state, edges)


def begin_frame(
    decoder: StreamingDecoder, latents: Tensor, first: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The features of a latent frame row by row (`StripShapes.features`), and the next caches of the part
    that sees whole frames."""
    features, following = decoder.begin(latents, first, state)
    return features[0].permute(2, 0, 1, 3).contiguous(), following


def finish_strip(
    decoder: StreamingDecoder,
    strips: Strips,
    height: int,
    features: Tensor,
    first: Tensor,
    top: Tensor,
    carried: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels of a strip of a frame of `height` rows of pixels, and what replaces all that it carries.

    Args:
        decoder, strips, height: of what.
        features: (rows, channels, frames, width) of the strip.
        first: (1,) as in `StreamingDecoder.forward`.
        top: (1,), float32: the row of features that the strip begins with.
        carried: caches of the strip, and edges of the strip above.
    """
    rows = StripRows(top, height // strips.scale, carried)
    pixels, following = decoder.finish(features.permute(1, 2, 0, 3)[None], first, carried, rows)
    return pixels, following | rows.following


def _lateness(decoder: StreamingDecoder) -> tuple[int, int]:
    """Rows of pixels by which strips are late, and rows of pixels to a row of features."""
    features = _features(decoder, 1, 1)
    rows = features.shape[-2]
    state = dict(list(decoder.state_shapes(1, 1).items())[decoder.begun :])
    lag, _ = _finished(decoder, features, state)
    return lag, decoder.spatial_stride // rows


class _Part(nn.Module):
    def __init__(self, decoder: StreamingDecoder, part: str) -> None:
        super().__init__()
        self.decoder, self._part = decoder, part

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.decoder, self._part)(*arguments)


def _run(decoder: StreamingDecoder, part: str, *arguments: Any) -> Any:
    """A part of the decoder without contents."""
    tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    empty = {f"decoder.{name}": torch.empty_like(t, device="meta") for name, t in tensors.items()}
    with torch.no_grad():
        return torch.func.functional_call(_Part(decoder, part), empty, arguments)


def _empty(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _features(decoder: StreamingDecoder, height: int, width: int) -> Tensor:
    latents = torch.empty(1, decoder.latent_channels, 1, height, width, device="meta")
    state = _empty(decoder.state_shapes(height, width))
    features: Tensor = _run(decoder, "begin", latents, torch.empty(1, device="meta"), state)[0]
    return features


def _finished(decoder: StreamingDecoder, features: Tensor, state: Shapes) -> tuple[int, Shapes]:
    """The lag of the last layer, and the shapes of what is handed on."""
    rows = StripRows(torch.empty(1, device="meta"), features.shape[-2], None)
    _run(decoder, "finish", features, torch.empty(1, device="meta"), _empty(state), rows)
    return rows.lag, {name: tuple(tensor.shape) for name, tensor in rows.following.items()}
