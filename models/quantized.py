"""Weights in 8-bit floats with a scale beside them, as ComfyUI and LightX2V store them.

They are read as what they mean: the 8-bit numbers times their scale, one for the whole matrix or one a row.
Beside `layer.weight` the scale is `layer.scale_weight` (ComfyUI until 2025, with a tensor `scaled_fp8`) or
`layer.weight_scale` (ComfyUI since, with `layer.comfy_quant`; LightX2V). Scales of the input say how
activations may be rounded where the GPU multiplies in 8 bits, and change nothing about the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.tensor_files import TensorFiles, listed
from forcingkv.runtime.dtypes import STORED_AS
from forcingkv.runtime.tensors import read_header

EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
SCALES = (".scale_weight", ".weight_scale")
MARK = "scaled_fp8"
NOTE = "_quantization_metadata"
_SCALED = re.compile("(?<!un)scaled")
ASIDE = (".scale_input", ".input_scale", ".comfy_quant")
"""Endings of what stands beside a scaled weight and is not needed."""


def stored_dtypes(files: TensorFiles) -> dict[str, str]:
    """The dtype of each tensor in the files, as `runtime.dtypes` names it. Reads no contents."""
    found: dict[str, str] = {}
    for path in files.files:
        if path.suffix == ".safetensors":
            found |= {name: STORED_AS[tensor.dtype].name for name, tensor in read_header(path)[0].items()}
    rest = [name for name in files.shapes if name not in found]  # of torch files, which are mapped
    return found | {name: str(files.read(name).dtype).removeprefix("torch.") for name in rest}


def dequantised(files: TensorFiles) -> tuple[TensorFiles, dict[str, str]]:
    """The weights that the files mean, and the dtype in which each is stored.

    Scales and marks are no longer among them. A weight with a scale is read as float32, the product of both;
    all others as they are stored, 8-bit floats of a file without scales among them.

    Raises InputError, naming the tensors, where a scale has no weight in 8-bit floats or is of a form that is
    not known, where a file with scales has weights in 8-bit floats without one, or says that it is scaled and
    has no scales, and for layers that are quantised in another way.
    """
    dtypes, scales = stored_dtypes(files), _scales(files)
    marks = {name for name in files.shapes if name.split(".")[-1] == MARK}
    aside = {name for name in files.shapes if name.endswith(ASIDE)}
    weights = [name for name in files.shapes if name not in {*scales.values(), *marks, *aside}]
    eight = {name for name in weights if dtypes[name] in EIGHT_BITS}
    scaled = bool(scales or marks or aside or any(map(_says_scaled, files.files)))
    faults = [f"{name} has no scale" for name in sorted(eight - scales.keys())] if scaled else []
    faults += [f"the scale of {name} belongs to no 8-bit float" for name in sorted(scales.keys() - eight)]
    faults += [f"{name} is of another way to quantise" for name in sorted(aside) if not _known(files, name)]
    factors: dict[str, Tensor] = {}
    for name in sorted(scales.keys() & eight):
        factor = _factor(files, name, scales[name])
        if factor is None:
            faults.append(f"the scale of {name} is {files.shapes[scales[name]]}, or not a positive number")
        else:
            factors[name] = factor
    if faults:
        what = f"is quantised in a way that is not known: {listed(faults)}"
        expected = "8-bit floats, each with one scale or one a row"
        hint = "Take the file in bfloat16 or float16."
        raise InputError(what, where=str(files.where), expected=expected, hint=hint)

    def read(name: str) -> Tensor:
        tensor = files.read(name)
        return tensor.to(torch.float32) * factors[name] if name in factors else tensor

    kept = replace(files, shapes={name: files.shapes[name] for name in weights}, read=read)
    return kept, {name: dtypes[name] for name in weights}


def _says_scaled(path: Path) -> bool:
    """Whether a file says that its 8-bit floats have scales: by its name, or ComfyUI's note in its header."""
    header = read_header(path)[1] if path.suffix == ".safetensors" else {}
    return bool(_SCALED.search(path.name.lower())) or NOTE in header


def _scales(files: TensorFiles) -> Mapping[str, str]:
    """Weight -> its scale. Raises InputError where a weight has two."""
    found: dict[str, str] = {}
    for name in files.shapes:
        for ending in SCALES:
            if name.endswith(ending):
                weight = name.removesuffix(ending) + ".weight"
                if weight in found:
                    what = f"has two scales of {weight}: {found[weight]} and {name}"
                    raise InputError(what, where=str(files.where), expected="one")
                found[weight] = name
    return found


def _factor(files: TensorFiles, weight: str, scale: str) -> Tensor | None:
    """What the rows of a weight are multiplied with, (), or (rows, 1); None for a scale of another form."""
    shape = files.shapes[weight]
    factor = files.read(scale)
    if not factor.is_floating_point():
        return None
    factor = factor.to(torch.float32)
    if not bool((factor.isfinite() & (factor > 0)).all()):
        return None
    if factor.numel() == 1:
        return factor.reshape(())
    rows = shape[0] if len(shape) == 2 else 0
    return factor.reshape(-1, 1) if tuple(factor.shape) in ((rows,), (rows, 1)) else None


def _known(files: TensorFiles, name: str) -> bool:
    """Whether what stands beside a weight is of scaled 8-bit floats."""
    if not name.endswith(".comfy_quant"):
        return True
    try:
        said = json.loads(bytes(files.read(name).to(torch.uint8).flatten().tolist()))
        return said["format"] in EIGHT_BITS and said.keys() <= {"format", "full_precision_matrix_mult"}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return False
