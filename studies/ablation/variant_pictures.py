"""Pictures of an ablation: quality against KV bytes, and each variant's difference to forcing-kv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from forcingkv.measure.fidelity.evaluation import Estimate
from forcingkv.plotting import INK, SOFT, png
from forcingkv.plotting import figure as new_figure
from studies.ablation.point_labels import place_labels
from studies.ablation.variant_scores import Measure, VariantRow, frontier
from studies.ablation.variants import PROFILED, REFERENCE

DPI = 110
Colour = tuple[float, float, float]

WIDE = 1.3
"""Bytes up to this factor of those of forcing-kv are in the wide panel."""
LABELLED = ("policy", "head map")
"""Families whose points have labels; of others those on the frontier have."""
NEAR_TICKS, FAR_TICKS = (2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4), (5, 7, 10, 14)
"""MB."""
NEAR = 1.02
"""Points whose bytes differ by less than this factor are drawn beside each other."""
ASIDE = 1.0085
"""Factor from one of them to the next."""


@dataclass(frozen=True)
class _Axis:
    """How a measure is drawn."""

    measure: Measure
    title: str
    scale: float
    """What values are multiplied by."""


_DIGITS = _Axis("digits", "digits read, all chunks (%)", 100)
_PSNR = _Axis("psnr", "PSNR to full (dB)", 1)


def pareto_picture(rows: Sequence[VariantRow]) -> bytes:
    """PNG: digits read, and PSNR to full, against the bytes of keys and values; frontiers as lines."""
    return _drawn((11, 15), lambda figure: _draw_pareto(figure, rows))


def difference_picture(rows: Sequence[VariantRow]) -> bytes:
    """PNG: each variant minus forcing-kv with the profiled map, with intervals, in digits and in PSNR."""
    others = [row for row in rows if row.name not in (REFERENCE, PROFILED)]
    return _drawn((11, 1.4 + 0.3 * len(others)), lambda figure: _draw_differences(figure, others))


def _draw_pareto(figure: Figure, rows: Sequence[VariantRow]) -> None:
    """Each measure in two panels of one scale: most variants have nearly the bytes of forcing-kv."""
    families, labels = families_of(rows), []
    own = next(row.kv_bytes for row in rows if row.name == PROFILED)
    border = WIDE * own / 1e6
    panels = figure.subplots(2, 2, sharex="col", sharey="row", squeeze=False, width_ratios=(3, 1))
    ends = min(row.kv_bytes for row in rows) / 1.1e6, border, max(row.kv_bytes for row in rows) / 0.8e6
    for pair, axis in zip(panels, (_DIGITS, _PSNR), strict=True):
        points = _points(rows, axis)
        best = {row.name for row in frontier(rows, axis.measure)}
        line = [(x, y) for row, x, y in points if row.name in best]
        for axes, near in zip(pair, (True, False), strict=True):
            here = [point for point in points if (point[1] < border) == near]
            _draw_points(axes, here, axis, families)
            # A step: what a point buys holds until the next one.
            end = (ends[-1], line[-1][1])
            axes.step(
                *zip(*[*line, end], strict=True),
                where="post",
                color=SOFT,
                linewidth=1.2,
                linestyle="--",
                zorder=0,
            )
            _scale(axes, ends[:2] if near else ends[1:], near)
            said = [
                (_shown_name(row), x, y, row.name in best, families[row.family])
                for row, x, y in here
                if row.name in best or row.family in LABELLED
            ]
            labels.append((axes, said))
        pair[0].set_ylabel(axis.title)
    figure.supxlabel("keys and values in the last phase (MB, log scale)", fontsize=10)
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=name) for name, c in families.items()]
    handles.append(Line2D([], [], linestyle="--", color=SOFT, label="frontier of the means"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    for axes, texts in labels:  # once nothing moves any more
        place_labels(axes, texts)


def _points(rows: Sequence[VariantRow], axis: _Axis) -> list[tuple[VariantRow, float, float]]:
    """(row, MB, value) of the rows that have a value, by bytes."""
    shown = [row for row in rows if row.means[axis.measure].mean is not None]
    places = _beside(shown)
    points = [(row, places[row.name], axis.scale * (row.means[axis.measure].mean or 0)) for row in shown]
    return sorted(points, key=lambda point: point[1])


def _draw_points(
    axes: Axes, points: Sequence[tuple[VariantRow, float, float]], axis: _Axis, families: dict[str, Colour]
) -> None:
    for row, x, y in points:
        stands_out = row.name in (REFERENCE, PROFILED)
        axes.errorbar(
            x,
            y,
            yerr=error_of(row.means[axis.measure], axis.scale),
            fmt="o",
            elinewidth=0.9,
            alpha=0.85,
            color=families[row.family],
            markersize=8 if stands_out else 5.5,
            markeredgecolor=INK if stands_out else "none",
        )


def _scale(axes: Axes, ends: tuple[float, ...], near: bool) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*ends)
    axes.xaxis.set_major_locator(FixedLocator(NEAR_TICKS if near else FAR_TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.06)
    sns.despine(ax=axes, left=not near)
    axes.tick_params(axis="y", length=3 if near else 0)


def _draw_differences(figure: Figure, rows: Sequence[VariantRow]) -> None:
    families = families_of(rows)
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("digits read − forcing-kv (points)", "PSNR to full − forcing-kv (dB)")
    for axes, axis, title in zip(panels, (_DIGITS, _PSNR), titles, strict=True):
        axes.axvline(0, color=SOFT, linewidth=1)
        axes.tick_params(axis="y", length=0)
        for place, row in enumerate(rows):
            found = row.to_profiled[axis.measure]
            if found.mean is None:
                continue
            axes.errorbar(
                axis.scale * found.mean,
                place,
                xerr=error_of(found, axis.scale),
                fmt="o",
                capsize=2,
                color=families[row.family],
                markersize=5,
                elinewidth=1.4,
                markerfacecolor=families[row.family] if found.excludes_zero else "white",
            )
        axes.set(xlabel=title)
        axes.grid(axis="y", color="#eef1f4", linewidth=0.8)
        axes.set_axisbelow(True)
        sns.despine(ax=axes, left=True)
    panels[0].set_yticks(range(len(rows)), [_shown_name(row) for row in rows])
    panels[0].invert_yaxis()


def _drawn(size: tuple[float, float], draw: Callable[[Figure], None]) -> bytes:
    figure = new_figure(*size, DPI)
    draw(figure)
    return png(figure)


def families_of(rows: Sequence[VariantRow]) -> dict[str, Colour]:
    """A colour for each family, in the order of the rows."""
    names = list(dict.fromkeys(row.family for row in rows))
    return dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))


def _shown_name(row: VariantRow) -> str:
    return f"{row.name} ({row.draws} draws)" if row.draws > 1 else row.name


def error_of(found: Estimate, scale: float) -> list[list[float]] | None:
    """The interval as matplotlib takes it, below and above the mean; None where there is none."""
    if found.mean is None or found.low is None or found.high is None:
        return None
    return [[scale * (found.mean - found.low)], [scale * (found.high - found.mean)]]


def _beside(rows: Sequence[VariantRow]) -> dict[str, float]:
    """MB of each row; rows of nearly the same bytes side by side around their place."""
    places: dict[str, float] = {}
    cluster: list[VariantRow] = []
    for row in [*sorted(rows, key=lambda row: row.kv_bytes), None]:
        if cluster and (row is None or row.kv_bytes > NEAR * cluster[0].kv_bytes):
            middle = (len(cluster) - 1) / 2
            for number, one in enumerate(cluster):
                places[one.name] = float(one.kv_bytes / 1e6 * np.power(ASIDE, number - middle))
            cluster = []
        cluster += [row] if row else []
    return places
