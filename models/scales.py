"""Weights in FP8 with scales, as ComfyUI and others store them: what is read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.tensor_files import FLOATS, TensorFiles

SCALES = ("scale_weight", "weight_scale")
"""What a weight in FP8 has to be multiplied by: of ComfyUI's older files and of its newer ones."""

MARK, NOTE, NOTES = "scaled_fp8", "comfy_quant", "_quantization_metadata"
"""How ComfyUI says that a file is scaled: a tensor, a tensor for each module, or metadata."""

NOTED = {"float8_e4m3fn", "float8_e5m2"}
"""Formats of such notes that are a weight in FP8 times a scale."""


def dequantized(weight: Tensor, scale: Tensor, where: str) -> Tensor:
    """A weight (out, ...) times its scale, float32. Raises InputError for a scale that is no number.

    The scale is one number, one for each row (out) or (out, 1), or one for each row and block of columns
    (out, blocks, 1).
    """
    factor = scale.float()
    if not bool(torch.isfinite(factor).all()):
        raise InputError("is not finite", where=where)
    exact = weight.float()
    if factor.numel() == 1:
        return exact * factor.reshape(())
    if factor.dim() == 3:
        return (exact.reshape(*factor.shape[:2], -1) * factor).reshape(weight.shape)
    return exact * factor.reshape(-1, *[1] * (weight.dim() - 1))


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether `dequantized` knows what a scale of that shape means."""
    if all(size == 1 for size in scale):
        return True
    by_block = len(scale) == 3 and len(weight) == 2 and scale[2] == 1 and weight[1] % scale[1] == 0
    return scale[:1] == weight[:1] and (by_block or all(size == 1 for size in scale[1:]))


def scale_faults(files: TensorFiles, scales: Mapping[str, str], weights: Collection[str]) -> list[str]:
    """What is wrong with scales: those of unknown shape or dtype, and weights that lack theirs.

    `scales`: weight -> its scale; `weights`: all that the model takes; both by their names in the file.
    """
    faults = []
    for weight, scale in scales.items():
        shape, of = files.shapes[scale], files.shapes[weight]
        if not _fits(shape, of):
            faults.append(f"{scale} is {shape}, which is no known scale of {of}")
        elif files.dtypes[scale] not in FLOATS:
            faults.append(f"{scale} is stored as {files.dtypes[scale]}, which is no known scale")
    marked = any(name.split(".")[-1] == MARK for name in files.shapes) or NOTES in files.metadata
    for name in weights if scales or marked else ():
        eight_bits = files.dtypes[name].startswith("float8") and len(files.shapes[name]) == 2
        if eight_bits and name not in scales:
            faults.append(f"missing the scale of {name}: the file is one of scaled weights")
    return faults


def check_metadata(files: TensorFiles) -> bool:
    """Whether metadata say how weights are stored. Raises InputError for a way that is not read."""
    if NOTES in files.metadata:
        check_note(files.metadata[NOTES].encode(), f"{files.where}: metadata {NOTES}")
    return NOTES in files.metadata


def check_note(text: bytes, where: str) -> None:
    """Raise InputError unless a note of ComfyUI says that weights are in FP8 with scales, and no more."""
    expected = f"weights in {' or '.join(sorted(NOTED))} with scales"
    try:
        note = json.loads(text)
        notes = note["layers"].values() if "layers" in note else [note]
        formats = {str(one["format"]) for one in notes}
        more = {name for one in notes for name in one} - {"format", "full_precision_matrix_mult"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("is not a note on how weights are stored", where=where, expected=expected) from error
    if formats - NOTED or more:
        said = ", ".join(sorted((formats - NOTED) | more))
        raise InputError(f"describes weights stored as {said}", where=where, expected=expected)
