"""What measured queries of a real model say of its head map (docs/headmaps.md, "Against measured queries").

    python studies/query_statistics.py STATISTICS.safetensors --headmap forcingkv_heads_longlive.json

The statistics are those of TriAttention for LongLive (WeianMao/triattention, Apache 2.0): for each layer,
head and rotary pair the mean of the queries before RoPE, as a complex number, and the mean of their absolute
values. Where the first is nearly as large as the second, all queries of that pair point one way, and so what
the pair adds to attention is a function of distance. Keys are not in the files: mass on frames does not
follow, so neither do recency scores.

Prints as JSON how well each of a few figures of a head tells static heads from dynamic ones.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps import STATIC, HeadMap, InputError, read_headmap
from forcingkv.models.presets import load_spec
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import read_arrays

PARTS = ("q_mean_real", "q_mean_imag", "q_abs_mean")
PERMUTATIONS = 2000
"""Of labels within each layer, for how often chance tells the heads apart as well."""
RADIANS = 1.0
"""A time pair is fast if it turns by as much over the frames that the model attends to."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class QueryStatistics:
    """Queries of every head before RoPE, over all tokens that were measured."""

    mean: npt.NDArray[np.complex128]
    """(layers, heads, rotary pairs), those of time first, then height, then width."""
    size: Floats
    """Mean absolute value, of the same shape: never less than that of the mean."""
    tokens: int
    """How many each layer's are over."""


def read_query_statistics(path: Path | str, spec: ModelSpec) -> QueryStatistics:
    """Read a file. Raises InputError where it is not of that model's size, or cannot be means of anything."""
    arrays = read_arrays(path)
    missing = [name for name in (*PARTS, "token_count") if name not in arrays]
    if missing:
        raise InputError(f"has no tensor {', '.join(missing)}", where=str(path), expected=", ".join(PARTS))
    shape = (spec.layers, spec.heads, spec.head_dim // 2)
    real, imaginary, size = (arrays[name].astype(np.float64) for name in PARTS)
    for name, array in zip(PARTS, (real, imaginary, size), strict=True):
        if array.shape != shape:
            raise InputError(
                f"{name} is {array.shape}", where=str(path), expected=f"{shape}, for {spec.name}"
            )
    mean = real + 1j * imaginary
    if not np.isfinite(mean).all() or not (np.abs(mean) <= size * (1 + 1e-4)).all():
        raise InputError(
            "has means that are larger than the mean absolute value, or are no numbers", where=str(path)
        )
    return QueryStatistics(mean, size, int(arrays["token_count"].max()))


def figures(found: QueryStatistics, spec: ModelSpec) -> dict[str, Floats]:
    """Figures of each head, (layers, heads).

    one_way: the mean over its size, over all pairs: 1 where every query of the head is the same.
    one_way_in_time: the same over the time pairs.
    fast_in_time: of the mean in the time pairs, the share in those that turn by `RADIANS` or more over the
    frames that the model attends to: such pairs tell near frames from far ones.
    """
    time = slice(0, spec.rotary_pairs[0])
    mean = np.abs(found.mean)
    turns = spec.rope_theta ** (-np.arange(time.stop) / time.stop) * spec.attended_frames
    fast = slice(0, int((turns >= RADIANS).sum()))
    return {
        "one_way": mean.sum(-1) / found.size.sum(-1),
        "one_way_in_time": mean[..., time].sum(-1) / found.size[..., time].sum(-1),
        "fast_in_time": mean[..., fast].sum(-1) / mean[..., time].sum(-1),
    }


def told_apart(values: Floats, static: Labels) -> Floats:
    """Share of pairs of a static and a dynamic head of one layer in which the static one has more.

    0.5: nothing is told apart. What differs from layer to layer does not count. NaN where no layer has both.

    Args:
        values: (layers, heads).
        static: (..., layers, heads): several labellings at once. The result has their shape.
    """
    a, b = values[:, :, None], values[:, None, :]
    larger = (a > b) + (a == b) / 2  # of head i over head j of each layer
    yes, no = static.astype(np.float64), (~static).astype(np.float64)
    won = np.einsum("...li,lij,...lj->...", yes, larger, no, optimize=True)
    with np.errstate(invalid="ignore"):
        return np.asarray(won / (yes.sum(-1) * no.sum(-1)).sum(-1))


def compare(found: QueryStatistics, spec: ModelSpec, headmap: HeadMap) -> dict[str, Any]:
    """What the figures say of a map's labels. Raises InputError for a map of another size."""
    headmap.check_model(spec.layers, spec.heads, set(headmap.counts()))
    static = np.array([[label == STATIC for label in row] for row in headmap.labels])
    rng, told = np.random.default_rng(0), {}
    shuffled = rng.permuted(np.broadcast_to(static, (PERMUTATIONS, *static.shape)), axis=-1)
    for name, values in figures(found, spec).items():
        share, chance = float(told_apart(values, static)), told_apart(values, shuffled)
        told[name] = {
            "static": float(np.median(values[static])),
            "others": float(np.median(values[~static])),
            "told_apart": share,
            "by_chance": float((1 + (np.abs(chance - 0.5) >= abs(share - 0.5)).sum()) / (1 + PERMUTATIONS)),
        }
    return {"heads": headmap.counts(), "tokens": found.tokens, "figures": told}


def agreement(a: QueryStatistics, b: QueryStatistics) -> dict[str, float]:
    """How alike the mean queries of two recordings are: cosines over the heads, as real vectors."""
    product = (a.mean.conj() * b.mean).sum(-1).real
    cosines = product / (np.linalg.norm(a.mean, axis=-1) * np.linalg.norm(b.mean, axis=-1))
    return {"median": float(np.median(cosines)), "least": float(cosines.min())}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("statistics", nargs="+", type=Path)
    parser.add_argument("--headmap", type=Path, required=True)
    parser.add_argument("--model", default="longlive")
    given = parser.parse_args()
    spec, headmap = load_spec(given.model), read_headmap(given.headmap)
    found = {path.name: read_query_statistics(path, spec) for path in given.statistics}
    report: dict[str, Any] = {name: compare(one, spec, headmap) for name, one in found.items()}
    if len(found) == 2:
        report["mean queries of both, cosine"] = agreement(*found.values())
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
