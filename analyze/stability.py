"""How far a head's label can be trusted: intervals, flips, what more samples would settle.

Samples (prompt and seed) are what a map has to generalize over, so they are what is resampled; steps
and chunks are the same in every video and are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forcingkv.analyze.labels import Decision
from forcingkv.analyze.scores import Observations
from forcingkv.resampling import CONFIDENCE, Interval, percentile_interval, resampling_weights

RESAMPLES = 2000
NORMAL_QUANTILE = 1.959964
"""Of the two-sided interval that holds `CONFIDENCE`. That is also the share of samples in which a head has to
keep its label."""
REASONS = {
    "interval": "the interval of its score holds the boundary: more samples may settle it",
    "samples": "its label differs in more than 5% of samples",
    "steps": "at some denoising step it is clearly on the other side",
    "clean pass": "in the clean pass it is clearly on the other side",
    "chunks": "at some chunk, that is, length of history, it is clearly on the other side",
}
"""Why a head is undecided."""

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Stability:
    """Of every head; arrays are (layers, heads) unless said otherwise."""

    static: Bools
    """The label the rule gives from all observations, before anything is made of undecided heads."""
    score: Array
    """Mean recency score."""
    interval: Interval
    """Of the score."""
    margin: Array
    """Distance from the rule's boundary, in its own units."""
    spread: Array
    """Standard deviation of the score over samples; NaN for one sample."""
    kept_parts: dict[str, Array]
    """For `samples`, and for `steps`, `clean pass` and `chunks` as far as they are scored (`Scored.parts`),
    the share of them that alone give the head its label."""
    kept: Array
    """Share of single observations (sample, pass) in which it has its label."""
    reasons: dict[str, Bools]
    """Reason (see `REASONS`) -> heads that are undecided for it."""
    samples: int

    @property
    def undecided(self) -> Bools:
        """Heads that are undecided for any reason."""
        found: Bools = np.any(list(self.reasons.values()), axis=0)
        return found

    @property
    def firm(self) -> Bools:
        """Heads that keep their label in `CONFIDENCE` of samples."""
        return self.kept_parts["samples"] >= CONFIDENCE


def judge_stability(observations: Observations, decision: Decision) -> Stability:
    """Ask the decision of each sample, step, chunk and observation alone, and of resampled samples.

    A head is undecided if the bootstrap interval of its margin over samples holds 0; if its label
    differs in more than 5% of samples; or if at some step or chunk, or in the clean pass where denoising
    passes are scored too, the interval of its margin lies wholly on the other side. One sample gives no
    intervals, and says nothing about others: then only what flips within it is undecided.
    """
    values = observations.values
    samples = len(values)
    mean = observations.mean()
    static = decision.static(mean)

    def kept(parts: Array) -> Array:
        """Share of parts (..., layers, heads, features) in which the label holds."""
        same = decision.static(parts) == static
        return np.asarray(same.reshape(-1, *static.shape).mean(0))

    weights = resampling_weights(samples, RESAMPLES)

    def margins(part: Array) -> Interval:
        """Interval of the margin, from features (samples, layers, heads, features)."""
        return percentile_interval(decision.margin(np.tensordot(weights, part, 1)), samples)

    def opposite(parts: Iterable[Array]) -> Bools:
        """Heads that are on the other side in some part: each (samples, layers, heads, features)."""
        found = np.zeros(static.shape, bool)
        for part in parts:
            if samples < 2:
                found |= decision.static(part.mean(0)) != static
                continue
            interval = margins(part)
            found |= np.where(static, interval.high < 0, interval.low >= 0)
        return found

    overall = margins(values.mean(1))
    by_sample = values[..., 0].mean(1)
    kept_parts = {"samples": kept(values.mean(1))}
    reasons = {
        "interval": (overall.low < 0) & (overall.high >= 0),
        "samples": kept_parts["samples"] < CONFIDENCE,
    }
    for name in observations.scored.parts:
        parts = list(observations.parts(name).values())
        kept_parts[name] = kept(np.stack([part.mean(0) for part in parts]))
        reasons[name] = opposite(parts)
    return Stability(
        static=static,
        score=mean[..., 0],
        interval=percentile_interval(np.tensordot(weights, by_sample, 1), samples),
        margin=decision.margin(mean),
        spread=by_sample.std(0, ddof=1) if samples > 1 else np.full(static.shape, np.nan),
        kept_parts=kept_parts,
        kept=kept(values),
        reasons=reasons,
        samples=samples,
    )


def samples_needed(spread: Array, half_width: float) -> npt.NDArray[np.int64]:
    """Samples for a 95% interval of a mean score no wider than +- `half_width`, for each spread.

    n = (1.96 s / half_width)^2, at least 2. Raises ValueError where the spread is not known.
    """
    if not np.isfinite(spread).all():
        raise ValueError("one sample says nothing about the spread over samples")
    needed = np.ceil((NORMAL_QUANTILE * spread / half_width) ** 2)
    return np.maximum(needed, 2).astype(np.int64)
