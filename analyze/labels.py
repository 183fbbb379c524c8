"""From observations to a head map: rules, each recorded in the map it makes.

A rule is a `Decision`: how far a head is from the boundary between static and dynamic, given its mean
features. It is found once, on all observations, and can then be asked of any part of them (a sample,
a step, a chunk), which is how stability is judged.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from forcingkv.analyze.scores import FEATURES, Observations, frame_mass
from forcingkv.analyze.scoring import Scored
from forcingkv.analyze.storage import Recorded
from forcingkv.headmaps import DYNAMIC, STATIC, Budget, HeadMap, InputError, ModelIdentity, Rule, Statistics
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.kv.classes import dummy_classes, labels_of
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec

ALPHA = 0.8
"""The published threshold (`docs/method.md`, "Head profile")."""
DUMMY_SINK_FRAMES = 1
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


@dataclass(frozen=True)
class RuleKind:
    """What is known of a rule before it is applied."""

    policy: str = "forcing-kv"
    """The policy that uses its labels."""
    compared: bool = False
    """Whether a report sets its map beside those of others."""
    fixes_count: bool = False
    """Whether it says how many heads have a label: its undecided heads then keep theirs."""
    classes: Callable[[Recorded, Scored, Array], HeadMap] | None = None
    """For labels that are not two sides of a boundary: their map, from what was recorded, what of it is
    scored, and mean scores (layers, heads). Not this map but that of the rule `auto` is judged."""
    origin: str = ""
    """The project whose classes those are."""


def context_mass(recorded: Recorded, scored: Scored) -> Array:
    """Mean mass of each head on the first frame and on the context after it: (2, layers, heads)."""
    found = frame_mass(recorded, scored)
    sink = found.key_frame < DUMMY_SINK_FRAMES
    neighbour = ~sink & (found.key_frame < found.first)
    return np.stack([found.share(mask).mean((0, 1)) for mask in (sink, neighbour)])


def label_dummies(mass: Array, scores: Array, model: ModelIdentity, statistics: Statistics) -> HeadMap:
    """The classes of Dummy Forcing (csguoh/DummyForcing), found offline instead of anew for each video.

    By `dummy_classes`, half of all heads dummies as in its released settings. Mass is that of `context_mass`;
    scores (layers, heads) and statistics go into the map.
    """
    dummies = mass[0].size // 2
    rows = dummy_classes(mass, dummies)
    return HeadMap(
        model=model,
        labels=labels_of(rows),
        rule=Rule("dummy", sink_frames=DUMMY_SINK_FRAMES, dummy_heads=dummies),
        scores=rounded_rows(scores),
        statistics=statistics,
    )


RULES: dict[str, RuleKind] = {
    "auto": RuleKind(),
    "threshold": RuleKind(compared=True),
    "quota": RuleKind(compared=True, fixes_count=True),
    "kmeans": RuleKind(compared=True),
    "mixture": RuleKind(compared=True),
    "budget": RuleKind(fixes_count=True),
    "dummy": RuleKind(
        "dummy-forcing",
        fixes_count=True,
        classes=lambda recorded, scored, scores: label_dummies(
            context_mass(recorded, scored),
            scores,
            recorded.recording.model,
            scored.measured(recorded.recording, len(recorded.samples)),
        ),
        origin="Dummy Forcing",
    ),
}
"""Every rule by its name. One with labels of its own is an entry here and a policy that uses them."""


def policy_of(headmap: HeadMap) -> str:
    """The policy that uses the labels of a map: of those of the rules the first that knows all of them."""
    policies = list(dict.fromkeys(kind.policy for kind in RULES.values()))
    used = set(headmap.counts())
    return next((name for name in policies if used <= set(load_policy(name).groups)), policies[0])


def decide(
    observations: Observations, rule: str, *, alpha: float = ALPHA, static_per_layer: int | None = None
) -> Decision:
    """Find the boundary of a rule.

    `threshold`: static from the score `alpha` on. `quota`: the `static_per_layer` highest scores of
    each layer are static (half, if None). `kmeans`: two clusters of heads by their mean log-ratios
    (see `scores.FEATURES`); the one with more recent mass is static; the margin is the distance from
    the line halfway. `mixture`: two Gaussians of one covariance, fitted to the observations; the margin
    is the log-odds. `auto`: the threshold where it splits the heads, else kmeans, with the reason.
    (`budget` needs a plan, see `decide_budget`; `dummy` has other classes, see `label_dummies`.)

    Raises InputError for a quota that no layer has, or heads that do not form two clusters, and
    ValueError for `budget` and `dummy`.
    """
    if rule == "budget" or RULES[rule].classes:
        raise ValueError(f"the rule {rule} needs more than observations")
    found, scored = _decide(observations, rule, alpha, static_per_layer), observations.scored
    named = replace(found.rule, sink_frames=scored.sink_frames, recent_frames=scored.recent_frames)
    return replace(found, rule=named)


def _decide(observations: Observations, rule: str, alpha: float, static_per_layer: int | None) -> Decision:
    """As `decide`; the rule does not say yet which frames a score counts."""
    features = observations.mean()
    if rule == "quota":
        return _quota(features[..., 0], static_per_layer)
    reason = None
    if rule == "auto":
        share = float((features[..., 0] >= alpha).mean())
        rule = "threshold" if LEAST_SHARE <= share <= 1 - LEAST_SHARE else "kmeans"
        if rule == "kmeans":
            reason = f"the threshold {alpha} would make {share:.0%} of the heads static, which splits nothing"
    if rule == "threshold":
        return _cut(np.full(len(features), alpha), Rule("threshold", reason, alpha))
    return _clusters(observations, rule, reason)


def decide_budget(
    scores: Array, spec: ModelSpec, budget: Budget, sink_frames: int, recent_frames: int | None = None
) -> Decision:
    """The rule `budget`: as many dynamic heads as a target of memory or time allows.

    Dynamic heads cost more than static ones. The heads with the lowest recency scores stay dynamic for as
    long as the target is met, and the others are made static.

    Args:
        scores: mean recency scores (layers, heads).
        spec: the model.
        budget: exactly one target: bytes of keys and values in the model's dtype, or predicted time
            over that of `full`. Time is predicted as operations (`runtime.cost`): what a machine
            that does nothing but arithmetic would need.
        sink_frames: frames left out of the scores' denominators, to be recorded.
        recent_frames: newest key frames of their numerators, to be recorded.

    Raises:
        InputError: no target or two, or one that even all static heads do not meet.
    """
    cost, target, unit = _target(spec, budget)
    heads = scores.size
    order = np.argsort(scores, axis=None, kind="stable")

    def cost_with(dynamic: int) -> float:
        """The cost of so many dynamic heads; it rises with their number."""
        static = np.ones(heads, bool)
        static[order[:dynamic]] = False
        return cost(plan_for(spec, static.reshape(scores.shape), budget))

    dynamic = bisect_right(range(heads + 1), target, key=cost_with) - 1
    if dynamic < 0:
        # Rounded up, so that what is named can be asked for.
        least = math.ceil(cost_with(0) * 1e6) / 1e6
        raise InputError(
            f"the target {target:.15g} {unit} cannot be met",
            where="budget",
            expected=f"at least {least:.15g} {unit}, which is what static heads alone take",
        )
    rule = Rule("budget", sink_frames=sink_frames, recent_frames=recent_frames, budget=budget)
    return least_static(scores, heads - dynamic, rule)


def plan_for(spec: ModelSpec, static: npt.NDArray[np.bool_], budget: Budget) -> CachePlan:
    """The plan of the budget's policy with those heads static (layers, heads)."""
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    headmap = HeadMap(identity, label_rows(static), Rule("budget"))
    return build_plan(spec, spec.geometry(budget.resolution), load_policy(budget.policy), headmap)


def least_static(scores: Array, static: int, rule: Rule) -> Decision:
    """The decision that makes the `static` highest of all scores (layers, heads) static."""
    return _cut(np.full(len(scores), _between(scores.ravel(), static)), rule)


def label_rows(static: Bools) -> tuple[tuple[str, ...], ...]:
    """The labels of a head map from whether each head is static: (layers, heads)."""
    return tuple(tuple(STATIC if value else DYNAMIC for value in row) for row in static.tolist())


def rounded_rows(values: Array) -> tuple[tuple[float, ...], ...]:
    """Values (layers, heads) as a head map holds them."""
    return tuple(_rounded(row) for row in values)


def _cut(cuts: Array, rule: Rule) -> Decision:
    return Decision(rule, lambda features: features[..., 0] - cuts[:, None], cuts)


def _quota(scores: Array, asked: int | None) -> Decision:
    heads = scores.shape[1]
    quota = heads // 2 if asked is None else asked
    if not 0 <= quota <= heads:
        what = f"cannot make {quota} heads of each layer static"
        raise InputError(what, where="the rule quota", expected=f"0 to {heads}")
    cuts = np.array([_between(row, quota) for row in scores])
    return _cut(cuts, Rule("quota", static_per_layer=quota))


def _between(values: Array, count: int) -> float:
    """A cut with exactly `count` of the values at or above it (ties aside), halfway between two."""
    ordered = np.concatenate([[np.inf], np.sort(values)[::-1], [-np.inf]])
    above, below = ordered[count], ordered[count + 1]
    if np.isinf(above):
        return float(below) + 1
    return float(above) - 1 if np.isinf(below) else float((above + below) / 2)


def _clusters(observations: Observations, kind: str, reason: str | None) -> Decision:
    """`kmeans` or `mixture`."""
    from sklearn.cluster import KMeans  # two seconds to load, which workers that record do without
    from sklearn.mixture import GaussianMixture

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


def _target(spec: ModelSpec, budget: Budget) -> tuple[Callable[[CachePlan], float], float, str]:
    if (budget.kv_bytes is None) == (budget.time_ratio is None):
        raise InputError(
            "names no target, or two",
            where="budget",
            expected="bytes of KV or a share of the time under full",
            hint="Give one of --target-kv and --target-time.",
        )
    if budget.kv_bytes is not None:
        return (lambda plan: plan.kv_bytes(spec.dtype)), budget.kv_bytes, "bytes"
    assert budget.time_ratio is not None
    full = chunk_flops(build_plan(spec, spec.geometry(budget.resolution), load_policy("full")))
    return (lambda plan: chunk_flops(plan) / full), budget.time_ratio, "of the time under full"
