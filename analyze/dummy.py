"""The classes of Dummy Forcing (csguoh/DummyForcing), found offline instead of anew for each video.

Its released code takes, of each head, the mass on the first frame and on the frames between it and the
current chunk; divides each by its sum over all heads of the model; and makes dummies of the half of the
heads whose larger share is smallest. Of the others, those with the larger share on the first frame are
sink heads, the rest neighbour heads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.analyze.scores import mean_scores
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule, Statistics
from forcingkv.headmaps.errors import InputError

__all__ = ["CLASSES", "context_mass", "label_dummies"]

CLASSES = ("sink", "neighbour", "dummy")
SINK_FRAMES = 1

Array = npt.NDArray[np.float64]


def context_mass(statistics: pl.LazyFrame, frames_per_chunk: int, first_chunk: int) -> pl.DataFrame:
    """Mean mass of each head on the first frame (`sink`) and on the context after it (`neighbour`).

    Args:
        statistics: recorded mass, see `analyze.recorder`.
        frames_per_chunk: latent frames of a chunk; the last ones of each pass are the current chunk.
        first_chunk: chunks before it are left out.
    """
    sink = pl.col("key_frame") < SINK_FRAMES
    context = ~sink & (pl.col("key_frame") < pl.col("chunk") * frames_per_chunk)
    observed = (
        statistics.filter(pl.col("chunk") >= first_chunk)
        .group_by("sample", "chunk", "step", "layer", "head", "query_frame")
        .agg(
            sink=pl.col("mass").filter(sink).sum(),
            neighbour=pl.col("mass").filter(context).sum(),
        )
    )
    means = observed.group_by("layer", "head").agg(pl.col("sink").mean(), pl.col("neighbour").mean())
    return means.sort("layer", "head").collect()


def label_dummies(
    mass: pl.DataFrame,
    scores: pl.DataFrame,
    model: ModelIdentity,
    *,
    statistics: Statistics,
    dummies: int | None = None,
) -> HeadMap:
    """Label every head `sink`, `neighbour` or `dummy`.

    Args:
        mass: of `context_mass`.
        scores: recency scores, kept in the map.
        model: what was measured.
        statistics: how.
        dummies: heads to make dummies; None: half of all (180 of 360).

    Raises:
        InputError: there are not so many heads.
    """
    shares = np.stack(
        [mass[name].to_numpy() / max(mass[name].sum(), 1e-12) for name in ("sink", "neighbour")]
    )
    heads = shares.shape[1]
    count = heads // 2 if dummies is None else dummies
    if not 0 <= count <= heads:
        raise InputError(f"{count} dummy heads", where="rule", expected=f"0 to {heads}")
    found = np.where(shares[0] >= shares[1], 0, 1)
    found[np.argsort(shares.max(0), kind="stable")[:count]] = 2
    rows = found.reshape(model.layers, model.heads)
    means = mean_scores(scores)
    return HeadMap(
        model=model,
        labels=tuple(tuple(CLASSES[index] for index in row) for row in rows.tolist()),
        rule=Rule("dummy", sink_frames=SINK_FRAMES, dummy_heads=count),
        scores=tuple(tuple(round(float(value), 6) for value in row) for row in means),
        statistics=statistics,
    )
