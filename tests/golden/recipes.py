"""Weights of the files of decoders: those in the file, or those that its spec says how to make.

`spec.weights` says it in words, of which two recipes are known; the checksums in the spec show whether the
one that was followed is the file's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.golden.files import GoldenError, GoldenFile

Array = npt.NDArray[np.float32]
PREFIXES = ("vae.", "tae.")
CLOSE = 1e-5
"""Relative to the number of values: what sums of float32 in another order may differ by."""


def weights_of(file: GoldenFile) -> dict[str, Array]:
    """The weights by the names of the published file. Raises GoldenError where nothing says them."""
    for prefix in PREFIXES:
        found = {name.removeprefix(prefix): name for name in file.names if name.startswith(prefix)}
        if found:
            return {short: file.tensor(name) for short, name in found.items()}
    names, seed = file.spec.get("names"), file.spec.get("seed")
    if not isinstance(names, Mapping) or not isinstance(seed, int):
        raise GoldenError("it has neither tensors vae.* or tae.* nor the names and the seed of weights")
    recipe = _tae if is_tiny(names) else _vae
    made = {}
    for number, name in enumerate(sorted(names)):
        shape = tuple(names[name])
        drawn = np.random.default_rng((seed, number)).standard_normal(shape, dtype=np.float32)
        made[name] = recipe(name, drawn, sorted(names))
    _check(file, made)
    return made


def is_tiny(names: Mapping[str, Any]) -> bool:
    """Whether names are those of a TAEHV, whose layers have numbers."""
    return any(name.split(".")[1].isdigit() for name in names if name.startswith("decoder."))


def _vae(name: str, drawn: Array, names: Sequence[str]) -> Array:
    if name.endswith("gamma"):
        return 1 + np.float32(0.1) * drawn
    if name.endswith("bias"):
        return np.float32(0.05) * drawn
    return drawn * np.float32(1.4 / math.sqrt(math.prod(drawn.shape[1:])))


def _tae(name: str, drawn: Array, names: Sequence[str]) -> Array:
    last = f"decoder.{max(int(one.split('.')[1]) for one in names)}"
    if name.endswith("bias"):
        return np.float32(0.1) * drawn + np.float32(0.5 if name == f"{last}.bias" else 0.0)
    factor = 0.2 if name == f"{last}.weight" else 0.5 if name.endswith("conv.4.weight") else 1.3
    return drawn * np.float32(factor / math.sqrt(math.prod(drawn.shape[1:])))


def _check(file: GoldenFile, made: Mapping[str, Array]) -> None:
    """Raise GoldenError for weights that are not those that the file was made with."""
    checksums = file.spec.get("checksums")
    if not isinstance(checksums, Mapping) or not checksums:
        raise GoldenError("its weights are to be made, and no checksums say whether they came out right")
    for name, (*_, total, first) in checksums.items():
        if name not in made:
            raise GoldenError(f"it has a checksum of {name}, which is none of its weights")
        found = float(made[name].sum(dtype=np.float64)), float(made[name].flat[0])
        limits = CLOSE * math.sqrt(made[name].size), CLOSE
        if any(abs(a - b) > limit for a, b, limit in zip(found, (total, first), limits, strict=True)):
            raise GoldenError(
                f"its {name} has the sum and first value {(total, first)}, and made are {found}"
            )
