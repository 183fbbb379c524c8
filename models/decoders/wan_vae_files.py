"""Where a Wan VAE decoder's weights come from: the three published layouts, or chance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from forcingkv.headmaps.errors import InputError
from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from forcingkv.models.fit import check_fit
from forcingkv.models.tensor_files import open_tensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
WAN_NAMES = ("decoder.middle.", "decoder.upsamples.")
"""How names start that only files in Wan's own naming have."""

PARTS = ("decoder.", "post_quant_conv.")
"""What of an autoencoder the decoder is made of."""


def random_wan_vae(seed: int = 0, config: Mapping[str, Any] | None = None) -> WanVaeDecoder:
    """The decoder with weights drawn at random. `config`: fields that differ from Wan 2.1's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _for_inference(WanVaeDecoder(AutoencoderKLWan(**(config or {}))))


def load_wan_vae(path: Path, config: Mapping[str, Any] | None = None) -> WanVaeDecoder:
    """Read a VAE; the encoder in it is checked and left aside.

    Args:
        path: a diffusers folder, or one with the subfolder `vae`: config and weights. Or one file, in
            diffusers' naming or Wan's own (`Wan2.1_VAE.pth`), told apart by the names in it.
        config: of a single file, the fields that differ from Wan 2.1's.

    Raises:
        InputError: a file cannot be read, the config is not of a VAE of Wan 2.1's kind, or a tensor is
            missing, unexpected or wrongly shaped.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        vae, weights = _from_config(folder / CONFIG), folder / WEIGHTS
    else:
        vae, weights = _empty(dict(config or {}), str(path)), path
    files = open_tensors(weights)
    names = {name: name for name in files.shapes}
    if any(name.startswith(WAN_NAMES) for name in names):
        names = convert_wan_vae_to_diffusers(names)
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    wanted = {name: shape for name, shape in shapes.items() if name.startswith(PARTS)}
    check_fit(
        {name: files.shapes[stored] for name, stored in names.items()},
        wanted,
        optional=shapes,
        where=str(weights),
        what="the Wan 2.1 VAE (names as in diffusers)",
    )
    read = {name: files.read(names[name]).to(torch.float32, copy=True) for name in wanted}
    decoder = WanVaeDecoder(vae)
    decoder.load_state_dict({**dict(decoder.named_buffers()), **read}, assign=True)
    return _for_inference(decoder)


def _from_config(path: Path) -> AutoencoderKLWan:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            "is not there", where=str(path), expected=f"a diffusers VAE: {CONFIG} and {WEIGHTS}"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path), expected="JSON") from error
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != AutoencoderKLWan.__name__:
        raise InputError(
            f"describes {kind or 'no model'}", where=str(path), expected=AutoencoderKLWan.__name__
        )
    return _empty({name: v for name, v in content.items() if not name.startswith("_")}, str(path))


def _empty(config: dict[str, Any], where: str) -> AutoencoderKLWan:
    """The autoencoder without storage, once it is sure that it is one this decoder knows."""
    try:
        with torch.device("meta"):
            vae = AutoencoderKLWan(**config)
        found = vae.config
        faults = {
            "is_residual": found.is_residual,
            "patch_size": found.patch_size is not None,
            "out_channels": found.out_channels != 3,
            "latents_mean": len(found.latents_mean) != found.z_dim,
            "latents_std": len(found.latents_std) != found.z_dim,
        }
        mean_std = [float(value) for value in (*found.latents_mean, *found.latents_std)]
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(
            f"makes no {AutoencoderKLWan.__name__} ({error})",
            where=where,
            hint="A field that is not known may need a newer diffusers.",
        ) from error
    if not all(map(math.isfinite, mean_std)):
        raise InputError("latents_mean or latents_std is not finite", where=where)
    wrong = [f"{name} = {getattr(found, name)!r}" for name, fault in faults.items() if fault]
    if wrong:
        raise InputError(
            f"is not of Wan 2.1's kind: {', '.join(wrong)}",
            where=where,
            hint="Take the VAE of Wan 2.1. That of Wan 2.2's 5B model is another.",
        )
    return vae


def _for_inference(decoder: WanVaeDecoder) -> WanVaeDecoder:
    return decoder.eval().requires_grad_(False)
