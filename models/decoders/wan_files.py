"""Files of Wan's VAEs: which autoencoder they hold, and its decoder or encoder filled from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.reading import read_json
from forcingkv.models.decoders.latents import WAN21, WAN22, Scale, scale_of
from forcingkv.models.decoders.names import check_tensors, is_decoder, without_prefix
from forcingkv.models.decoders.wan_names import in_diffusers_names
from forcingkv.models.decoders.wan_sizes import (
    COLOURS,
    MOST_BLOCKS,
    MOST_SIZE,
    sizes_of_encoder,
    sizes_of_vae,
)
from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from forcingkv.models.encoders.wan_vae import WanVaeEncoder
from forcingkv.models.tensor_files import Shapes, TensorFiles, open_tensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
WAN_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
"""In Wan's own folders."""
NAME = AutoencoderKLWan.__name__

PUBLISHED: Mapping[int, Mapping[str, Any]] = {
    len(WAN21.mean): {},  # what diffusers has where nothing is said
    len(WAN22.mean): {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": len(WAN22.mean),
        "latents_mean": WAN22.mean,
        "latents_std": WAN22.std,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
}
"""Number of latent channels -> what the autoencoder of Wan 2.1, or 2.2, is made with."""


def random_wan_vae(channels: int) -> WanVaeDecoder:
    """The published VAE for latents of so many channels, Wan 2.1's where none has so many, with weights
    drawn at random."""
    return WanVaeDecoder(AutoencoderKLWan(**PUBLISHED.get(channels, {})))


def random_wan_encoder(channels: int) -> WanVaeEncoder:
    """The encoder of `random_wan_vae`."""
    return WanVaeEncoder(AutoencoderKLWan(**PUBLISHED.get(channels, {})))


def load_wan_vae(path: Path, config: Mapping[str, Any] | None = None) -> WanVaeDecoder:
    """Read the decoder of a VAE of Wan 2.1 or 2.2; the encoder in it is checked and left aside.

    Arguments and errors as those of `load_wan_encoder`; the file may have no encoder.
    """
    vae, files, names, what, whole = _opened(path, config)
    return WanVaeDecoder(vae).fill(files, names, what, whole)


def load_wan_encoder(path: Path, config: Mapping[str, Any] | None = None) -> WanVaeEncoder:
    """Read the encoder of a VAE of Wan 2.1 or 2.2; the decoder in it is checked and left aside.

    Args:
        path: a diffusers folder, or one with the subfolder `vae`: config and weights. Or Wan's folder, with
            `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`. Or one file, in the naming of diffusers or of Wan, which its
            names tell; its sizes are those of its tensors, and mean and deviation of its latents follow from
            the number of their channels.
        config: of a single file, fields of diffusers' `AutoencoderKLWan` that differ from those.

    Raises InputError where a file cannot be read, the config is not of a VAE of Wan's, the mean of its
    latents is not known, or a tensor is missing, unexpected or wrongly shaped.
    """
    vae, files, names, what, whole = _opened(path, config)
    return WanVaeEncoder(vae).fill(files, names, what, whole)


def _opened(
    path: Path, config: Mapping[str, Any] | None
) -> tuple[AutoencoderKLWan, TensorFiles, dict[str, str], str, Shapes]:
    """The autoencoder of a file without contents, and what `StreamingModule.fill` takes."""
    weights, described = _place(path)
    said = None if described is None else _read_config(described)
    files = open_tensors(weights, is_decoder)
    names = without_prefix(files.shapes)
    check_tensors("wan-vae", names, str(weights))
    names = in_diffusers_names(names, str(weights))
    if said is None:
        shapes = {name: files.shapes[held] for name, held in names.items()}
        sizes = sizes_of_vae(shapes, str(weights))
        given = dict(config or {})
        if not {"latents_mean", "latents_std"} <= given.keys():
            sizes |= _as_fields(scale_of(sizes["z_dim"], str(weights)))
        said = sizes | given
    vae = _empty(said, str(described or weights))
    whole = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    return vae, files, names, "the Wan VAE (names as in diffusers)", whole


def empty_wan_vae(shapes: Shapes, where: str) -> WanVaeDecoder:
    """A decoder without contents for tensors of those names and shapes, as `WanVaeDecoder` has them.

    Raises InputError, naming their file `where`, where they are no VAE's.
    """
    return WanVaeDecoder(_stored(sizes_of_vae(shapes, where), where))


def empty_wan_encoder(shapes: Shapes, where: str) -> WanVaeEncoder:
    """An encoder without contents for tensors as `WanVaeEncoder` has them. Raises as `empty_wan_vae`."""
    return WanVaeEncoder(_stored(sizes_of_encoder(shapes, where), where))


def _stored(sizes: dict[str, Any], where: str) -> AutoencoderKLWan:
    """Of a bundle, which has mean and deviation beside the weights."""
    channels = sizes["z_dim"]
    return _empty(sizes | _as_fields(Scale((0.0,) * channels, (1.0,) * channels)), where)


def _as_fields(scale: Scale) -> dict[str, Any]:
    return {"latents_mean": scale.mean, "latents_std": scale.std}


def _place(path: Path) -> tuple[Path, Path | None]:
    """Where the weights lie, and where the config that describes them; None: nowhere."""
    if not path.is_dir():
        return path, None
    in_wans = [path / name for name in WAN_VAES if (path / name).is_file()]
    if len(in_wans) > 1:
        what, expected = f"holds {' and '.join(WAN_VAES)}", "the one that is meant"
        raise InputError(what, where=str(path), expected=expected)
    if in_wans:
        return in_wans[0], None
    folder = path / "vae" if (path / "vae").is_dir() else path
    return folder / WEIGHTS, folder / CONFIG


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        expected = f"a diffusers VAE: {CONFIG} and {WEIGHTS}"
        raise InputError("is not there", where=str(path), expected=expected)
    content = read_json(path, marked=True)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != NAME:
        raise InputError(f"describes {kind or 'no model'}", where=str(path), expected=NAME)
    # clip_output: whether diffusers bounds the pixels; frames are bounded here either way.
    return {name: v for name, v in content.items() if not name.startswith("_") and name != "clip_output"}


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no autoencoder has: one of 10^9 layers would take hours to find wrong."""
    for name, value in config.items():
        values = value if isinstance(value, list | tuple) else [value]
        most = MOST_BLOCKS if "num" in name else MOST_SIZE
        numbers = [one for one in values if isinstance(one, int | float)]
        if len(values) > MOST_BLOCKS or any(abs(number) > most for number in numbers):
            expected = f"numbers up to {most}, {MOST_BLOCKS} of them at most"
            raise InputError(f"{name} is {shown(value)}", where=where, expected=expected)


def _empty(config: dict[str, Any], where: str) -> AutoencoderKLWan:
    """The autoencoder without storage, once it is sure that it is one this decoder knows."""
    _check_sizes(config, where)
    try:
        with torch.device("meta"):
            vae = AutoencoderKLWan(**config)
        found = vae.config
        patch = found.patch_size or 1
        faults = {
            "patch_size": not isinstance(patch, int) or not 1 <= patch <= MOST_BLOCKS,
            "in_channels": found.in_channels != COLOURS * patch**2,
            "out_channels": found.out_channels != COLOURS * patch**2,
            "latents_mean": len(found.latents_mean) != found.z_dim,
            "latents_std": len(found.latents_std) != found.z_dim,
        }
        mean_std = [float(value) for value in (*found.latents_mean, *found.latents_std)]
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError, AssertionError) as error:
        what, hint = f"does not describe an {NAME} ({error})", "An unknown field may need a newer diffusers."
        raise InputError(what, where=where, hint=hint) from error
    if not all(map(math.isfinite, mean_std)):
        raise InputError("latents_mean or latents_std is not finite", where=where)
    wrong = [f"{name} = {getattr(found, name)!r}" for name, fault in faults.items() if fault]
    if wrong:
        hint = "Take the VAE of Wan 2.1 or of Wan 2.2's 5B model."
        raise InputError(f"is not of Wan's kind: {', '.join(wrong)}", where=where, hint=hint)
    return vae
