"""Which heads a plan is made with: the user's, published ones, or an assumption, which is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap, ModelIdentity, uniform
from forcingkv.measure.nominal import heads_in_words, known_map, map_with_counts
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.spec import Geometry, ModelSpec


@dataclass(frozen=True)
class KnownHeads:
    """What the user knows of a model's heads: a map, or how many have each label."""

    headmap: HeadMap | None = None
    counts: Mapping[str, int] | None = None
    """Label -> heads of the whole model."""

    @property
    def labels(self) -> set[str]:
        """The labels that its heads have."""
        if self.headmap is not None:
            return set(self.headmap.counts())
        return set(self.counts or ())


def spread(spec: ModelSpec, counts: Mapping[str, int]) -> HeadMap:
    """A map with exactly so many heads of each label in the whole model (`measure.nominal.map_with_counts`).

    Raises InputError unless the counts add up to the model's heads.
    """
    total = spec.layers * spec.heads
    if sum(counts.values()) != total or min(counts.values()) < 0:
        raise InputError(
            f"{sum(counts.values())} heads are given",
            where="heads",
            expected=f"{total} in all, {spec.heads} in each of {spec.layers} layers",
        )
    return map_with_counts(spec, counts, counts)


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
    spec: ModelSpec, geometry: Geometry, policy: Policy, known: KnownHeads | None = None
) -> tuple[CachePlan, str]:
    """The cache plan of a policy, and which heads it was made with, in words.

    A policy that needs labels and is given none that it knows is planned with the map that ships for the
    model, or with published counts (`measure.nominal`). Where there are neither, every head has the same
    label: the one that takes most memory, as the check before a session does it.

    Raises InputError where map, segments or frames do not fit the model.
    """
    known = known or KnownHeads()
    if not policy.needs_headmap:
        return build_plan(spec, geometry, policy), "every head alike"
    if known.labels and known.labels <= set(policy.groups):
        headmap = known.headmap or spread(spec, known.counts or {})
        found = heads_in_words(headmap)
        words = found if known.headmap else f"{found}, spread evenly over the layers"
        return build_plan(spec, geometry, policy, headmap), words
    published = known_map(spec, policy)
    if published is not None:
        headmap, words = published
        return build_plan(spec, geometry, policy, headmap), words
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    plans = {label: build_plan(spec, geometry, policy, uniform(identity, label)) for label in policy.groups}
    label = max(plans, key=lambda name: plans[name].kv_bytes())
    return plans[label], f"assumed: every head {label}, which takes most"
