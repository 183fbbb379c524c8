"""The context that a model makes anew before each chunk (`ModelSpec.context`), in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.decoders import StreamingDecoder, frames_of
from forcingkv.models.encoders import StreamingEncoder, pixels_of
from forcingkv.models.kv import Cache, heads_of
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import positions
from forcingkv.runtime.frame_encoder import continued
from forcingkv.runtime.kv.plan import CachePlan


class FirstFrame:
    """Passes the first frame of each context through the VAE again.

    Called with the latents of each chunk, in order (1, channels, frames, height, width): gives the latent
    (1, channels, 1, height, width) that the next chunk's context begins with. Of the pixel frames of that
    latent frame the last one is encoded, rounded to 8 bits as it is shown, as the first of a new video.
    """

    def __init__(
        self,
        plan: CachePlan,
        decoder: StreamingDecoder | None = None,
        encoder: StreamingEncoder | None = None,
    ) -> None:
        """`decoder` and `encoder` are of the model's latents; None: these are pixels."""
        self._plan, self._decoder, self._encoder = plan, decoder, encoder
        self._size = plan.geometry.latent_height, plan.geometry.latent_width
        self._caches = decoder.empty_state(*self._size) if decoder else {}
        self._begun = False

    def __call__(self, latents: Tensor) -> Tensor:
        spec, geometry, pixels = self._plan.spec, self._plan.geometry, latents
        if self._decoder:
            opening = torch.tensor([0.0 if self._begun else 1.0])
            pixels, self._caches = self._decoder(latents, opening, self._caches)
            self._begun = True
        frames, stride = frames_of(pixels, geometry), spec.decoder.temporal_stride
        place = len(frames) - 1 - (spec.context_frames - 1) * stride
        frame = torch.from_numpy(continued(frames[place : place + 1].numpy(), geometry))
        if self._encoder is None:
            return pixels_of(frame)[:, : spec.latent_channels]
        opening_call = pixels_of(frame.repeat(stride, 1, 1, 1)), torch.ones(1)
        made: Tensor = self._encoder(*opening_call, self._encoder.empty_state(*self._size))[0]
        return made


def attend_alone(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
    """The frames of a context see one another, and nothing else."""
    return F.scaled_dot_product_attention(queries, current.keys, current.values)


def context_rotary(plan: CachePlan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of a context's frames, from 0 on, on the device of `like`."""
    tables = positions.rotary(plan.spec, plan.geometry, 0, plan.spec.context_frames)
    return torch.from_numpy(tables[0]).to(like.device), torch.from_numpy(tables[1]).to(like.device)


def cache_of_context(plan: CachePlan, new: Sequence[KeysValues]) -> Cache:
    """The cache of the keys and values of a context, by layer."""
    return [
        [{role.name: heads_of(kv, group) for role in group.roles} for group in groups]
        for groups, kv in zip(plan.layers, new, strict=True)
    ]
