"""Pixel decoders in torch: a video in many calls is the video decoded at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models import decoders
from forcingkv.models.decoders import StreamingDecoder, load_decoder
from forcingkv.models.decoders.latents import Scale
from forcingkv.models.decoders.taehv import LightTaeDecoder, TaehvDecoder

diffusers = pytest.importorskip("diffusers")

from forcingkv.models.decoders import wan_files  # noqa: E402
from forcingkv.models.decoders.wan_vae import WanVaeDecoder  # noqa: E402

TOLERANCE = 1e-4
FRAMES, HEIGHT, WIDTH = 7, 3, 5
SPLITS = ([1] * 7, [3, 3, 1], [7])
SMALL = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 0.5, 1.5],
}
SMALL22 = SMALL | {
    "base_dim": 4,
    "decoder_base_dim": 8,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
"""As `SMALL`, of Wan 2.2's kind."""
CASES = ("wan-vae", "wan-vae of 2.2", "taehv", "taehv of 2.2", "lighttae")

State = dict[str, Tensor]
Step = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]


def shaken(model: Any) -> Any:
    """Every bias and gain far from 0 and 1, so that what should be zero shows where it is not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "gamma")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval().requires_grad_(False)


def small_vae(config: dict[str, Any] = SMALL) -> Any:
    torch.manual_seed(0)
    return shaken(diffusers.AutoencoderKLWan(**config))


def small_taehv(patch: int = 1) -> TaehvDecoder:
    torch.manual_seed(0)
    decoder: TaehvDecoder = shaken(TaehvDecoder(widths=(16, 12, 8, 10), latent_channels=4, patch=patch))
    return decoder


def small_lighttae() -> LightTaeDecoder:
    torch.manual_seed(0)
    scale = Scale(tuple(SMALL["latents_mean"]), tuple(SMALL["latents_std"]))  # type: ignore[arg-type]
    decoder: LightTaeDecoder = shaken(LightTaeDecoder(scale, widths=(16, 12, 8, 10), latent_channels=4))
    return decoder


def latents() -> Tensor:
    return torch.randn(1, 4, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def decode(step: Step, state: State, split: list[int], stride: int) -> Tensor:
    """A video in calls of those sizes: (1, 3, 25, height, width)."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    parts = []
    for call, part in enumerate(latents().split(split, 2)):
        pixels, state = step(part, torch.tensor([float(call == 0)]), state)
        assert pixels.shape == (1, 3, 4 * part.shape[2], stride * HEIGHT, stride * WIDTH)
        assert {name: tensor.shape for name, tensor in state.items()} == shapes
        parts.append(pixels)
    return torch.cat(parts, 2)[:, :, 3:]


def vae_at_once(vae: Any) -> Tensor:
    mean, std = (torch.tensor(SMALL[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    pixels: Tensor = vae.decode(latents() * std + mean).sample
    return pixels


def taehv_at_once(decoder: TaehvDecoder, given: Tensor) -> Tensor:
    """The published layers frame by frame, each memory block over the whole video in turn."""
    weights = decoder.state_dict()

    def conv(name: str, x: Tensor) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    frames = [conv("1", 3 * torch.tanh(frame / 3)).relu() for frame in given[0].unbind(1)]
    for start, growth in ((3, 1), (9, 2), (15, 2)):
        for block in range(start, start + 3):
            past = [torch.zeros_like(frames[0]), *frames[:-1]]
            for number, (frame, before) in enumerate(zip(list(frames), past, strict=True)):
                x = torch.cat([frame, before])
                for layer in (0, 2, 4):
                    x = conv(f"{block}.conv.{layer}", x.relu() if layer else x)
                frames[number] = (x + frame).relu()
        wide = [frame.repeat_interleave(2, 1).repeat_interleave(2, 2) for frame in frames]
        grown = [part for frame in wide for part in conv(f"{start + 4}.conv", frame).chunk(growth)]
        frames = [conv(f"{start + 5}", frame) for frame in grown]
    video = torch.stack([conv("22", frame.relu()) for frame in frames], 1)
    shuffled = F.pixel_shuffle(video.transpose(0, 1), decoder.patch).transpose(0, 1)
    return shuffled.clamp(0, 1)[None, :, 3:] * 2 - 1


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[StreamingDecoder, Tensor]:
    """A decoder, and the video as something independent of it decodes it at once."""
    if request.param.startswith("taehv"):
        taehv = small_taehv(2 if request.param.endswith("2.2") else 1)
        return taehv, taehv_at_once(taehv, latents())
    if request.param == "lighttae":
        mean, std = (torch.tensor(SMALL[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        light = small_lighttae()
        return light, taehv_at_once(light, latents() * std + mean)
    vae = small_vae(SMALL22 if request.param.endswith("2.2") else SMALL)
    return WanVaeDecoder(vae), vae_at_once(vae)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_calls_of_any_size_give_the_video_decoded_at_once(
    case: tuple[StreamingDecoder, Tensor], split: list[int]
) -> None:
    decoder, whole = case
    state = decoder.empty_state(HEIGHT, WIDTH)
    assert {n: tuple(t.shape) for n, t in state.items()} == decoder.state_shapes(HEIGHT, WIDTH)
    assert list(state) == [f"feature.{number}" for number in range(len(state))]
    found = decode(decoder, state, split, decoder.spatial_stride)
    assert found.shape[2] == decoder.temporal_stride * (FRAMES - 1) + 1
    assert whole.std() > 0.1, "a video of one colour would show little"
    torch.testing.assert_close(found, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.long
def test_the_vae_of_the_real_width_streams_too() -> None:
    torch.manual_seed(0)
    vae = shaken(diffusers.AutoencoderKLWan())
    z = torch.randn(1, 16, 3, 2, 3)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    whole = vae.decode(z * std + mean).sample
    decoder = WanVaeDecoder(vae)
    state, parts = decoder.empty_state(2, 3), []
    for call, part in enumerate(z.split(1, 2)):
        pixels, state = decoder(part, torch.tensor([float(call == 0)]), state)
        parts.append(pixels)
    torch.testing.assert_close(torch.cat(parts, 2)[:, :, 3:], whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", decoders.KINDS)
def test_random_weights_follow_the_seed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_files, "AutoencoderKLWan", lambda: diffusers.AutoencoderKLWan(**SMALL))
    before = torch.random.get_rng_state()
    one, same, other = (load_decoder(kind, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("weight"))


@pytest.mark.parametrize(("channels", "stride"), [(16, 8), (48, 16)])
@pytest.mark.parametrize("kind", decoders.KINDS)
def test_the_real_sizes_are_those_of_wan(kind: str, channels: int, stride: int) -> None:
    # The VAE of Wan 2.2 has 555 million weights in its decoder: its shapes alone show what is asked here.
    on = torch.device("meta" if kind == "wan-vae" else "cpu")
    with on:
        decoder = load_decoder(kind, channels=channels)
        assert (decoder.latent_channels, decoder.temporal_stride) == (channels, 4)
        assert decoder.spatial_stride == stride
        assert not decoder.training
        assert not any(parameter.requires_grad for parameter in decoder.parameters())
        state = decoder.empty_state(1, 2)
        pixels, following = decoder(torch.zeros(1, channels, 1, 1, 2), torch.ones(1), state)
    assert pixels.shape == (1, 3, 4, stride, 2 * stride)
    assert following.keys() == state.keys()


def test_a_decoder_runs_in_the_dtype_of_its_weights(case: tuple[StreamingDecoder, Tensor]) -> None:
    decoder, whole = case
    half = copy.deepcopy(decoder).to(torch.bfloat16)

    def step(part: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
        out: tuple[Tensor, State] = half(part.to(torch.bfloat16), first.to(torch.bfloat16), state)
        return out

    state = half.empty_state(HEIGHT, WIDTH)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    found = decode(step, state, [3, 3, 1], half.spatial_stride)
    assert found.dtype == torch.bfloat16
    assert (found.float() - whole).abs().mean() < 0.02
