"""Encoders: frames in, latents out, piece by piece with explicit caches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.models.decoders.latents import WAN21
from forcingkv.models.decoders.names import check_name
from forcingkv.models.streaming import StreamingModule, filled_with
from forcingkv.runtime.spec import ModelSpec


class StreamingEncoder(StreamingModule):
    """Turns pixels into latents, any number of latent frames a call."""

    @abstractmethod
    def forward(
        self, pixels: Tensor, first: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode the next frames of a video.

        Args:
            pixels: (1, 3, temporal_stride * n, spatial_stride * h, spatial_stride * w) in [-1, 1], n >= 1.
                The first temporal_stride - 1 frames of a first call mean nothing: a video's first frame is
                one latent frame by itself.
            first: (1,), 1.0 in a video's first call and 0.0 in the others; the dtype of the pixels.
            state: the caches that the call before returned; zeros in the first call.

        Returns:
            Latents (1, latent_channels, n, h, w), normalised as the transformer takes them, and the next
            caches under the same names.
        """


def pixels_of(frames: Tensor) -> Tensor:
    """uint8 (F, H, W, 3) -> float32 (1, 3, F, H, W) in [-1, 1]: the inverse of `decoders.to_frames`."""
    # First another dtype: TensorRT has uint8 at the borders of a network only.
    return frames.to(torch.float32).permute(3, 0, 1, 2)[None] / 127.5 - 1


def load_encoder(
    path: Path | None = None, *, seed: int = 0, channels: int = len(WAN21.mean)
) -> StreamingEncoder:
    """The encoder of a VAE of Wan 2.1 or 2.2, in float32 on the CPU, for inference.

    Args:
        path: the weights of the whole VAE, as `decoders.load_decoder` takes them for `wan-vae`. None: weights
            drawn at random.
        seed: of the random weights.
        channels: of the latents that random weights make: 16 (Wan 2.1) or 48 (Wan 2.2).

    Raises InputError where the file cannot be read, is a tiny decoder, or a tensor is missing, unexpected or
    wrongly shaped, MissingExtraError without diffusers.
    """
    if path is not None:
        check_name("wan-vae", path)
    _need_diffusers()
    from forcingkv.models.decoders.wan_files import load_wan_encoder, random_wan_encoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = random_wan_encoder(channels) if path is None else load_wan_encoder(path)
    return encoder.eval().requires_grad_(False)


def stored_encoder(state: Mapping[str, Tensor], where: str) -> StreamingEncoder:
    """The encoder of a bundle, of those parameters and buffers, where and as they are.

    Raises InputError, naming the file `where`, for tensors that are not those of an encoder, and
    MissingExtraError without diffusers.
    """
    _need_diffusers()
    from forcingkv.models.decoders.wan_files import empty_wan_encoder

    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with torch.device("meta"):
        encoder = empty_wan_encoder(shapes, where)
    filled_with(encoder, state, "an encoder", where)
    return encoder


def encoder_for(spec: ModelSpec, path: Path | None) -> StreamingEncoder:
    """The encoder of a model's latents; `path` as in `load_encoder`.

    Raises InputError where the model's latents are pixels, or the weights cannot be read or are for latents
    of another shape.
    """
    if spec.decoder.kind == "pixels":
        raise InputError(f"the latents of {spec.name} are pixels: it needs no encoder", where="--encoder")
    encoder = load_encoder(path, channels=spec.latent_channels)
    made = encoder.latent_channels, encoder.temporal_stride, encoder.spatial_stride
    wanted = spec.latent_channels, spec.decoder.temporal_stride, spec.decoder.spatial_stride
    if made != wanted:
        told = "{} channels at strides {} (time), {} (space)"
        raise InputError(
            f"encodes to {told.format(*made)}",
            where=str(path or "--encoder"),
            expected=f"{told.format(*wanted)}, as {spec.name} has them",
        )
    return encoder


def _need_diffusers() -> None:
    if find_spec("diffusers") is None:
        raise MissingExtraError("diffusers", "models")
