"""Pictures of a head map and of the scores behind it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import numpy as np
import polars as pl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from forcingkv.analyze.scores import mean_scores
from forcingkv.headmaps import HeadMap

__all__ = ["headmap_picture", "recency_picture", "spread_picture"]


def headmap_picture(headmap: HeadMap) -> bytes:
    """PNG: mean recency score of each head, layers x heads, with its label's letter in each cell."""
    import seaborn as sns

    letter = headmap.letters()
    letters = [[letter[label] for label in row] for row in headmap.labels]
    legend = ", ".join(f"{short} {label}" for label, short in letter.items())
    values = np.array(headmap.scores or np.full((headmap.model.layers, headmap.model.heads), np.nan))
    with _figure(2.0 + 0.55 * headmap.model.heads, 1.6 + 0.42 * headmap.model.layers) as figure:
        axes = figure.subplots()
        sns.heatmap(
            values, annot=np.array(letters), fmt="", vmin=0, vmax=1, cmap="viridis",
            linewidths=0.5, ax=axes, cbar_kws={"label": "recency score"},
        )  # fmt: skip
        axes.set(xlabel="head", ylabel="layer", title=f"{headmap.model.name}: {legend}")
        return _png(figure)


def spread_picture(scores: pl.DataFrame, headmap: HeadMap) -> bytes:
    """PNG: each head's mean score, with the interval that holds 90% of its observations."""
    import seaborn as sns

    heads = headmap.model.heads
    order = np.argsort(mean_scores(scores).ravel())
    names = [f"{index // heads}.{index % heads}" for index in order]
    labelled = scores.with_columns(
        name=pl.format("{}.{}", "layer", "head"),
        label=pl.struct("layer", "head").map_elements(
            lambda at: headmap.labels[at["layer"]][at["head"]], return_dtype=pl.String
        ),
    )
    with _figure(max(6.0, 0.32 * len(names) + 2), 4.0) as figure:
        axes = figure.subplots()
        sns.pointplot(
            x=labelled["name"].to_list(), y=labelled["score"].to_list(),
            hue=labelled["label"].to_list(), order=names, errorbar=("pi", 90), linestyle="none", ax=axes,
        )  # fmt: skip
        if headmap.rule.alpha is not None:
            axes.axhline(headmap.rule.alpha, color="black", linewidth=1, linestyle="--")
        axes.set(xlabel="layer.head", ylabel="recency score", ylim=(0, 1.02))
        axes.tick_params(axis="x", rotation=90, labelsize=8)
        return _png(figure)


def recency_picture(scores: pl.DataFrame) -> bytes:
    """PNG: how the mean score of each layer moves over denoising steps."""
    import seaborn as sns

    by_step = scores.group_by("layer", "step").agg(pl.col("score").mean()).sort("layer", "step")
    with _figure(6.0, 3.6) as figure:
        axes = figure.subplots()
        sns.lineplot(
            x=by_step["step"].to_list(), y=by_step["score"].to_list(),
            hue=[f"layer {layer}" for layer in by_step["layer"]], marker="o", ax=axes,
        )  # fmt: skip
        axes.set(xlabel="denoising step (0 is the noisiest)", ylabel="mean recency score", ylim=(0, 1.02))
        axes.set_xticks(sorted(set(by_step["step"].to_list())))
        axes.legend(fontsize=8)
        return _png(figure)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context({"backend": "agg", "font.size": 10}):
        figure = plt.figure(figsize=(width, height), layout="constrained")
        try:
            yield figure
        finally:
            plt.close(figure)


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    # Without the software's name and version the same data gives the same bytes.
    figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    return target.getvalue()
