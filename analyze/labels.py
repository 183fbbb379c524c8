"""From observations to a head map: rules, each recorded in the map it makes.

A rule is a `Decision`: how far a head is from the boundary between static and dynamic, given its mean
features. It is found once, on all observations, and can then be asked of any part of them (a sample,
a step, a chunk), which is how stability is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from forcingkv.analyze.scores import FEATURES, Observations
from forcingkv.headmaps import DYNAMIC, STATIC, Rule
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of

RuleName = Literal["auto", "threshold", "quota", "kmeans", "mixture", "budget", "dummy"]

ALPHA = 0.8
"""The published threshold (METHOD.md section 2)."""
MIXTURE_POINTS = 20_000
"""Observations, drawn at random, that a mixture is fitted to at most."""
LEAST_SHARE = 1 / 6
"""A threshold that leaves fewer heads than this on one side does not split them."""

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Margin = Callable[[Array], Array]
"""Mean features (..., layers, heads, features) -> signed distance (..., layers, heads), static from 0 on."""


@dataclass(frozen=True)
class Decision:
    """A rule, applied."""

    rule: Rule
    margin: Margin
    cuts: Array | None = None
    """(layers,) score from which a head is static, for rules that cut the score."""

    def static(self, features: Array) -> Bools:
        """Whether heads with those mean features are static: (..., layers, heads)."""
        return self.margin(features) >= 0


def decide(
    observations: Observations, rule: RuleName, *, alpha: float = ALPHA, static_per_layer: int | None = None
) -> Decision:
    """Find the boundary of a rule.

    `threshold`: static from the score `alpha` on. `quota`: the `static_per_layer` highest scores of
    each layer are static (half, if None). `kmeans`: two clusters of heads by their mean log-ratios
    (see `scores.FEATURES`); the one with more recent mass is static; the margin is the distance from
    the line halfway. `mixture`: two Gaussians of one covariance, fitted to the observations; the margin
    is the log-odds. `auto`: the threshold where it splits the heads, else kmeans, with the reason.
    (`budget` asks for a plan, see `analyze.budget`; `dummy` for other classes, see `analyze.dummy`.)

    Raises InputError for a quota that no layer has, or heads that do not form two clusters, and
    ValueError for `budget` and `dummy`.
    """
    if rule in ("budget", "dummy"):
        raise ValueError(f"the rule {rule} asks for more than observations")
    features, sink = observations.mean(), observations.sink_frames
    if rule == "quota":
        return _quota(features[..., 0], static_per_layer, sink)
    reason = None
    if rule == "auto":
        share = float((features[..., 0] >= alpha).mean())
        rule = "threshold" if LEAST_SHARE <= share <= 1 - LEAST_SHARE else "kmeans"
        if rule == "kmeans":
            reason = f"the threshold {alpha} would make {share:.0%} of the heads static, which splits nothing"
    if rule == "threshold":
        return _cut(np.full(len(features), alpha), Rule("threshold", reason, alpha, sink_frames=sink))
    return _clusters(observations, "mixture" if rule == "mixture" else "kmeans", reason)


def least_static(scores: Array, static: int, rule: Rule) -> Decision:
    """The decision that makes the `static` highest of all scores (layers, heads) static."""
    return _cut(np.full(len(scores), _between(scores.ravel(), static)), rule)


def label_rows(static: Bools) -> tuple[tuple[str, ...], ...]:
    """The labels of a head map from whether each head is static: (layers, heads)."""
    return tuple(tuple(STATIC if value else DYNAMIC for value in row) for row in static.tolist())


def rule_name(name: str) -> RuleName:
    """The rule of that name. Raises InputError naming those there are."""
    found: RuleName = one_of(RuleName, name, "rule")
    return found


def _cut(cuts: Array, rule: Rule) -> Decision:
    return Decision(rule, lambda features: features[..., 0] - cuts[:, None], cuts)


def _quota(scores: Array, asked: int | None, sink: int) -> Decision:
    heads = scores.shape[1]
    quota = heads // 2 if asked is None else asked
    if not 0 <= quota <= heads:
        raise InputError(f"a quota of {quota} static heads", where="rule", expected=f"0 to {heads}")
    cuts = np.array([_between(row, quota) for row in scores])
    return _cut(cuts, Rule("quota", static_per_layer=quota, sink_frames=sink))


def _between(values: Array, count: int) -> float:
    """A cut with exactly `count` of the values at or above it (ties aside), halfway between two."""
    ordered = np.concatenate([[np.inf], np.sort(values)[::-1], [-np.inf]])
    above, below = ordered[count], ordered[count + 1]
    if np.isinf(above):
        return float(below) + 1
    return float(above) - 1 if np.isinf(below) else float((above + below) / 2)


def _clusters(observations: Observations, kind: Literal["kmeans", "mixture"], reason: str | None) -> Decision:
    points = observations.mean()[..., 1:].reshape(-1, len(FEATURES) - 1)
    if len(np.unique(points, axis=0)) < 2:
        raise InputError("all heads look alike", where="rule", expected="heads that form two clusters")
    if kind == "kmeans":
        centers = KMeans(n_clusters=2, n_init=10, random_state=0).fit(points).cluster_centers_
        static, dynamic = _by_recency(centers)
        normal = centers[static] - centers[dynamic]
        normal /= np.linalg.norm(normal)
        odds = 0.0
    else:
        # Fitted to observations, which are what it is asked of later; one covariance for both
        # components makes the boundary a line, so that no head can be too static for its cluster.
        every = observations.values[..., 1:].reshape(-1, points.shape[1])
        if len(every) > MIXTURE_POINTS:
            drawn = np.random.default_rng(0).choice(len(every), MIXTURE_POINTS, replace=False)
            every = every[np.sort(drawn)]
        mixture = GaussianMixture(2, covariance_type="tied", n_init=5, reg_covar=1e-3, random_state=0)
        centers = mixture.fit(every).means_
        static, dynamic = _by_recency(centers)
        normal = mixture.precisions_ @ (centers[static] - centers[dynamic])
        odds = float(np.log(mixture.weights_[static] / mixture.weights_[dynamic]))
    constant = odds - float(normal @ (centers[static] + centers[dynamic])) / 2
    rule = Rule(
        kind,
        reason,
        sink_frames=observations.sink_frames,
        static_center=_rounded(centers[static]),
        dynamic_center=_rounded(centers[dynamic]),
        boundary=_rounded([*normal, constant]),
    )
    return Decision(rule, lambda features: np.asarray(features[..., 1:] @ normal + constant))


def _by_recency(centers: Array) -> tuple[int, int]:
    """Which center is static: ratios to the history add up to recent mass over history, as in a score."""
    static, dynamic = (int(index) for index in np.argsort(-np.exp(centers).sum(1)))
    return static, dynamic


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)
