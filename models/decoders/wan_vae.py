"""The decoders of Wan's VAEs as streams: diffusers' layers and weights, our own way through them.

Wan 2.2's differs from Wan 2.1's in that each stage adds its input, enlarged, to its output, and that the last
convolution makes a square of pixels of each of its own.

The public decoder treats a video's first latent frame differently: it becomes one pixel frame, not four, and
no temporal upsampling ever looks back at it. Here every call doubles time alike, so that one static
graph serves all of them. In a first call the first of each doubled pair is **blank**: after k
doublings 2**k - 1 leading frames are. What a convolution computes for them is of no account, but it
must read zeros there, as it reads before the start of a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.rows import Rows
from forcingkv.models.decoders.wan_layers import PAST, Call, attend, pointwise, upsamplers

BEGUN = 1
"""Stages behind the attention that the part of the decoder has which sees whole frames. With it are 6% of
the caches; those of the next stage would make it 19%, and without any the strips would be later."""


class WanVaeDecoder(StreamingDecoder):
    """The decoder half of an `AutoencoderKLWan`. Caches: the last two frames each convolution read.

    Args:
        vae: an autoencoder of Wan 2.1's or Wan 2.2's kind; its decoder's modules are taken over, not copied.
            None: Wan 2.1's own, with weights drawn at random.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan | None = None) -> None:
        super().__init__()
        vae = vae or AutoencoderKLWan()
        config = vae.config
        self.latent_channels = config.z_dim
        self.temporal_stride = 2 ** sum(config.temperal_downsample)
        self.patch = config.patch_size or 1
        self.spatial_stride = self.patch * 2 ** (len(config.dim_mult) - 1)
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        # In the state dict too: an export takes everything with contents from there.
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1))

    def state_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        shapes = [
            (1, conv.in_channels, PAST, height * scale, width * scale) for conv, scale in self._causal_convs()
        ]
        return {f"feature.{number}": shape for number, shape in enumerate(shapes)}

    def forward(
        self, latents: Tensor, first: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features, following = self.begin(latents, first, state)
        pixels, later = self.finish(features, first, state, Rows())
        return pixels, following | later

    def begin(
        self, latents: Tensor, first: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        call, decoder = Call(first, state), self.decoder
        x = call.conv(decoder.conv_in, pointwise(self.post_quant_conv, latents * self.std + self.mean))
        x = call.residual(decoder.mid_block.resnets[0], x)
        for attention, block in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            x = call.residual(block, attend(attention, x))
        for stage in decoder.up_blocks[:BEGUN]:
            x = call.stage(stage, x)
        return x, call.following

    def finish(
        self, features: Tensor, first: Tensor, state: Mapping[str, Tensor], rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        doubled = sum(up.mode == "upsample3d" for stage in self._begun_stages for up in upsamplers(stage))
        call = Call(first, state, rows, begun=self.begun, blank=2**doubled - 1)
        decoder, x = self.decoder, features
        for stage in decoder.up_blocks[BEGUN:]:
            x = call.stage(stage, x)
        x = call.conv(decoder.conv_out, decoder.nonlinearity(call.normed(decoder.norm_out, x)))
        rows.enlarged(self.patch)
        return self.bounded(_unpatched(x, self.patch)), call.following

    @property
    def begun(self) -> int:
        blocks, stages = [self.decoder.mid_block, *self._begun_stages], self._begun_stages
        doubling = sum(up.mode == "upsample3d" for stage in stages for up in upsamplers(stage))
        convs: int = 1 + sum(2 * len(block.resnets) for block in blocks) + doubling
        return convs

    @property
    def _begun_stages(self) -> list[Any]:
        return list(self.decoder.up_blocks[:BEGUN])

    def bounded(self, pixels: Tensor) -> Tensor:
        """Pixels as frames have them."""
        return pixels.clamp(-1, 1)

    def _causal_convs(self) -> Iterator[tuple[nn.Conv3d, int]]:
        """The convolutions with a cache in the order of the forward, and how much wider than latents."""
        decoder, scale = self.decoder, 1
        yield decoder.conv_in, scale
        for block in decoder.mid_block.resnets:
            yield from ((block.conv1, scale), (block.conv2, scale))
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                yield from ((block.conv1, scale), (block.conv2, scale))
            for upsampler in upsamplers(stage):
                if upsampler.mode == "upsample3d":
                    yield upsampler.time_conv, scale
                scale *= 2
        yield decoder.conv_out, scale


def _unpatched(x: Tensor, patch: int) -> Tensor:
    """Channels -> squares of pixels: (1, 3 * patch**2, F, H, W) -> (1, 3, F, patch * H, patch * W).

    Wan has the column of a pixel in its square before the row.
    """
    if patch == 1:
        return x
    _, channels, frames, height, width = x.shape
    squares = x.reshape(channels // patch**2, patch, patch, frames, height, width)
    return squares.permute(0, 3, 4, 2, 5, 1).reshape(1, -1, frames, patch * height, patch * width)
