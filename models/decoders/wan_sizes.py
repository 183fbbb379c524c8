"""Sizes of a Wan VAE, from the names and shapes of its tensors in diffusers' naming."""

from __future__ import annotations

import math
import re
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.models.tensor_files import Shapes

MOST_SIZE, MOST_BLOCKS = 1 << 14, 64
"""Of a number in a configuration, and of layers or entries of a list."""
COLOURS = 3


def sizes_of_vae(shapes: Shapes, where: str) -> dict[str, Any]:
    """What an `AutoencoderKLWan` with tensors of those shapes is made with, by its decoder.

    Whether all are there, and of the shapes that follow, is not checked. Raises InputError where they are of
    no such model; `where` is their file.
    """
    stages = _count(shapes, r"decoder\.up_blocks\.(\d{1,4})\.", where)
    blocks = _count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d{1,4})\.", where)
    widths = [
        _size(shapes, f"decoder.up_blocks.{stage}.resnets.0.conv1.weight", where) for stage in range(stages)
    ]
    residual = any(name.startswith("decoder.up_blocks.0.upsampler.") for name in shapes)
    upsampler = "upsampler" if residual else "upsamplers.0"
    longer = [
        f"decoder.up_blocks.{stage}.{upsampler}.time_conv.weight" in shapes for stage in range(stages - 1)
    ]
    encoder = "encoder.conv_in.weight"
    return _config(
        widths[::-1],
        where,
        base=_size(shapes, encoder, where) if encoder in shapes else widths[-1],
        channels=_size(shapes, "post_quant_conv.weight", where),
        blocks=blocks - 1,
        shorter=longer[::-1],
        residual=residual,
        pixels=_size(shapes, "decoder.conv_out.weight", where),
    )


def sizes_of_encoder(shapes: Shapes, where: str) -> dict[str, Any]:
    """As `sizes_of_vae`, by the encoder."""
    layers = _count(shapes, r"encoder\.down_blocks\.(\d{1,4})\.", where)
    residual = any(name.startswith("encoder.down_blocks.0.resnets.") for name in shapes)
    if residual:  # a layer is a stage
        first = [f"encoder.down_blocks.{stage}.resnets.0.conv1.weight" for stage in range(layers)]
        blocks = _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d{1,4})\.", where)
        halving = [f"encoder.down_blocks.{stage}.downsampler." for stage in range(layers - 1)]
    else:  # the layers of all stages in one row, each stage but the last ended by its resampling
        ends = [n for n in range(layers) if f"encoder.down_blocks.{n}.resample.1.weight" in shapes]
        begins = [0, *(end + 1 for end in ends)]
        first = [f"encoder.down_blocks.{begin}.conv1.weight" for begin in begins]
        blocks = ends[0] if ends else layers
        halving = [f"encoder.down_blocks.{end}." for end in ends]
    widths = [_size(shapes, name, where) for name in first]
    return _config(
        widths,
        where,
        base=_size(shapes, "encoder.conv_in.weight", where),
        channels=_size(shapes, "quant_conv.weight", where) // 2,
        blocks=blocks,
        shorter=[f"{name}time_conv.weight" in shapes for name in halving],
        residual=residual,
        pixels=_size(shapes, "encoder.conv_in.weight", where, axis=1),
    )


def _config(
    widths: list[int],
    where: str,
    *,
    base: int,
    channels: int,
    blocks: int,
    shorter: list[bool],
    residual: bool,
    pixels: int,
) -> dict[str, Any]:
    """`widths` are those of the stages, from the one of most pixels on."""
    width, patch = widths[0], math.isqrt(pixels // COLOURS)
    if any(one % width for one in widths) or patch * patch * COLOURS != pixels or not patch:
        what = f"is no Wan VAE: its stages have {widths} channels, and a pixel {pixels}"
        expected = f"multiples of the first, and {COLOURS} for each of a square of pixels"
        raise InputError(what, where=where, expected=expected)
    return {
        "base_dim": base,
        "decoder_base_dim": width,
        "z_dim": max(1, channels),
        "dim_mult": [one // width for one in widths],
        "num_res_blocks": max(1, blocks),
        "temperal_downsample": shorter,
        "is_residual": residual,
        "in_channels": pixels,
        "out_channels": pixels,
        "patch_size": patch if patch > 1 else None,
    }


def _size(shapes: Shapes, name: str, where: str, axis: int = 0) -> int:
    shape = shapes.get(name, ())
    if len(shape) <= axis or not 0 < shape[axis] <= MOST_SIZE:
        what = f"is no Wan VAE: its {name} is {shape or 'missing'}"
        raise InputError(what, where=where, expected=f"sizes from 1 to {MOST_SIZE}")
    return shape[axis]


def _count(shapes: Shapes, pattern: str, where: str) -> int:
    """How many layers have a number by that pattern."""
    numbers = (re.match(pattern, name) for name in shapes)
    count = 1 + max((int(match[1]) for match in numbers if match), default=0)
    if count > MOST_BLOCKS:
        raise InputError(f"has {count} layers in a row", where=where, expected=f"at most {MOST_BLOCKS}")
    return count
