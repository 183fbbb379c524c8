"""Where the variance of scores comes from, and how far apart heads are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.analyze.scores import Observations
from forcingkv.analyze.scoring import Scored
from forcingkv.analyze.storage import Recorded, by_frame, collect

OF_PASSES = {"step": "steps", "clean pass": "clean pass", "chunk": "chunks"}
"""Sources that passes differ by, in the order in which they are shown -> their name in `Scored.parts`."""

NOISE = 1e-12
"""Values between 0 and 1 that lie so close are equal."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """How spread frame-wise attention is within heads and between them; the two sum to 1."""

    intra: float
    """Share of the squared distances from the common mean that lies within heads."""
    inter: float
    """Share that lies between the heads' means."""


def variance_split(observations: Observations) -> dict[str, float]:
    """Share of the variance of scores that each source explains; they sum to 1.

    Analysis of variance of the design samples x passes x heads, heads nested in layers: `layer`, `head`
    (within its layer), `sample`, `step`, `chunk`, the interactions of a head with the last three, and the
    `rest`.
    Where denoising and clean passes are scored, how the two differ is a source of its own, `clean pass`, and
    `step` is what denoising passes differ by among themselves. What endangers a fixed label are the
    interactions: a main effect of step or chunk moves all heads alike.

    Where chunks have different numbers of passes, what step and chunk could both explain counts as the
    step's: each of `clean pass`, `step` and `chunk`, in this order, has what those before it leave over.
    """
    scores = observations.scores
    samples, passes, layers, heads = scores.shape
    values = scores.reshape(samples, passes, layers * heads)
    contrasts = _contrasts(observations.scored)
    known = [name for name, part in OF_PASSES.items() if part in observations.scored.parts]
    names = ["layer", "head", "sample", *known, *(f"head x {name}" for name in ("sample", *known)), "rest"]
    grand = values.mean()
    total = float(((values - grand) ** 2).sum())
    if total <= values.size * NOISE**2:
        return dict.fromkeys(names, 0.0) | {"rest": 1.0}
    by_head = values.mean((0, 1)) - grand
    by_layer = by_head.reshape(layers, heads).mean(1)
    size = values.size
    split = {
        "layer": float((by_layer**2).mean()) * size,
        "head": float(((by_head.reshape(layers, heads) - by_layer[:, None]) ** 2).mean()) * size,
    }
    of_samples, of_passes = values.mean((1, 2)) - grand, values.mean((0, 2)) - grand
    split["sample"] = float((of_samples**2).mean()) * size
    split["head x sample"] = float(
        ((values.mean(1) - grand - of_samples[:, None] - by_head) ** 2).mean() * size
    )
    together = values.mean(0) - grand - of_passes[:, None] - by_head
    for name in known:
        along = contrasts[name].T
        split[name] = float(((along @ of_passes) ** 2).sum()) * size / passes
        split[f"head x {name}"] = float(((along @ together) ** 2).sum()) * samples
    split["rest"] = total - sum(split.values())
    return {name: max(split[name], 0.0) / total for name in names}


def _contrasts(scored: Scored) -> dict[str, Array]:
    """Source -> what it can explain: orthonormal columns (passes, rank), none along those of one before."""
    count = len(scored.passes)
    known = np.full((count, 1), count**-0.5)
    kinds: dict[str, Sequence[Hashable]] = {
        "clean pass": [made.clean for made in scored.passes],
        "step": [(made.clean, made.timestep) for made in scored.passes],
        "chunk": [made.chunk for made in scored.passes],
    }
    found = {}
    for name, levels in kinds.items():
        each = list(dict.fromkeys(levels))
        columns = np.array([[level == one for one in each] for level in levels], np.float64)
        left = columns - known @ (known.T @ columns)
        axes, sizes, _ = np.linalg.svd(left, full_matrices=False)
        found[name] = axes[:, sizes > 1e-9]
        known = np.hstack([known, found[name]])
    return found


def divergence(recorded: Recorded, scored: Scored) -> Divergence:
    """Intra- and inter-head divergence of the frame-wise attention in the last chunk that is scored.

    The feature of an observation (sample, pass) of a head is its frame-wise attention (query frames x
    key frames), as in the paper (`docs/method.md`, "Head profile"), which gives no formula for its 0.16
    within and 0.83 between; as those sum to 1, shares of the total squared distance are computed here.
    """
    keys = ("layer", "head", "sample", "step", "query_frame")
    last = scored.chunks[-1]
    steps = [made.step for made in scored.passes if made.chunk == last]
    lazy = recorded.rows.filter((pl.col("chunk") == last) & pl.col("step").is_in(steps))
    rows = collect(lazy.select(*keys, "key_frame", "mass").sort(keys), recorded.place)
    spec = recorded.recording.spec
    heads = spec.layers * spec.heads
    row, key_frame, mass = by_frame(rows)
    # Under policies that prune, heads see different frames: those not seen have no mass.
    features = np.zeros((len(rows), int(key_frame.max()) + 1))
    np.add.at(features, (row, key_frame), mass)
    points = features.reshape(heads, len(recorded.samples) * len(steps), -1)
    means = points.mean(1)
    within = float(((points - means[:, None]) ** 2).sum(-1).mean())
    between = float(((means - means.mean(0)) ** 2).sum(-1).mean())
    total = within + between
    return Divergence(within / total, between / total) if total > NOISE**2 else Divergence(0.0, 0.0)
