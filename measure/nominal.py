"""Head maps for shapes and costs, where none was given: with as many heads a label as published ones have."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.policies import Policy
from forcingkv.runtime.spec import ModelSpec

__all__ = ["map_with_counts", "nominal_map"]

ANY_MODEL = "*"


def nominal_map(spec: ModelSpec, policy: Policy) -> HeadMap | None:
    """The map that ships for a model; or one with the published shares of labels, spread evenly, in which it
    says nothing which head has which. None for a policy that needs none.

    Raises InputError where there is neither for that model and policy.
    """
    if not policy.needs_headmap:
        return None
    shipped = resources.files("forcingkv.headmaps") / "maps" / f"{spec.name}.json"
    if shipped.is_file():
        headmap = HeadMap.from_json(json.loads(shipped.read_text(encoding="utf-8")), str(shipped))
        if set(headmap.counts()) <= set(policy.groups):
            return headmap
    text = (resources.files(__package__) / "nominal.toml").read_text(encoding="utf-8")
    counts = tomllib.loads(text).get(policy.name, {})
    found = counts.get(spec.name, counts.get(ANY_MODEL))
    if found is None:
        raise InputError(
            f"no head map of {spec.name} for the policy {policy.name} is published",
            where="headmap",
            expected=f"one of {', '.join(counts) or 'the shipped policies'}, or a map",
            mend="Give one: --headmap FILE (forcingkv analyze heads makes it).",
        )
    return map_with_counts(spec, policy.groups, found)


def map_with_counts(
    spec: ModelSpec, labels: Sequence[str] | Mapping[str, object], counts: Mapping[str, int]
) -> HeadMap:
    """A map in which labels have the shares of `counts`, as evenly over the layers as whole heads allow.

    Args:
        spec: the model.
        labels: in the order in which heads of a layer get them.
        counts: heads of each label, of a model of any size.
    """
    wanted = [counts.get(label, 0) / sum(counts.values()) * spec.heads for label in labels]
    rows, given = [], [0] * len(wanted)
    for layer in range(spec.layers):
        row = _whole(
            [(layer + 1) * share - had for share, had in zip(wanted, given, strict=True)], spec.heads
        )
        given = [had + now for had, now in zip(given, row, strict=True)]
        rows.append(tuple(label for label, heads in zip(labels, row, strict=True) for _ in range(heads)))
    return HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), tuple(rows), Rule("given"))


def _whole(due: Sequence[float], total: int) -> list[int]:
    """Whole numbers near `due` that add up to `total`: by largest remainder."""
    floors = [max(0, int(share)) for share in due]
    order = sorted(range(len(due)), key=lambda i: floors[i] - due[i])
    for place in range(total - sum(floors)):
        floors[order[place % len(order)]] += 1
    return floors
