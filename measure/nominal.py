"""Which heads shapes and costs are derived for: the user's, those published, or an assumption.

Which head has which label is of no meaning in a map that is made here from numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap, ModelIdentity, Rule, uniform
from forcingkv.headmaps.reading import parse_json, parse_toml
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.spec import Geometry, ModelSpec

Heads = tuple[HeadMap, str]
"""A map, and a text with how many heads have each label and where that comes from."""
ANY_MODEL = "*"
GOLDEN = (5**0.5 - 1) / 2
"""The golden ratio: the fractional parts of its multiples never lie close together."""


def nominal_map(spec: ModelSpec, policy: Policy) -> HeadMap | None:
    """The map that ships for a model, or one with the published shares of labels; None for a policy without.

    Published labels are spread evenly over the layers. Raises InputError where there is neither for that
    model and policy.
    """
    if not policy.needs_headmap:
        return None
    known = known_map(spec, policy)
    if known is None:
        models = _published().get(policy.name, {})
        raise InputError(
            f"no head map of {spec.name} for the policy {policy.name} is published",
            where="headmap",
            expected=f"the model {' or '.join(models)}, or a map" if models else "a map",
            hint="Give one: --headmap FILE (forcingkv analyze heads makes it).",
        )
    return known[0]


def known_map(spec: ModelSpec, policy: Policy) -> Heads | None:
    """The map of `nominal_map`; None where there is none."""
    if shipped := shipped_map(spec, policy):
        return shipped, f"{in_words(shipped)}: the map that ships"
    models = _published().get(policy.name, {})
    published = models.get(spec.name, models.get(ANY_MODEL))
    # A policy of the same name may be a user's own, with other groups.
    if published is None or not set(published["heads"]) <= set(policy.groups):
        return None
    headmap = map_with_counts(spec, policy.groups, published["heads"])
    origin = "as published" if headmap.counts() == published["heads"] else "in published shares"
    if published.get("assumed"):
        origin = "in shares that are assumed, none are published"
    if "as" in published:
        origin += f" for {published['as']}, assumed for {spec.name} too"
    note = f" ({published['note']})" if "note" in published else ""
    return headmap, f"{in_words(headmap)} {origin}, spread evenly over the layers{note}"


def shipped_map(spec: ModelSpec, policy: Policy) -> HeadMap | None:
    """The map that ships for a model, where it is of that size and has labels of the policy."""
    shipped = _shipped(spec.name)
    same_size = shipped and (shipped.model.layers, shipped.model.heads) == (spec.layers, spec.heads)
    return shipped if shipped and same_size and set(shipped.counts()) <= set(policy.groups) else None


def plan_for(
    spec: ModelSpec, geometry: Geometry, policy: Policy, known: Heads | None = None
) -> tuple[CachePlan, str]:
    """The cache plan of a policy, and which heads it was made with, in words.

    A policy that needs labels and is given none that it knows is planned with `known_map`. Where there is
    none, every head has the same label: the one that takes most memory, as in the check before a session.

    Raises InputError where map, segments or frames do not fit the model.
    """
    if not policy.needs_headmap:
        return build_plan(spec, geometry, policy), "every head alike"
    if known is None or not set(known[0].counts()) <= set(policy.groups):
        known = known_map(spec, policy)
    if known is not None:
        headmap, words = known
        return build_plan(spec, geometry, policy, headmap), words
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    plans = {label: build_plan(spec, geometry, policy, uniform(identity, label)) for label in policy.groups}
    label = max(plans, key=lambda name: plans[name].kv_bytes())
    return plans[label], f"assumed: every head {label}, which takes most"


def check_map(spec: ModelSpec, policies: Sequence[Policy], headmap: HeadMap) -> None:
    """Raise InputError for a map that would be left out: of another model, or with labels of no policy."""
    labels = set(headmap.counts())
    if not any(labels <= set(policy.groups) for policy in policies):
        raise InputError(
            f"the heads given have the labels {', '.join(sorted(labels))}",
            expected="labels that one of the policies has groups for",
        )
    headmap.check_model(spec.layers, spec.heads, labels)


def spread(spec: ModelSpec, counts: Mapping[str, int]) -> Heads:
    """A map with exactly so many heads of each label in the whole model (`map_with_counts`).

    Raises InputError unless the counts add up to the model's heads.
    """
    total = spec.layers * spec.heads
    if sum(counts.values()) != total:
        raise InputError(
            f"{sum(counts.values())} heads are given",
            where="heads",
            expected=f"{total} in all, {spec.heads} in each of {spec.layers} layers",
        )
    headmap = map_with_counts(spec, counts, counts)
    return headmap, f"{in_words(headmap)}, spread evenly over the layers"


def map_with_counts(spec: ModelSpec, labels: Collection[str], counts: Mapping[str, int]) -> HeadMap:
    """A map in which labels have the shares of `counts`, as evenly over the layers as whole heads allow.

    Shares of the model's heads are rounded to whole heads. No two layers differ by more than one head of a
    label.

    `labels` are in the order in which heads of a layer get them; `counts` may be of a model of another size.
    Raises InputError for counts that are negative, or none of those labels.
    """
    shares = [counts.get(label, 0) for label in labels]
    if min(shares, default=0) < 0 or not sum(shares):
        raise InputError(
            f"are {dict(counts)}", where="heads", expected=f"some of the labels {', '.join(labels)}"
        )
    numbers = _whole(shares, spec.layers * spec.heads)
    heads = [label for label, number in zip(labels, numbers, strict=True) for _ in range(number)]
    # Sorted by label, heads are dealt to the layers like cards. Neighbouring layers take their turns far
    # apart, which spreads the heads that are left over evenly over the depth.
    turns = sorted(range(spec.layers), key=lambda layer: layer * GOLDEN % 1)
    rows = tuple(tuple(heads[turns.index(layer) :: spec.layers]) for layer in range(spec.layers))
    return HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), rows, Rule("given"))


def _whole(shares: Sequence[int], total: int) -> list[int]:
    """Whole numbers in those shares that add up to `total`: by largest remainder."""
    parts = [divmod(share * total, sum(shares)) for share in shares]
    missing = total - sum(whole for whole, _ in parts)
    largest = sorted(range(len(parts)), key=lambda place: -parts[place][1])[:missing]
    return [whole + (place in largest) for place, (whole, _) in enumerate(parts)]


def in_words(headmap: HeadMap) -> str:
    """Such as "134 static, 226 dynamic"."""
    return ", ".join(f"{number} {label}" for label, number in headmap.counts().items())


@cache
def _published() -> dict[str, dict[str, dict[str, Any]]]:
    """Policy -> model -> what is published; `nominal.toml` says what the fields mean."""
    said = parse_toml((resources.files(__package__) / "nominal.toml").read_bytes(), "nominal.toml")
    return {
        policy: said[models["labels_of"]] if "labels_of" in models else models
        for policy, models in said.items()
    }


@cache
def _shipped(model: str) -> HeadMap | None:
    maps = resources.files("forcingkv.headmaps") / "maps"
    file = maps / f"{model}.json"
    if file.name not in {one.name for one in maps.iterdir()}:  # a stranger's name may lead anywhere
        return None
    return HeadMap.from_json(parse_json(file.read_bytes(), str(file)), str(file))
