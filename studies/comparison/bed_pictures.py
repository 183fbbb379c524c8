"""Pictures of a test bed: quality against bytes, and what comes back by how long it was away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from forcingkv.models.demo_occluded.data import MOST_AWAY
from forcingkv.plotting import INK, SOFT, figure, png
from studies.ablation.point_labels import place_labels
from studies.ablation.variant_pictures import error_of, families_of
from studies.ablation.variant_scores import Measure, VariantRow, frontier
from studies.ablation.variants import PROFILED, REFERENCE

TITLES: dict[Measure, str] = {
    "digits": "digits read (%)",
    "right_in_window": "digits that come back right: digit, place and direction, away for 1 to 4 chunks (%)",
}


def bytes_picture(rows: Sequence[VariantRow], quality: Measure) -> bytes:
    """PNG: the share that is right against bytes of keys and values, with intervals, and the frontier."""
    drawn, families = figure(11, 7.5), families_of(rows)
    axes = drawn.subplots()
    best, labels = frontier(rows, quality), []
    names = {row.name for row in best}
    for row in rows:
        found = row.means[quality]
        if found.mean is None:
            continue
        x, y, stands_out = row.kv_bytes / 1e6, 100 * found.mean, row.name in (REFERENCE, PROFILED)
        axes.errorbar(
            x,
            y,
            yerr=error_of(found, 100),
            fmt="o",
            elinewidth=0.9,
            alpha=0.85,
            color=families[row.family],
            markersize=8 if stands_out else 5.5,
            markeredgecolor=INK if stands_out else "none",
        )
        labels.append((row.name, x, y, row.name in names, families[row.family]))
    steps = [(row.kv_bytes / 1e6, 100 * (row.means[quality].mean or 0)) for row in best]
    axes.step(*zip(*steps, strict=True), where="post", color=SOFT, linewidth=1.2, linestyle="--", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(9))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    least, most = min(x for _, x, *_ in labels), max(x for _, x, *_ in labels)
    axes.set(xlim=(least / 1.25, most * 1.25), ylabel=TITLES[quality])
    axes.set_xlabel("keys and values in the last phase (MB, log scale)")
    sns.despine(ax=axes)
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=name) for name, c in families.items()]
    handles.append(Line2D([], [], linestyle="--", color=SOFT, label="frontier of the means"))
    drawn.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    place_labels(axes, labels)
    return png(drawn)


def lengths_picture(rows: Sequence[VariantRow]) -> bytes:
    """PNG: the share that is right (%) of each variant, by chunks that digits were away; most bytes first."""
    ordered = sorted(rows, key=lambda row: -row.kv_bytes)
    lengths = range(1, MOST_AWAY + 1)
    shares = [[100 * (row.means[f"right_after_{away}"].mean or 0) for away in lengths] for row in ordered]
    drawn = figure(9, 1.6 + 0.32 * len(ordered))
    axes = drawn.subplots()
    sns.heatmap(
        np.array(shares),
        ax=axes,
        annot=True,
        fmt=".0f",
        vmin=0,
        vmax=100,
        cmap="Blues",
        linewidths=1,
        cbar_kws={"label": "right (%)"},
        xticklabels=list(lengths),
        yticklabels=[f"{row.name}  ({row.kv_bytes / 1e6:.1f} MB)" for row in ordered],
    )
    axes.set_xlabel("chunks that digits were away")
    axes.tick_params(length=0)
    return png(drawn)
