"""Names of the tensors of Wan's VAE files as diffusers has them: `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`.

Wan 2.1 numbers the layers of all stages in one row; Wan 2.2 has a row of layers in each stage. How many
layers a stage has follows from where the resampling layers stand, which end each stage but the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from forcingkv.headmaps.errors import InputError

T = TypeVar("T")

WAN_NAMES = ("decoder.middle.", "decoder.upsamples.", "encoder.middle.", "encoder.downsamples.")
"""How names start that only files in Wan's own naming have."""

_PARTS = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^((?:en|de)coder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
_NESTED = re.compile(r"^((?:en|de)coder)\.(down|up)samples\.(\d{1,4})\.\2samples\.(\d{1,4})\.(.*)")
_FLAT_UP = re.compile(r"^decoder\.upsamples\.(\d{1,4})\.(.*)")
_RESAMPLING = re.compile(r"(resample|time_conv)\.")


def in_diffusers_names(names: Mapping[str, T], where: str) -> dict[str, T]:
    """The same under the names of diffusers' `AutoencoderKLWan`; names that are diffusers' already stay.

    Raises InputError, naming the file `where`, for two tensors that would have one name.
    """
    if not any(name.startswith(WAN_NAMES) for name in names):
        return dict(names)
    ends = _stage_ends(names)
    found: dict[str, T] = {}
    for name, value in names.items():
        new = _renamed(name, ends)
        if new in found:
            raise InputError(f"holds two tensors that are both {new}", where=where)
        found[new] = value
    return found


def _stage_ends(names: Iterable[str]) -> list[int]:
    """Numbers of the decoder's resampling layers, in a file that numbers the layers in one row."""
    layers = (_FLAT_UP.match(name) for name in names)
    return sorted({int(match[1]) for match in layers if match and _RESAMPLING.match(match[2])})


def _renamed(name: str, ends: list[int]) -> str:
    for pattern, place in _PARTS:
        name = re.sub(pattern, place, name)
    if nested := _NESTED.match(name):
        half, way, stage, layer, rest = nested.groups()
        inside = f"{way}sampler" if _RESAMPLING.match(rest) else f"resnets.{layer}"
        return f"{half}.{way}_blocks.{stage}.{inside}.{rest}"
    if flat := _FLAT_UP.match(name):
        layer, rest = int(flat[1]), flat[2]
        stage = sum(end < layer for end in ends)
        inside = (
            "upsamplers.0" if layer in ends else f"resnets.{layer - (ends[stage - 1] + 1 if stage else 0)}"
        )
        return f"decoder.up_blocks.{stage}.{inside}.{rest}"
    return name.replace("encoder.downsamples.", "encoder.down_blocks.")
