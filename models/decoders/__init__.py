"""Pixel decoders: latents in, frames out, chunk by chunk with explicit caches."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.models.decoders.base import StreamingDecoder

__all__ = ["KINDS", "StreamingDecoder", "load_decoder"]

KINDS: tuple[Literal["wan-vae"], Literal["taehv"]] = ("wan-vae", "taehv")


def load_decoder(kind: str, path: Path | None = None, *, seed: int = 0) -> StreamingDecoder:
    """A decoder of Wan 2.1's latents in float32 on the CPU, for inference.

    Args:
        kind: `wan-vae`, the VAE that the latents come from, or `taehv`, the tiny decoder taew2_1 that
            comes close to it for about a hundredth of the work.
        path: the weights. wan-vae: a diffusers folder (or one with the subfolder `vae`), a .safetensors
            file in diffusers' naming, or `Wan2.1_VAE.pth`. taehv: `taew2_1.pth` or .safetensors.
            None: weights drawn at random.
        seed: of the random weights.

    Raises:
        InputError: there is no such kind, the file cannot be read, or a tensor is missing, unexpected
            or wrongly shaped (all are listed).
        MissingExtraError: wan-vae without diffusers.
    """
    if kind == "wan-vae":
        if find_spec("diffusers") is None:
            raise MissingExtraError("diffusers", "models")
        # Imported where it is wanted: diffusers takes seconds to import, and taehv does without.
        from forcingkv.models.decoders.wan_vae_files import load_wan_vae, random_wan_vae

        return random_wan_vae(seed=seed) if path is None else load_wan_vae(path)
    if kind == "taehv":
        from forcingkv.models.decoders.taehv import load_taehv, random_taehv

        return random_taehv(seed=seed) if path is None else load_taehv(path)
    raise InputError(f"there is no decoder {kind!r}", where="decoder", expected=" or ".join(KINDS))
