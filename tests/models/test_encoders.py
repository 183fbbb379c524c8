"""Encoders in torch: a video in many calls is the video that diffusers encodes at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders import to_frames
from forcingkv.models.encoders import StreamingEncoder, encoder_for, load_encoder, pixels_of, stored_encoder
from forcingkv.models.presets import load_spec
from forcingkv.runtime.spec import Decoder
from tests.conftest import small_spec
from tests.models.test_decoder_files import (
    as_folder,
    as_folder22,
    as_pth,
    as_safetensors,
    as_wan22_pth,
    as_wan_pth,
)
from tests.models.test_decoders import SMALL, SMALL22, TOLERANCE, small_taehv, small_vae

pytest.importorskip("diffusers")

from forcingkv.models.decoders.wan_files import load_wan_encoder
from forcingkv.models.encoders.wan_vae import WanVaeEncoder

LATENT_FRAMES, HEIGHT, WIDTH = 4, 3, 5
CONFIGS = {"Wan 2.1": SMALL, "Wan 2.2": SMALL22}
SPLITS = ([1, 1, 1, 1], [1, 3], [3, 1], [4])


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def clip(config: dict[str, Any]) -> Tensor:
    """(1, 3, 13, height, width) in [-1, 1]."""
    stride = config.get("scale_factor_spatial", 8)
    shape = 1, 3, 4 * LATENT_FRAMES - 3, stride * HEIGHT, stride * WIDTH
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def at_once(config: dict[str, Any]) -> Tensor:
    """Latents as the transformer has them, by diffusers."""
    mean, std = (torch.tensor(SMALL[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents: Tensor = (small_vae(config).encode(clip(config)).latent_dist.mode() - mean) / std
    return latents


def encode(encoder: StreamingEncoder, frames: Tensor, split: list[int], before: float = 7.0) -> Tensor:
    """Latents, in calls of so many latent frames; `before` is what the frames before a video's first are."""
    dtype = next(encoder.parameters()).dtype
    unseen = torch.full_like(frames[:, :, :1], before).repeat(1, 1, 3, 1, 1)
    frames = torch.cat([unseen, frames], 2).to(dtype)
    state, parts = encoder.empty_state(HEIGHT, WIDTH), []
    for call, part in enumerate(frames.split([4 * count for count in split], 2)):
        latents, following = encoder(part, torch.tensor([float(call == 0)], dtype=dtype), state)
        assert {n: t.shape for n, t in following.items()} == {n: t.shape for n, t in state.items()}
        parts.append(latents)
        state = following
    return torch.cat(parts, 2)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_calls_of_any_size_give_what_diffusers_encodes_at_once(
    config: dict[str, Any], split: list[int]
) -> None:
    encoder, whole = WanVaeEncoder(small_vae(config)), at_once(config)
    state = encoder.empty_state(HEIGHT, WIDTH)
    assert {n: tuple(t.shape) for n, t in state.items()} == encoder.state_shapes(HEIGHT, WIDTH)
    assert list(state) == [f"feature.{number}" for number in range(len(state))]
    found = encode(encoder, clip(config), split)
    assert found.shape == whole.shape == (1, 4, LATENT_FRAMES, HEIGHT, WIDTH)
    assert whole.std() > 0.1
    torch.testing.assert_close(found, whole, atol=TOLERANCE, rtol=0)


def test_what_is_before_a_video_changes_nothing(config: dict[str, Any]) -> None:
    encoder = WanVaeEncoder(small_vae(config))
    one, other = (encode(encoder, clip(config), [2, 2], before) for before in (0.0, -3.0))
    assert torch.equal(one, other)


def test_a_picture_is_the_first_latent_frame(config: dict[str, Any]) -> None:
    encoder = WanVaeEncoder(small_vae(config))
    picture = encode(encoder, clip(config)[:, :, :1], [1])
    torch.testing.assert_close(picture, at_once(config)[:, :, :1], atol=TOLERANCE, rtol=0)


def test_an_encoder_runs_in_the_dtype_of_its_weights(config: dict[str, Any]) -> None:
    half = copy.deepcopy(WanVaeEncoder(small_vae(config))).to(torch.bfloat16)
    found = encode(half, clip(config), [2, 2])
    assert found.dtype == torch.bfloat16
    assert (found.float() - at_once(config)).abs().mean() < 0.05


def test_frames_become_the_pixels_that_they_were_made_of() -> None:
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    pixels = pixels_of(frames)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.float32, (1, 3, 2, 16, 16))
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(to_frames(pixels), frames)


WRITERS: dict[str, tuple[dict[str, Any], Callable[..., Path]]] = {
    "diffusers folder": (SMALL, as_folder),
    "diffusers file": (SMALL, as_safetensors),
    "Wan2.1_VAE.pth": (SMALL, as_wan_pth),
    "diffusers folder of 2.2": (SMALL22, as_folder22),
    "Wan2.2_VAE.pth": (SMALL22, as_wan22_pth),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_an_encoder_is_read_of_each_layout_and_again_of_a_bundle(layout: str, tmp_path: Path) -> None:
    config, write = WRITERS[layout]
    vae = small_vae(config)
    path = write(vae.state_dict(), tmp_path)
    known = {name: SMALL[name] for name in ("latents_mean", "latents_std")}
    found = load_wan_encoder(path, known).eval().requires_grad_(False)
    for again in (found, stored_encoder(found.state_dict(), "encoder.safetensors")):
        made = encode(again, clip(config), [2, 2])
        torch.testing.assert_close(made, at_once(config), atol=TOLERANCE, rtol=0)
        assert again.state_shapes(HEIGHT, WIDTH) == WanVaeEncoder(vae).state_shapes(HEIGHT, WIDTH)


def test_files_without_an_encoder_are_refused(tmp_path: Path) -> None:
    state = small_vae().state_dict()
    decoder = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
    known = {name: SMALL[name] for name in ("latents_mean", "latents_std")}
    with pytest.raises(InputError, match=r"missing encoder\.conv_in\.bias"):
        load_wan_encoder(as_safetensors(decoder, tmp_path), known)
    with pytest.raises(InputError, match="holds a tiny decoder, not the Wan VAE"):
        load_encoder(as_pth(small_taehv().state_dict(), tmp_path))
    with pytest.raises(InputError, match="is the decoder taehv, by its name; expected weights of wan-vae"):
        load_encoder(as_pth({"decoder.1.bias": torch.zeros(1)}, tmp_path).rename(tmp_path / "taew2_1.pth"))


def test_an_encoder_is_of_the_model_s_latents(tmp_path: Path) -> None:
    path = as_folder(small_vae().state_dict(), tmp_path)
    spec = load_spec("self-forcing")
    told = r"encodes to 4 channels at strides 4 \(time\), 8 \(space\); expected 16 channels"
    with pytest.raises(InputError, match=told):
        encoder_for(spec, path)
    found = encoder_for(replace(spec, latent_channels=4), path)
    assert isinstance(found, WanVaeEncoder)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    with pytest.raises(InputError, match="the latents of small are pixels: it needs no encoder"):
        encoder_for(small_spec(), path)
    with pytest.raises(InputError, match=r"16 channels at strides 4 \(time\), 16 \(space\), as"):
        encoder_for(replace(spec, decoder=Decoder("taehv", 16, 4)), path)


def test_a_bundle_with_another_encoder_is_refused() -> None:
    state = WanVaeEncoder(small_vae()).state_dict()
    state["encoder.conv_out.bias"] = torch.zeros(3)
    with pytest.raises(
        InputError, match=r"x is not an encoder: encoder\.conv_out\.bias has the shape \(3,\)"
    ):
        stored_encoder(state, "x")
