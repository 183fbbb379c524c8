"""Which heads a plan is made with: those of a head map, counts of a map, or an assumption that is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.evidence import ModelIdentity, Rule
from forcingkv.headmaps.headmap import HeadMap, uniform
from forcingkv.runtime.plan import CachePlan, build_plan
from forcingkv.runtime.policies import Policy
from forcingkv.runtime.spec import Geometry, ModelSpec

__all__ = ["Given", "parse_counts", "plan_for", "spread"]


@dataclass(frozen=True)
class Given:
    """What is known of a model's heads: at most one of the two."""

    headmap: HeadMap | None = None
    counts: Mapping[str, int] | None = None
    """Label -> heads of the whole model."""

    @property
    def labels(self) -> set[str]:
        """The labels it speaks of."""
        if self.headmap is not None:
            return set(self.headmap.counts())
        return set(self.counts or ())


def spread(spec: ModelSpec, counts: Mapping[str, int]) -> HeadMap:
    """A map with so many heads of each label in the whole model, as evenly over the layers as can be.

    Raises InputError unless the counts add up to the model's heads.
    """
    total = spec.layers * spec.heads
    if sum(counts.values()) != total or min(counts.values()) < 0:
        raise InputError(
            f"{sum(counts.values())} heads are given",
            where="heads",
            expected=f"{total} in all, {spec.heads} in each of {spec.layers} layers",
        )
    # Labels in turn, each as soon as it has fallen behind its share of the heads so far.
    used = dict.fromkeys(counts, 0)
    order = []
    for place in range(1, total + 1):
        label = max(counts, key=lambda name: counts[name] * place / total - used[name])
        used[label] += 1
        order.append(label)
    rows = tuple(tuple(order[n * spec.heads : (n + 1) * spec.heads]) for n in range(spec.layers))
    return HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), rows, Rule("spread"))


def parse_counts(text: str) -> dict[str, int]:
    """Counts of the form "static=134,dynamic=226". Raises InputError for any other."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        label, _, number = (word.strip() for word in part.partition("="))
        if not label or not number.isdecimal() or label in counts:
            raise InputError(
                f"is {text!r}", where="--heads", expected="labels and numbers, such as static=134,dynamic=226"
            )
        counts[label] = int(number)
    return counts


def plan_for(
    spec: ModelSpec, geometry: Geometry, policy: Policy, given: Given | None = None
) -> tuple[CachePlan, str]:
    """The cache plan of a policy, and which heads it was made with, in words.

    A policy that needs labels and is given none that it knows is planned with the same label for every head:
    the one that takes most memory, as the check before a session does it.

    Raises InputError where map, segments or frames do not fit the model.
    """
    given = given or Given()
    if not policy.needs_headmap:
        return build_plan(spec, geometry, policy), "every head alike"
    if given.labels and given.labels <= set(policy.groups):
        headmap = given.headmap or spread(spec, given.counts or {})
        found = ", ".join(f"{number} {label}" for label, number in headmap.counts().items())
        words = found if given.headmap else f"{found}, spread evenly over the layers"
        return build_plan(spec, geometry, policy, headmap), words
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    plans = {label: build_plan(spec, geometry, policy, uniform(identity, label)) for label in policy.groups}
    label = max(plans, key=lambda name: plans[name].kv_bytes())
    return plans[label], f"assumed: every head {label}, which takes most"
