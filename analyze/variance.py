"""Where the variance of scores comes from, and how alike the observations of a head are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.analyze.scores import Observations
from forcingkv.analyze.storage import Recorded, collect

SOURCES = ("layer", "head", "sample", "step", "chunk", "head x sample", "head x step", "head x chunk", "rest")
"""What scores may vary with, in the order in which it is told."""

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

    Analysis of variance of the balanced design samples x chunks x steps x heads, heads nested in
    layers: `layer`, `head` (within its layer), `sample`, `step`, `chunk`, the interactions of a head
    with the last three, and the `rest`. What endangers a fixed label are the interactions: a main
    effect of step or chunk moves all heads alike.
    """
    scores = observations.scores
    samples, chunks, steps, layers, heads = scores.shape
    values = scores.reshape(samples, chunks, steps, layers * heads)
    grand = values.mean()
    total = float(((values - grand) ** 2).sum())
    if total <= values.size * NOISE**2:
        return dict.fromkeys(SOURCES, 0.0) | {"rest": 1.0}
    axes = {"sample": 0, "chunk": 1, "step": 2}
    by_head = values.mean((0, 1, 2)) - grand
    by_layer = by_head.reshape(layers, heads).mean(1)
    size = values.size
    split = {
        "layer": float((by_layer**2).mean()) * size,
        "head": float(((by_head.reshape(layers, heads) - by_layer[:, None]) ** 2).mean()) * size,
    }
    for name, axis in axes.items():
        others = tuple(other for other in (0, 1, 2) if other != axis)
        main = values.mean((*others, 3)) - grand
        together = values.mean(others) - grand - main[:, None] - by_head[None]
        split[name] = float((main**2).mean()) * size
        split[f"head x {name}"] = float((together**2).mean()) * size
    split["rest"] = total - sum(split.values())
    return {name: max(split[name], 0.0) / total for name in SOURCES}


def divergence(recorded: Recorded) -> Divergence:
    """Intra- and inter-head divergence of the frame-wise attention in the last chunk.

    The feature of an observation (sample, step) of a head is its frame-wise attention (query frames x
    key frames), as in the paper (METHOD.md section 2), which gives no formula for its 0.16 within and
    0.83 between; as those sum to 1, shares of the total squared distance are computed here.
    """
    keys = ("layer", "head", "sample", "step", "query_frame")
    last = recorded.recording.chunks - 1
    lazy = recorded.rows.filter(pl.col("chunk") == last)
    rows = collect(lazy.select(*keys, "key_frame", "mass").sort(keys), recorded.place)
    spec = recorded.recording.spec
    heads = spec.layers * spec.heads
    key_frame = rows["key_frame"].explode().to_numpy()
    row = np.repeat(np.arange(len(rows)), rows["key_frame"].list.len().to_numpy())
    # Under policies that prune, heads see different frames: those not seen have no mass.
    features = np.zeros((len(rows), int(key_frame.max()) + 1))
    np.add.at(features, (row, key_frame), rows["mass"].explode().to_numpy())
    points = features.reshape(heads, len(recorded.samples) * len(spec.schedule.timesteps), -1)
    means = points.mean(1)
    within = float(((points - means[:, None]) ** 2).sum(-1).mean())
    between = float(((means - means.mean(0)) ** 2).sum(-1).mean())
    total = within + between
    return Divergence(within / total, between / total) if total > NOISE**2 else Divergence(0.0, 0.0)
