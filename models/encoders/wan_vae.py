"""The encoders of Wan's VAEs as streams: diffusers' layers and weights, our own way through them.

The public encoder treats a video's first pixel frame differently: it is one latent frame by itself, and no
temporal downsampling ever halves it. Here every call halves time alike, so that one static graph serves all
of them: the first frame is the last one of the first four, and those before it are **blank**, as in
`decoders.wan_vae`. A halving leaves half as many blank frames, rounded down, and the frame that follows them
goes on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualDownBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.models.decoders.wan_layers import PAST, Call, attend, normed, pointwise
from forcingkv.models.encoders import StreamingEncoder
from forcingkv.models.streaming import kept

HELD = 1
"""Frames that a temporal downsampling looks back."""


class WanVaeEncoder(StreamingEncoder):
    """The encoder half of an `AutoencoderKLWan`. Caches: the last frames each convolution over time read.

    Args:
        vae: an autoencoder of Wan 2.1's or Wan 2.2's kind; its encoder's modules are taken over, not copied.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        config = vae.config
        self.latent_channels = config.z_dim
        self.temporal_stride = 2 ** sum(config.temperal_downsample)
        self.patch = config.patch_size or 1
        self.spatial_stride = self.patch * 2 ** (len(config.dim_mult) - 1)
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1))

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        scale = self.spatial_stride // self.patch
        shapes = [
            (1, conv.in_channels, frames, height * scale // halved, width * scale // halved)
            for conv, frames, halved in self._causal_convs()
        ]
        return {f"feature.{number}": shape for number, shape in enumerate(shapes)}

    def forward(
        self, pixels: Tensor, first: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        call = _EncodingCall(first, state, self.temporal_stride - 1)
        encoder = self.encoder
        x = call.conv(encoder.conv_in, _patched(pixels, self.patch))
        for layer in encoder.down_blocks:
            x = call.layer(layer, x)
        x = call.residual(encoder.mid_block.resnets[0], x)
        for attention, block in zip(encoder.mid_block.attentions, encoder.mid_block.resnets[1:], strict=True):
            x = call.residual(block, attend(attention, x))
        x = call.conv(encoder.conv_out, encoder.nonlinearity(normed(encoder.norm_out, x)))
        # Mean and logarithm of the variance of what latents are drawn from; the mean is taken.
        latents = pointwise(self.quant_conv, x)[:, : self.latent_channels]
        return (latents - self.mean) / self.std, call.following

    def _causal_convs(self) -> Iterator[tuple[nn.Conv3d, int, int]]:
        """The convolutions with a cache in the order of the forward, frames that they look back, and by how
        much height and width are divided by then."""
        encoder, halved = self.encoder, 1
        yield encoder.conv_in, PAST, halved
        for block in _flat(encoder.down_blocks):
            if isinstance(block, WanResample):
                halved *= 2
                if block.mode == "downsample3d":
                    yield block.time_conv, HELD, halved
            elif not isinstance(block, WanAttentionBlock):
                yield from ((block.conv1, PAST, halved), (block.conv2, PAST, halved))
        for block in encoder.mid_block.resnets:
            yield from ((block.conv1, PAST, halved), (block.conv2, PAST, halved))
        yield encoder.conv_out, PAST, halved


def _flat(layers: Any) -> Iterator[Any]:
    """Wan 2.2 has its layers in stages."""
    for layer in layers:
        if isinstance(layer, WanResidualDownBlock):
            yield from layer.resnets
            yield from _downsamplers(layer)
        else:
            yield layer


def _downsamplers(stage: Any) -> tuple[Any, ...]:
    """None or one."""
    return () if stage.downsampler is None else (stage.downsampler,)


class _EncodingCall(Call):
    """What one call carries through the layers: x is (1, channels, frames, height, width) throughout."""

    def __init__(self, first: Tensor, state: Mapping[str, Tensor], blank: int) -> None:
        super().__init__(first, dict(state))
        self.blank = blank

    def layer(self, layer: Any, x: Tensor) -> Tensor:
        if isinstance(layer, WanResample):
            return self.downsample(layer, x)
        if isinstance(layer, WanAttentionBlock):
            return attend(layer, x)
        if not isinstance(layer, WanResidualDownBlock):
            return self.residual(layer, x)
        entering = self.seen(x)
        for inner in (*layer.resnets, *_downsamplers(layer)):
            x = self.layer(inner, x)
        return x + _averaged(layer.avg_shortcut, entering)

    def seen(self, x: Tensor) -> Tensor:
        """x with zeros for the frames that are blank, if this is a video's first call."""
        if not self.blank:
            return x
        return torch.cat([x[:, :, : self.blank] * (1 - self.first), x[:, :, self.blank :]], 2)

    def downsample(self, layer: Any, x: Tensor) -> Tensor:
        conv = layer.resample[1]
        frames = F.conv2d(F.pad(x[0].transpose(0, 1), (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        x = frames.transpose(0, 1)[None]
        return self.halve(layer.time_conv, x) if layer.mode == "downsample3d" else x

    def halve(self, time_conv: Any, x: Tensor) -> Tensor:
        """One frame of each two and of the one before them; a video's first goes on as it is."""
        name = f"feature.{len(self.following)}"
        frames = torch.cat([self.state[name], x], 2)
        self.following[name] = kept(self.state, name, frames[:, :, -HELD:])
        halved = F.conv3d(frames, time_conv.weight, time_conv.bias, stride=time_conv.stride)
        opening, self.blank = self.blank, self.blank // 2
        as_it_is = torch.where(
            self.first > 0.5, x[:, :, opening : opening + 1], halved[:, :, self.blank : self.blank + 1]
        )
        parts = (halved[:, :, : self.blank], as_it_is, halved[:, :, self.blank + 1 :])
        return torch.cat([part for part in parts if part.shape[2]], 2)


def _averaged(shortcut: Any, x: Tensor) -> Tensor:
    """diffusers' shortcut without weights: frames, rows and columns of what becomes one pixel of one frame go
    beside its channels, and each channel is the mean of as many of them as there are too many."""
    _, channels, count, height, width = x.shape
    frames, side = shortcut.factor_t, shortcut.factor_s
    parts = x.reshape(channels, count // frames, frames, height // side, side, width // side, side)
    beside = parts.permute(0, 2, 4, 6, 1, 3, 5)
    grouped = beside.reshape(
        1, shortcut.out_channels, shortcut.group_size, count // frames, height // side, width // side
    )
    # Sums of slices: onnx infers the shape of a mean over one axis wrongly.
    total = grouped[:, :, 0]
    for place in range(1, shortcut.group_size):
        total = total + grouped[:, :, place]
    mean: Tensor = total / shortcut.group_size
    return mean


def _patched(x: Tensor, patch: int) -> Tensor:
    """Squares of pixels -> channels: (1, 3, F, patch * H, patch * W) -> (1, 3 * patch**2, F, H, W).

    Wan has the column of a pixel in its square before the row.
    """
    if patch == 1:
        return x
    _, channels, frames, height, width = x.shape
    squares = x.reshape(channels, frames, height // patch, patch, width // patch, patch)
    return squares.permute(0, 5, 3, 1, 2, 4).reshape(1, -1, frames, height // patch, width // patch)
