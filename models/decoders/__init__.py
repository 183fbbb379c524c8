"""Pixel decoders: latents in, frames out, chunk by chunk with explicit caches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.fields import one_of
from forcingkv.models.decoders.latents import WAN21, WAN22
from forcingkv.models.decoders.names import check_name
from forcingkv.models.decoders.rows import Rows
from forcingkv.models.streaming import StreamingModule, filled_with
from forcingkv.runtime.spec import Decoder, DecoderKind, Geometry, ModelSpec

KINDS: tuple[DecoderKind, ...] = get_args(DecoderKind)


class StreamingDecoder(StreamingModule):
    """Turns latents into pixels, any number of latent frames a call."""

    def begin(
        self, latents: Tensor, first: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of a decoder that sees whole frames; the rest (`finish`) sees neighbouring rows alone.

        Arguments as those of `forward`; of the caches the first `begun`. Returns features (1, channels,
        frames, rows, width) and its next caches.
        """
        raise NotImplementedError("only decoders in two parts have it (`begun`)")

    def finish(
        self, features: Tensor, first: Tensor, state: Mapping[str, Tensor], rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rest of the decoder, on the rows of the features that there are.

        Args:
            features: of `begin`, the rows that `rows` is of.
            first: as in `forward`.
            state: the caches that `begin` does not have, of those rows.
            rows: which rows they are. It is changed: afterwards `rows.lag` are the rows of pixels by which
                the result is late, and `StripRows.following` is what the next strip needs.

        Returns:
            As `forward`, of as many rows as there are.
        """
        raise NotImplementedError("only decoders in two parts have it (`begun`)")

    @property
    def begun(self) -> int:
        """Caches of `begin`; 0 for decoders that are not in two parts."""
        return 0

    @abstractmethod
    def forward(
        self, latents: Tensor, first: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode the next latent frames of a video.

        Args:
            latents: (1, latent_channels, n, h, w), n >= 1, normalised as the transformer makes them.
            first: (1,), 1.0 in a video's first call and 0.0 in the others; the dtype of the latents.
            state: the caches that the call before returned; zeros in the first call.

        Returns:
            Pixels (1, 3, temporal_stride * n, spatial_stride * h, spatial_stride * w) in [-1, 1], and the
            next caches under the same names. The first temporal_stride - 1 pixel frames of a first call
            mean nothing and are the caller's to drop: a latent frame at the start is one pixel frame.
        """


def frames_of(pixels: Tensor, geometry: Geometry) -> Tensor:
    """Pixels (1, 1 or 3, F, H, W) in [-1, 1] -> the frames that are shown: uint8 (F, height, width, 3)."""
    if geometry.crop:
        width, height = geometry.crop
        pixels = pixels[..., :height, :width]
    return to_frames(pixels)


def to_frames(pixels: Tensor) -> Tensor:
    """(1, 1 or 3, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3)."""
    frames = ((pixels[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round()
    frames = frames.expand(-1, -1, -1, 3) if frames.shape[-1] == 1 else frames
    return frames.to(torch.uint8)  # last: TensorRT has uint8 at the borders of a network only


def load_decoder(
    kind: str, path: Path | None = None, *, seed: int = 0, channels: int = len(WAN21.mean)
) -> StreamingDecoder:
    """A decoder of Wan 2.1's or Wan 2.2's latents in float32 on the CPU, for inference.

    Args:
        kind: `wan-vae`, the VAE that the latents come from; `taehv`, the tiny decoder taew2_1 or taew2_2 that
            comes close to it for about a hundredth of the work; or `lighttae`, LightX2V's lighttaew2_1 or
            lighttaew2_2 of the same layers, which take latents with the VAE's mean and deviation.
        path: the weights, whose sizes say of which latents they are. wan-vae: a diffusers folder (or one with
            the subfolder `vae`), Wan's folder or its `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`, a file in the
            naming of either. taehv: `taew2_1.pth`, `taew2_2.pth` or .safetensors; lighttae:
            `lighttaew2_1.pth`, `lighttaew2_2.pth` or .safetensors. None: weights drawn at random.
        seed: of the random weights.
        channels: of the latents that random weights are for: 16 (Wan 2.1) or 48 (Wan 2.2).

    Raises InputError where there is no such kind, the file cannot be read, is a decoder of another kind by
    its tensors or its name, or a tensor is missing, unexpected or wrongly shaped (all are listed),
    MissingExtraError for wan-vae without diffusers.
    """
    wanted = one_of(DecoderKind, kind, "decoder")
    if path is not None:
        check_name(wanted, path)
    decoder: StreamingDecoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if wanted == "wan-vae":
            _need_diffusers()
            # Imported where it is wanted: diffusers takes seconds to import, and taehv does without.
            from forcingkv.models.decoders.wan_files import load_wan_vae, random_wan_vae

            decoder = random_wan_vae(channels) if path is None else load_wan_vae(path)
        else:
            from forcingkv.models.decoders import taehv

            tiny = taehv.LightTaeDecoder if wanted == "lighttae" else taehv.TaehvDecoder
            decoder = (
                tiny(**taehv.published_sizes(channels)) if path is None else taehv.load_taehv(path, tiny)
            )
    return decoder.eval().requires_grad_(False)


def _need_diffusers() -> None:
    if find_spec("diffusers") is None:
        raise MissingExtraError("diffusers", "models")


def stored_decoder(kind: str, state: Mapping[str, Tensor], where: str) -> StreamingDecoder:
    """The decoder of a bundle, of those parameters and buffers, where and as they are.

    Raises InputError, naming the file `where`, for tensors that are not those of such a decoder, and
    MissingExtraError for wan-vae without diffusers.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with torch.device("meta"):
        decoder: StreamingDecoder
        if kind == "wan-vae":
            _need_diffusers()
            from forcingkv.models.decoders.wan_files import empty_wan_vae

            decoder = empty_wan_vae(found, where)
        else:
            from forcingkv.models.decoders.taehv import LightTaeDecoder, TaehvDecoder, sizes_of

            tiny = LightTaeDecoder if kind == "lighttae" else TaehvDecoder
            decoder = tiny(**sizes_of(found, where))
    filled_with(decoder, state, f"a decoder {kind}", where)
    return decoder


def decoder_for(
    spec: ModelSpec, kind: str | None, path: Path | None, *, random: bool = False
) -> tuple[ModelSpec, StreamingDecoder | None]:
    """The decoder of a model, and its spec with that decoder; None for latents that are pixels.

    Args:
        spec: the model.
        kind: one of `KINDS`; None: the model's own.
        path: the decoder's weights.
        random: draw them at random where no path is given.

    Raises InputError where the model needs no decoder, or where the weights are not given, cannot be read, or
    are for latents of another shape.
    """
    if spec.decoder.kind == "pixels":
        if kind or path:
            raise InputError(f"the latents of {spec.name} are pixels: it needs no decoder", where="decoder")
        return spec, None
    name: DecoderKind = one_of(DecoderKind, kind or spec.decoder.kind, "decoder")
    if path is None and not random:
        of = "2_2" if spec.latent_channels == len(WAN22.mean) else "2_1"
        hint = (
            f"Name them: --vae Wan{of.replace('_', '.')}_VAE.pth, --decoder taehv --vae taew{of}.pth, or"
            f" --decoder lighttae --vae lighttaew{of}.pth."
        )
        raise InputError(f"the weights of the decoder {name} are not given", where="decoder", hint=hint)
    decoder = load_decoder(name, path, channels=spec.latent_channels)
    own = Decoder(name, decoder.spatial_stride, decoder.temporal_stride)
    found, wanted = _latents(decoder.latent_channels, own), _latents(spec.latent_channels, spec.decoder)
    if found != wanted:
        expected = f"{wanted}, as {spec.name} has them"
        raise InputError(f"decodes {found}", where=str(path or name), expected=expected)
    return replace(spec, decoder=own), decoder


def _latents(channels: int, of: Decoder) -> str:
    return f"{channels} channels at strides {of.temporal_stride} (time), {of.spatial_stride} (space)"
