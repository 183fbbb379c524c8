"""Cells of tables of variants: means, intervals and differences in words."""

from __future__ import annotations

from collections.abc import Callable

from forcingkv.measure.fidelity.evaluation import Estimate
from studies.ablation.variant_scores import Measure, VariantRow

Format = Callable[[float], str]


def mean(row: VariantRow, measure: Measure, shown: Format) -> str:
    """A mean with its interval, and the least and largest of its draws."""
    text = point(row, measure, shown)
    found = row.means[measure]
    if found.low is not None and found.high is not None:
        text += f" [{shown(found.low)}, {shown(found.high)}]"
    if row.draws > 1 and measure in row.spread:
        least, largest = row.spread[measure]
        text += f"; draws {shown(least)} to {shown(largest)}"
    return text


def point(row: VariantRow, measure: Measure, shown: Format) -> str:
    """A mean alone."""
    found = row.means[measure].mean
    return "–" if found is None else shown(found)


def difference(found: Estimate, shown: Format) -> str:
    """In bold where the interval excludes 0."""
    if found.mean is None or found.low is None or found.high is None:
        return "–" if found.mean is None else shown(found.mean)
    text = f"{shown(found.mean)} [{shown(found.low)}, {shown(found.high)}]"
    return f"**{text}**" if found.excludes_zero else text


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{share:.1%}"


def points(share: float) -> str:
    """Percentage points."""
    return f"{100 * share:+.1f}"


def decibel(value: float) -> str:
    """Two places."""
    return f"{value:.2f}"


def signed(value: float) -> str:
    """Two places, and which way."""
    return f"{value:+.2f}"


def ratio(value: float) -> str:
    """Three places."""
    return f"{value:.3f}"
