"""Weights in 8-bit floats with scales beside them, as ComfyUI, LightX2V and others store them.

They are read as what they mean: the 8-bit numbers times their scale. Beside `layer.weight` the scale is
`layer.scale_weight` (ComfyUI until 2025, with a tensor `scaled_fp8`) or `layer.weight_scale` (ComfyUI since,
with `layer.comfy_quant` or the same as metadata; LightX2V). Scales of the input say how activations may be
rounded where the GPU multiplies in 8 bits, and change nothing about the weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forcingkv.headmaps.reading import parse_json
from forcingkv.models.naming import bare
from forcingkv.models.tensor_files import FLOATS, TensorFiles

EIGHT_BITS = frozenset(kind for kind in FLOATS if kind.startswith("float8"))

HINT = (
    "Scales are read of weights in 8-bit floats: one for each, one a row, or one a row and block of columns."
    " Take the file in bfloat16 or float16."
)
"""What to do about `Scaled.faults`."""

_MARK, _NOTE, _NOTES = "scaled_fp8", "comfy_quant", "_quantization_metadata"
"""How ComfyUI says that a file is scaled: a tensor, a tensor for each module, or metadata."""

_NOTED = {"float8_e4m3fn", "float8_e5m2"}
"""Formats of such notes that are a weight in 8-bit floats times a scale."""

_CALLED_SO = re.compile("(?<!un)(?<!up)(?<!re)(?<!down)scaled")
_SCALE = re.compile(r"\.(scale_weight|weight_scale)$")
_BESIDE = re.compile(rf"{_SCALE.pattern}|\.(scale_input|input_scale|{_NOTE})$")


@dataclass(frozen=True)
class Scaled:
    """Files of which some weights may have a scale."""

    stored: TensorFiles
    """All that is in them."""
    weights: TensorFiles
    """The same without scales, marks and notes. `dtypes` are those stored; a weight with a scale is read as
    the product of both in float32, other 8-bit floats in bfloat16, which holds them exactly."""
    beside: Mapping[str, Sequence[str]]
    """Weight -> the tensors that stand beside it: its scales, scales of its input, notes."""
    marks: Sequence[str]
    """Tensors and metadata which say that the files are scaled."""

    def scaled(self, weights: Collection[str]) -> int:
        """How many of those have a scale."""
        return sum(any(map(_SCALE.search, self.beside.get(name, ()))) for name in weights)

    def left_out(self, weights: Collection[str]) -> list[str]:
        """What stands beside those and is not needed, as kinds of names."""
        names = [name for weight in weights for name in self.beside.get(weight, ())]
        return [*self.marks, *(f"*.{name.rpartition('.')[2]}" for name in names if not _SCALE.search(name))]

    def faults(self, weights: Collection[str]) -> list[str]:
        """What is wrong with how those are stored, each fault a sentence that names its tensor.

        Files are scaled where they, their names or what stands beside one of `weights` say so; then each of
        `weights` that is in 8-bit floats needs a scale.
        """
        why = ""
        if any(_CALLED_SO.search(path.name.lower()) for path in self.stored.files):
            why = "the name of the file says that it is scaled"
        if self.marks or any(name in self.beside for name in weights):
            why = "the file is one of scaled weights"
        faults = [fault for name in weights for fault in self._faults(name, why)]
        if _NOTES in self.stored.metadata:
            fault = _misread(self.stored.metadata[_NOTES].encode())
            faults += [f"metadata {_NOTES} {fault}"] if fault else []
        return faults

    def _faults(self, weight: str, why_scaled: str) -> Iterator[str]:
        stored, beside = self.stored, self.beside.get(weight, ())
        for name in beside:
            if name.endswith(f".{_NOTE}"):
                is_text = stored.dtypes[name] == "uint8"
                fault = _misread(bytes(stored.read(name).flatten().tolist()) if is_text else b"")
                yield from [f"{name} {fault}"] if fault else []
        scales = [name for name in beside if _SCALE.search(name)]
        if not scales:
            if why_scaled and stored.dtypes[weight] in EIGHT_BITS:
                yield f"missing the scale of {weight}: {why_scaled}"
        elif len(scales) > 1:
            yield f"{' and '.join(scales)} are both the scale of {weight}"
        elif stored.dtypes[weight] not in EIGHT_BITS:
            yield f"{scales[0]} is a scale, and {weight} is stored as {stored.dtypes[weight]}"
        else:
            yield from _faults_of(stored, scales[0], stored.shapes[weight])


def find_scales(files: TensorFiles) -> Scaled:
    """Tell weights from what stands beside them. A scale without a weight counts as a weight of its own."""
    by_name = {bare(name): name for name in files.shapes}
    beside: dict[str, list[str]] = {}
    marks = [name for name in files.shapes if name.split(".")[-1] == _MARK]
    aside = set(marks)
    for name in files.shapes:
        weight, found = _BESIDE.subn(".weight", name)
        weight = weight if weight in files.shapes else by_name.get(bare(weight), "")
        if found and weight:
            beside.setdefault(weight, []).append(name)
            aside.add(name)

    def read(name: str) -> Tensor:
        tensor = files.read(name)
        scale = next(filter(_SCALE.search, beside.get(name, ())), None)
        if scale:
            return _product(tensor.float(), files.read(scale).float())
        return tensor.to(torch.bfloat16) if files.dtypes[name] in EIGHT_BITS else tensor

    shapes = {name: shape for name, shape in files.shapes.items() if name not in aside}
    said = ["metadata on scales"] if _NOTES in files.metadata else []
    return Scaled(files, replace(files, shapes=shapes, read=read), beside, [_MARK] * len(marks) + said)


def _product(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight (out, ...) times its scale: (), (out), (out, 1), or (out, blocks, 1) for blocks of columns."""
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.dim() == 3:
        return (weight.reshape(*scale.shape[:2], -1) * scale).reshape(weight.shape)
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


def _faults_of(files: TensorFiles, scale: str, weight: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with a scale of a weight of that shape. Reads it."""
    shape = files.shapes[scale]
    if not _fits(shape, weight):
        yield f"{scale} is {shape}, which is no known scale of {weight}"
    elif files.dtypes[scale] not in FLOATS:
        yield f"{scale} is stored as {files.dtypes[scale]}, which is no known scale"
    else:
        factor = files.read(scale).float()
        if not bool(torch.isfinite(factor).all()):
            yield f"{scale} is not finite"
        elif not bool((factor > 0).all()):
            yield f"{scale} is not positive"


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether `_product` knows what a scale of that shape means."""
    if all(size == 1 for size in scale):
        return True
    by_row = all(size == 1 for size in scale[1:])
    by_block = len(scale) == 3 and len(weight) == 2 and scale[2] == 1 and scale[1] > 0
    return scale[:1] == weight[:1] and (by_row or (by_block and weight[1] % scale[1] == 0))


def _misread(text: bytes) -> str:
    """What a note of ComfyUI says but that weights are in 8-bit floats with scales; empty if nothing."""
    try:
        note = parse_json(text, "note")
        notes = note["layers"].values() if "layers" in note else [note]
        formats = {str(one["format"]) for one in notes}
        more = {name for one in notes for name in one} - {"format", "full_precision_matrix_mult"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is not a note on how weights are stored"
    said = ", ".join(sorted((formats - _NOTED) | more))
    return f"describes weights stored as {said}" if said else ""
