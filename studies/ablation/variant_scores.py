"""What is measured of the videos of variants: means, with intervals over prompts, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forcingkv.measure.fidelity.evaluation import Estimate, differences, estimate
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype
from studies.ablation.variants import PROFILED, REFERENCE, Variant

Measure = str
"""The name of what is measured of a video."""
Values = list[float | None]


@dataclass(frozen=True)
class Cost:
    """What a variant takes, in the last phase."""

    kv_bytes: int
    attention: int
    """Operations of self-attention in a pass."""

    @classmethod
    def of(cls, plan: CachePlan, dtype: Dtype = "float32") -> Cost:
        """That of a plan, for a model that computes in `dtype`."""
        return cls(plan.kv_bytes(dtype), pass_flops(plan).attention)


@dataclass(frozen=True)
class VariantScores:
    """The measures of a variant's videos, in the order of the samples."""

    variant: Variant
    cost: Cost
    values: Mapping[Measure, Values]


@dataclass(frozen=True)
class VariantRow:
    """A variant, or all draws of one thing together."""

    family: str
    name: str
    draws: int
    """1 for what is not drawn."""
    kv_bytes: int
    attention: float
    """Operations of self-attention in a pass, over those of `full`."""
    means: Mapping[Measure, Estimate]
    to_full: Mapping[Measure, Estimate]
    """The variant minus `full`, paired by sample."""
    to_profiled: Mapping[Measure, Estimate]
    """The variant minus `forcing-kv` with the profiled map, paired by sample."""
    spread: Mapping[Measure, tuple[float, float]]
    """The least and the largest mean of a draw."""


def rows_of(measured: Sequence[VariantScores], prompts: Sequence[str]) -> list[VariantRow]:
    """A row for each variant, in order; draws of one thing are one row.

    `prompts` are those of the samples: values of one prompt are drawn together when intervals are made.
    """
    by_name: dict[str, list[VariantScores]] = {}
    for one in measured:
        by_name.setdefault(one.variant.name, []).append(one)
    return [_row(draws, by_name[REFERENCE][0], by_name[PROFILED][0], prompts) for draws in by_name.values()]


def frontier(rows: Sequence[VariantRow], measure: Measure) -> list[VariantRow]:
    """The rows that no other beats: none with as few bytes has a higher mean. By bytes, ascending."""
    best: list[VariantRow] = []
    for row in sorted(rows, key=lambda row: (row.kv_bytes, -_quality(row, measure))):
        if not best or _quality(row, measure) > _quality(best[-1], measure):
            best.append(row)
    return best


def _quality(row: VariantRow, measure: Measure) -> float:
    """The mean; what has none is identical to its reference, and beats all."""
    mean = row.means[measure].mean
    return float("inf") if mean is None else mean


def _row(
    draws: Sequence[VariantScores], full: VariantScores, profiled: VariantScores, prompts: Sequence[str]
) -> VariantRow:
    every, measures = [*prompts] * len(draws), tuple(full.values)

    def pooled(of: Callable[[VariantScores, Measure], Values]) -> dict[Measure, Estimate]:
        return {m: estimate([value for one in draws for value in of(one, m)], every) for m in measures}

    means = {m: [estimate(one.values[m], prompts).mean for one in draws] for m in measures}
    known = {m: [mean for mean in means[m] if mean is not None] for m in measures}
    return VariantRow(
        family=draws[0].variant.family,
        name=draws[0].variant.name,
        draws=len(draws),
        kv_bytes=round(float(np.mean([one.cost.kv_bytes for one in draws]))),
        attention=float(np.mean([one.cost.attention for one in draws])) / full.cost.attention,
        means=pooled(lambda one, m: one.values[m]),
        to_full=pooled(lambda one, m: differences(one.values[m], full.values[m])),
        to_profiled=pooled(lambda one, m: differences(one.values[m], profiled.values[m])),
        spread={m: (min(values), max(values)) for m, values in known.items() if values},
    )
