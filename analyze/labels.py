"""From scores to a head map: each rule is recorded in the map it makes."""

from __future__ import annotations

from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.cluster import KMeans

from forcingkv.analyze.scores import mean_scores
from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap, ModelIdentity, Rule, Statistics
from forcingkv.headmaps.errors import InputError

__all__ = ["ALPHA", "RuleName", "label_heads", "rule_name"]

RuleName = Literal["auto", "threshold", "quota", "clusters", "dummy"]

ALPHA = 0.8
"""The published threshold (METHOD.md section 2)."""
LEAST_SHARE = 1 / 6
"""A threshold that leaves fewer heads than this on one side does not split them."""

Array = npt.NDArray[np.float64]


def label_heads(
    scores: pl.DataFrame,
    model: ModelIdentity,
    rule: RuleName,
    *,
    alpha: float = ALPHA,
    static_per_layer: int | None = None,
    sink_frames: int,
    statistics: Statistics,
) -> HeadMap:
    """Label every head from its mean score.

    Rules: `threshold`: static from `alpha` on. `quota`: the `static_per_layer` highest of each layer
    are static (half, if None). `clusters`: two means of all heads' scores; the cut lies halfway
    between them. `auto`: the threshold where it splits the heads, else clusters, with the reason.
    (`dummy` asks for more than scores: see `analyze.dummy`.)

    The confidence of a head is the share of its observations (samples, chunks, steps) that, taken
    alone, would give it the label it has.
    """
    means = mean_scores(scores)
    reason = None
    if rule == "auto":
        share = float((means >= alpha).mean())
        rule = "threshold" if LEAST_SHARE <= share <= 1 - LEAST_SHARE else "clusters"
        if rule == "clusters":
            reason = f"the threshold {alpha} would make {share:.0%} of the heads static, which splits nothing"
    if rule == "quota":
        quota = means.shape[1] // 2 if static_per_layer is None else static_per_layer
        if not 0 <= quota <= means.shape[1]:
            raise InputError(
                f"a quota of {quota} static heads", where="rule", expected=f"0 to {means.shape[1]}"
            )
        cuts = _quota_cuts(means, quota)
        recorded = Rule("quota", static_per_layer=quota, sink_frames=sink_frames)
    else:
        cut = round(alpha if rule == "threshold" else _cluster_cut(means), 6)
        cuts = np.full(len(means), cut)
        recorded = Rule(rule, reason=reason, alpha=cut, sink_frames=sink_frames)
    static = means >= cuts[:, None]
    return HeadMap(
        model=model,
        labels=tuple(tuple(STATIC if s else DYNAMIC for s in row) for row in static.tolist()),
        rule=recorded,
        scores=_rows(means),
        confidence=_rows(_confidence(scores, static, cuts)),
        statistics=statistics,
    )


def rule_name(name: str) -> RuleName:
    """The rule of that name. Raises InputError naming those there are."""
    for known in get_args(RuleName):
        if name == known:
            return cast(RuleName, known)
    raise InputError(
        f"there is no rule {name!r}", where="rule", expected=f"one of {', '.join(get_args(RuleName))}"
    )


def _quota_cuts(means: Array, quota: int) -> Array:
    """For each layer a cut with exactly `quota` heads at or above it."""
    padded = np.pad(-np.sort(-means, axis=1), ((0, 0), (1, 1)), constant_values=((0, 0), (np.inf, -np.inf)))
    return np.asarray((padded[:, quota] + padded[:, quota + 1]) / 2)


def _cluster_cut(means: Array) -> float:
    found = KMeans(n_clusters=2, n_init=10, random_state=0).fit(means.reshape(-1, 1))
    return float(found.cluster_centers_.mean())


def _confidence(scores: pl.DataFrame, static: npt.NDArray[np.bool_], cuts: Array) -> Array:
    layer, head = scores["layer"].to_numpy(), scores["head"].to_numpy()
    agrees = (scores["score"].to_numpy() >= cuts[layer]) == static[layer, head]
    agreed = scores.with_columns(score=pl.Series(agrees.astype(np.float64)))
    return mean_scores(agreed)


def _rows(values: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(v), 6) for v in row) for row in values)
