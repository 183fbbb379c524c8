"""A decoder in strips: the same pixels as of whole frames, whatever the number of strips."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.headmaps import InputError
from forcingkv.measure.planner.decoding import decoder_costs
from forcingkv.models.decoders import StreamingDecoder, load_decoder
from forcingkv.models.decoders.strips import begin_frame, finish_strip, strip_shapes, strips_of
from forcingkv.runtime.decode_strips import STRIP_PIXELS, Strips, choose_strips
from forcingkv.runtime.spec import Geometry
from tests.models.test_decoders import SMALL, SMALL22, shaken, small_taehv, small_vae

diffusers = pytest.importorskip("diffusers")

from forcingkv.models.decoders import wan_layers  # noqa: E402
from forcingkv.models.decoders.wan_vae import WanVaeDecoder  # noqa: E402

FRAMES = 3


def geometry(height: int, width: int, side: int = 8) -> Geometry:
    return Geometry(side * width, side * height, width, height, patch=1)


def in_strips(decoder: StreamingDecoder, strips: Strips, latents: Tensor) -> Tensor:
    """Pixels of a video, strip by strip, each with caches of its own: as a session decodes it."""
    height, width = latents.shape[-2:]
    side = decoder.spatial_stride
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
        made = torch.full((1, 3, 4, side * height, side * width), math.nan)
        for number, part in enumerate(features.split(strips.rows)):
            top, carried = torch.tensor([float(number * strips.rows)]), states[number] | edges
            pixels, following = finish_strip(decoder, strips, side * height, part, first, top, carried)
            states[number], edges = ({n: following[n] for n in of} for of in (shapes.state, shapes.edges))
            row, own, count = strips.places(number, side * height)
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


SIZES, COUNTS, CONFIGS = ((5, 3), (12, 5), (17, 2)), (2, 3, 8), {"2.1": SMALL, "2.2": SMALL22}
ALL = list(product(CONFIGS, COUNTS, SIZES))
NORMAL = {
    (kind, *pair)
    for kind, pairs in zip(CONFIGS, (SIZES, (*SIZES[1:], SIZES[0])), strict=True)
    for pair in zip(COUNTS, pairs, strict=True)
}
"""Each size and each number with each VAE."""


@pytest.mark.parametrize(
    ("kind", "count", "size"),
    [pytest.param(*case, marks=() if case in NORMAL else pytest.mark.long) for case in ALL],
    ids=str,
)
def test_strips_of_any_number_give_the_pixels_of_whole_frames(
    kind: str, count: int, size: tuple[int, int]
) -> None:
    decoder = WanVaeDecoder(small_vae(CONFIGS[kind]))
    latents = torch.randn(1, 4, FRAMES, *size, generator=torch.Generator().manual_seed(count))
    strips = strips_of(decoder, geometry(*size, decoder.spatial_stride), count)
    assert strips is not None
    found, expected = in_strips(decoder, strips, latents), at_once(decoder, latents)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.long)])
def test_as_many_layers_as_published_in_strips(narrow: bool) -> None:
    """Of an eighth of the width, and of the whole of it."""
    torch.manual_seed(0)
    config = SMALL | {"base_dim": 12, "num_res_blocks": 2} if narrow else {}
    decoder = WanVaeDecoder(shaken(diffusers.AutoencoderKLWan(**config)))
    latents = torch.randn(1, decoder.latent_channels, 2, 4, 3)
    strips = strips_of(decoder, geometry(4, 3), 3)
    assert strips is not None
    assert (strips.lag, strips.scale) == (46, 4)
    found, expected = in_strips(decoder, strips, latents), at_once(decoder, latents)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_attention_in_parts_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = WanVaeDecoder(small_vae())
    latents = torch.randn(1, 4, 2, 6, 5)
    whole = at_once(decoder, latents)
    monkeypatch.setattr(wan_layers, "MOST_SCORES", 500)  # a frame has 900
    monkeypatch.setattr(wan_layers, "PART_SCORES", 200)  # in parts of 6 queries
    torch.testing.assert_close(at_once(decoder, latents), whole, atol=1e-6, rtol=0)


def test_strips_are_chosen_by_the_size_of_a_frame() -> None:
    def chosen(width: int, height: int) -> tuple[int, int] | None:
        strips = choose_strips(width, height, lag=46, scale=4)
        return strips and (strips.count, strips.pixel_rows)

    assert chosen(832, 480) is None
    assert chosen(1280, 720) == (8, 96)
    assert chosen(1920, 1088) == (15, 76)
    for width, height in ((848, 480), (1280, 704), (2560, 1440), (3840, 2160), (7680, 4320), (400_000, 8)):
        strips = choose_strips(width, height, lag=46, scale=4)
        assert strips
        assert strips.rows == 1 or strips.pixel_rows * width <= STRIP_PIXELS
        given = [strips.places(number, height) for number in range(strips.count)]
        assert [row for row, _, rows in given for row in range(row, row + rows)] == list(range(height))


@pytest.mark.parametrize("count", [0, -1, 285, 10**9])
def test_strips_that_cannot_be_are_refused(count: int) -> None:
    with pytest.raises(
        InputError, match=f"--decode-strips is {count}; expected 1 to 284, for frames of 1920"
    ):
        choose_strips(1920, 1088, lag=46, scale=4, count=count)


@pytest.mark.parametrize("channels", [16, 48])
def test_what_the_planner_counts_is_what_the_layers_have(channels: int) -> None:
    with torch.device("meta"):
        decoder = load_decoder("wan-vae", channels=channels)
    costs = decoder_costs("wan-vae", channels)
    side = decoder.spatial_stride
    height, width = 1088 // side, 1920 // side
    sizes, of = costs.strips, geometry(height, width, side)
    strips = strips_of(decoder, of)
    assert sizes
    assert strips
    assert strips == costs.strips_of(of)
    shapes, pixels = strip_shapes(decoder, strips, height, width), height * width
    assert sum(map(math.prod, shapes.whole.values())) == sizes.whole * pixels
    assert math.prod(shapes.features) == sizes.features * pixels
    assert sum(map(math.prod, shapes.edges.values())) == sizes.edges * width
    state = sum(map(math.prod, shapes.state.values()))
    assert state * 1088 == (costs.cached - sizes.whole) * pixels * strips.pixel_rows
    assert strips_of(small_taehv(), of) is None
