"""Which decoder a model is exported with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders import KINDS, StreamingDecoder, load_decoder
from forcingkv.runtime.spec import Decoder, ModelSpec


def decoder_for(
    spec: ModelSpec, kind: str | None, path: Path | None, *, random: bool = False
) -> tuple[ModelSpec, StreamingDecoder | None]:
    """The decoder of a model, and its spec with that decoder; None for latents that are pixels.

    Args:
        spec: the model.
        kind: one of `KINDS`; None: the model's own.
        path: the decoder's weights.
        random: draw them at random where no path is given.

    Raises:
        InputError: the model needs no decoder, or its weights are not given, cannot be read, or are
            for latents of another shape.
    """
    if spec.decoder.kind == "pixels":
        if kind or path:
            raise InputError(f"the latents of {spec.name} are pixels: it needs no decoder", where="decoder")
        return spec, None
    kind = kind or spec.decoder.kind
    if kind not in KINDS:
        raise InputError(f"there is no decoder {kind!r}", where="decoder", expected=" or ".join(KINDS))
    if path is None and not random:
        raise InputError(
            f"the weights of the decoder {kind} are not given",
            where="decoder",
            hint="Name them: --vae Wan2.1_VAE.pth, or --decoder taehv --vae taew2_1.pth.",
        )
    decoder = load_decoder(kind, path)
    name = next(known for known in KINDS if known == kind)
    own = Decoder(name, decoder.spatial_stride, decoder.temporal_stride)
    if (
        replace(own, kind=spec.decoder.kind) != spec.decoder
        or decoder.latent_channels != spec.latent_channels
    ):
        raise InputError(
            f"decodes {decoder.latent_channels} channels at strides {own.temporal_stride},"
            f" {own.spatial_stride}",
            where=str(path or kind),
            expected=f"{spec.latent_channels} channels at strides {spec.decoder.temporal_stride},"
            f" {spec.decoder.spatial_stride}, as {spec.name} has them",
        )
    return replace(spec, decoder=own), decoder
