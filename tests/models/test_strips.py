"""A decoder in strips: the same pixels as of whole frames, whatever the number of strips."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import begin_frame, finish_strip, strip_shapes, strips_of
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.spec import Geometry
from tests.models.test_decoders import small_vae

diffusers = pytest.importorskip("diffusers")

from forcingkv.models.decoders.wan_vae import WanVaeDecoder  # noqa: E402

FRAMES = 3


def geometry(height: int, width: int) -> Geometry:
    return Geometry(8 * width, 8 * height, width, height, patch=1)


def in_strips(decoder: StreamingDecoder, strips: Strips, latents: Tensor) -> Tensor:
    """Pixels of a video, strip by strip, each with caches of its own: as a session decodes it."""
    height, width = latents.shape[-2:]
    shapes = strip_shapes(decoder, strips, height, width)
    whole = {name: torch.zeros(shape) for name, shape in shapes.whole.items()}
    states = [{n: torch.zeros(s) for n, s in shapes.state.items()} for _ in range(strips.count)]
    frames = []
    for call, latent in enumerate(latents.split(1, 2)):
        first = torch.tensor([float(call == 0)])
        features, whole = begin_frame(decoder, latent, first, whole)
        assert features.shape == shapes.features
        features = F.pad(features, (0, 0, 0, 0, 0, 0, 0, strips.feature_rows - features.shape[0]))
        edges = {name: torch.zeros(shape) for name, shape in shapes.edges.items()}
        made = torch.full((1, 3, 4, 8 * height, 8 * width), math.nan)
        for number, part in enumerate(features.split(strips.rows)):
            top, carried = torch.tensor([float(number * strips.rows)]), states[number] | edges
            pixels, following = finish_strip(decoder, strips, 8 * height, part, first, top, carried)
            states[number], edges = ({n: following[n] for n in of} for of in (shapes.state, shapes.edges))
            row, own, count = strips.places(number, 8 * height)
            made[..., row : row + count, :] = pixels[..., own : own + count, :]
        frames.append(made)
    return torch.cat(frames, 2)[:, :, 3:]


def at_once(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    state = {name: torch.zeros(shape) for name, shape in decoder.state_shapes(height, width).items()}
    frames = []
    for call, latent in enumerate(latents.split(1, 2)):
        made, state = decoder(latent, torch.tensor([float(call == 0)]), state)
        frames.append(made)
    return torch.cat(frames, 2)[:, :, 3:]


@pytest.mark.parametrize("size", [(5, 3), (12, 5), (17, 2)], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_strips_of_any_number_give_the_pixels_of_whole_frames(size: tuple[int, int], count: int) -> None:
    decoder = WanVaeDecoder(small_vae())
    latents = torch.randn(1, 4, FRAMES, *size, generator=torch.Generator().manual_seed(count))
    strips = strips_of(decoder, geometry(*size), count)
    assert strips is not None
    found, expected = in_strips(decoder, strips, latents), at_once(decoder, latents)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
