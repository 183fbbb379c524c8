"""A LoRA of PEFT, merged into the weights it was trained on, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.fit import listed
from forcingkv.models.naming import wan_names
from forcingkv.models.tensor_files import TensorFiles

KEY = "generator_lora"
"""Entry of a `.pt` file that LongLive keeps its LoRA under."""

_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of some weights."""

    files: TensorFiles
    pairs: Mapping[str, tuple[str, str]]
    """Wan name of a weight -> names in the file of A (rank, in) and B (out, rank)."""
    alpha: float | None
    """None: equal to the rank, so that updates are not scaled."""

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight plus alpha / rank * B A, computed in float32, in the weight's dtype."""
        if name not in self.pairs:
            return weight
        a, b = (self.files.read(part).float() for part in self.pairs[name])
        scale = 1.0 if self.alpha is None else self.alpha / a.shape[0]
        return (weight.float() + scale * (b @ a)).to(weight.dtype)


def read_lora(files: TensorFiles, shapes: Mapping[str, tuple[int, ...]], alpha: float | None) -> Lora:
    """Read and check a LoRA against the shapes of the weights (by Wan name).

    Raises InputError listing every tensor that has no partner, no weight, or the wrong shape.
    """
    where = str(files.where)
    names = wan_names(files.shapes, where)
    sides: dict[str, dict[str, str]] = {}
    faults = []
    for wan, name in names.items():
        match = _NAME.match(wan)
        if match is None:
            faults.append(f"unexpected {name}")
        else:
            sides.setdefault(f"{match['module']}.weight", {})[match["side"]] = name
    pairs = {}
    for weight, pair in sides.items():
        if set(pair) != {"A", "B"}:
            faults.append(f"{weight} has only {', '.join(pair.values())}")
            continue
        pairs[weight] = (pair["A"], pair["B"])
        faults += _shape_faults(weight, files.shapes[pair["A"]], files.shapes[pair["B"]], shapes)
    if not pairs and not faults:
        faults.append("no lora_A and lora_B")
    if faults:
        raise InputError(f"is not a LoRA of this model: {listed(faults)}", where=where)
    return Lora(files, pairs, alpha)


def _shape_faults(
    weight: str, a: tuple[int, ...], b: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    if weight not in shapes:
        return [f"the model has no {weight}"]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != tuple(shapes[weight]):
        return [f"A {a} and B {b} do not make {weight} {tuple(shapes[weight])}"]
    return []
