"""Head maps for shapes and costs where the user gives none: as many heads of each label as published."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.spec import ModelSpec

ANY_MODEL = "*"
GOLDEN = (5**0.5 - 1) / 2
"""The golden ratio: the fractional parts of its multiples never lie close together."""


@dataclass(frozen=True)
class _Published:
    """What is published about a policy's heads; `nominal.toml` says what its fields mean."""

    heads: Mapping[str, int]
    note: str | None = None


def nominal_map(spec: ModelSpec, policy: Policy) -> HeadMap | None:
    """The map that ships for a model, or one with the published shares of labels; None for a policy without.

    Published labels are spread evenly over the layers: which head has which label is of no meaning there.
    Raises InputError where there is neither for that model and policy.
    """
    if not policy.needs_headmap:
        return None
    known = known_map(spec, policy)
    if known is None:
        models = _file().get(policy.name, {})
        raise InputError(
            f"no head map of {spec.name} for the policy {policy.name} is published",
            where="headmap",
            expected=f"one of {', '.join(models) or 'the shipped policies'}, or a map",
            hint="Give one: --headmap FILE (forcingkv analyze heads makes it).",
        )
    return known[0]


def known_map(spec: ModelSpec, policy: Policy) -> tuple[HeadMap, str] | None:
    """The map of `nominal_map`, and a text with its heads and their origin; None where there is none."""
    shipped = _shipped(spec.name)
    if shipped and _fits(shipped, spec, policy):
        return shipped, f"{heads_in_words(shipped)}: the map that ships"
    published = _published(spec, policy)
    if published is None:
        return None
    headmap = map_with_counts(spec, policy.groups, published.heads)
    origin = "as published" if headmap.counts() == published.heads else "in published shares"
    note = f" ({published.note})" if published.note else ""
    return headmap, f"{heads_in_words(headmap)} {origin}, spread evenly over the layers{note}"


def heads_in_words(headmap: HeadMap) -> str:
    """Such as "134 static, 226 dynamic"."""
    return ", ".join(f"{number} {label}" for label, number in headmap.counts().items())


def map_with_counts(
    spec: ModelSpec, labels: Sequence[str] | Mapping[str, object], counts: Mapping[str, int]
) -> HeadMap:
    """A map in which labels have the shares of `counts`, as evenly over the layers as whole heads allow.

    Shares of the model's heads are rounded to whole heads. No two layers differ by more than one head of a
    label.

    Args:
        spec: the model.
        labels: in the order in which heads of a layer get them.
        counts: heads of each label, of a model of any size.

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


@cache
def _file() -> dict[str, dict[str, _Published]]:
    """Policy -> model -> what is published."""
    text = (resources.files(__package__) / "nominal.toml").read_text(encoding="utf-8")
    return {
        policy: {
            model: from_data(_Published, entry, f"nominal.toml: {policy}.{model}")
            for model, entry in models.items()
        }
        for policy, models in tomllib.loads(text).items()
    }


def _published(spec: ModelSpec, policy: Policy) -> _Published | None:
    models = _file().get(policy.name, {})
    found = models.get(spec.name, models.get(ANY_MODEL))
    # A policy of the same name may be a user's own, with other groups.
    return found if found and set(found.heads) <= set(policy.groups) else None


@cache
def _shipped(model: str) -> HeadMap | None:
    file = resources.files("forcingkv.headmaps") / "maps" / f"{model}.json"
    if not file.is_file():
        return None
    return HeadMap.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))


def _fits(headmap: HeadMap, spec: ModelSpec, policy: Policy) -> bool:
    same = (headmap.model.layers, headmap.model.heads) == (spec.layers, spec.heads)
    return same and set(headmap.counts()) <= set(policy.groups)
