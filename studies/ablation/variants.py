"""The variants of an ablation as data: sweeps in `variants.toml`, each of which varies one thing.

And the head maps that look at no statistics: what a profiled map has to beat.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap, Rule
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.headmaps.headmap import uniform
from forcingkv.headmaps.reading import parse_toml, read_content
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.roles import Role

REFERENCE, PROFILED = "full", "forcing-kv"
"""The variants that the others are compared with; they are in every study."""

MapKind = Literal[
    "profiled",
    "dummy",
    "threshold",
    "static",
    "dynamic",
    "inverted",
    "random",
    "random-in-layer",
    "dummy-random",
    "shares",
]
"""Which head map: the model's own; those that a rule makes of its statistics; controls that look at none, of
the profiled map or of `dummy`; and labels in published shares, where no rule is known that makes them."""

SHIPPED = Path(__file__).with_name("variants.toml")
PER_VALUE = ("threshold", "random", "random-in-layer", "dummy-random", "shares")
"""Kinds of which there is a map for each value: an alpha, or the number of a draw."""


@dataclass(frozen=True)
class WantedMap:
    """A head map by what it is made by."""

    kind: MapKind
    value: float | None = None


@dataclass(frozen=True)
class Sweep:
    """Variants that differ in one value."""

    family: str
    name: str
    """Of each variant; {value} stands for its value."""
    policy: str = "forcing-kv"
    headmap: MapKind = "profiled"
    vary: str | None = None
    """Dotted name of the policy's field that takes the values. None: they are the map's."""
    values: tuple[Any, ...] = (None,)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the policy that differ from its file in all variants."""
    draws: bool = False
    """Whether the values are draws of the same thing, reported as one row."""


@dataclass(frozen=True)
class _Study:
    sweep: tuple[Sweep, ...]


@dataclass(frozen=True)
class Variant:
    """A policy and the head map it is to be run with."""

    family: str
    name: str
    policy: Policy
    wanted: WantedMap
    draw: int | None = None
    """Number of the draw, from 1, where several variants are draws of the same thing."""


def read_variants(path: Path | None = None) -> list[Variant]:
    """The variants of a file; None: those that ship.

    Raises InputError naming the file and field that is wrong, or the variants that are missing.
    """
    where = str(path) if path else SHIPPED.name
    data = parse_toml(read_content(path or SHIPPED), where)
    variants = [v for sweep in from_data(_Study, data, where).sweep for v in _variants_of(sweep, where)]
    names = [(variant.name, variant.draw) for variant in variants]
    for name in (REFERENCE, PROFILED):
        if (name, None) not in names:
            raise InputError(
                f"has no variant {name!r}", where=where, expected="one, since the others are compared with it"
            )
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(f"names {repeated[0][0]!r} twice", where=where, expected="a name for each variant")
    return variants


def changed(policy: Policy, fields: Mapping[str, Any], where: str) -> Policy:
    """The policy with other values at those dotted names, such as `groups.dynamic.retained.ratio`.

    A role set to false is left out. Raises InputError for a name that the policy does not have.
    """
    data = to_data(policy)
    for dotted, value in fields.items():
        *tables, last = dotted.split(".")
        table = data
        for name in tables:
            table = _entry(table, name)
            if table is None:
                raise InputError(f"{policy.name} has no {dotted}", where=where, expected="one of its fields")
        if isinstance(table, list) and value is False:
            table.remove(_entry(table, last))
        else:
            table[last] = value
    return from_data(Policy, data, where)


def _entry(table: Any, name: str) -> Any:
    """A field of a table, or of a list of roles the one of that name; None where there is none."""
    if isinstance(table, list):
        return next((role for role in table if role[Role.TAG] == name), None)
    return table.get(name) if isinstance(table, dict) else None


def _variants_of(sweep: Sweep, where: str) -> list[Variant]:
    base = load_policy(sweep.policy)
    named = [sweep.name.format(value=value) for value in sweep.values]
    variants = []
    for number, (value, name) in enumerate(zip(sweep.values, named, strict=True), 1):
        place = f"{where}: {name}"
        fields = dict(sweep.fixed) | ({sweep.vary: value} if sweep.vary else {})
        per_value = sweep.headmap in PER_VALUE
        if (sweep.vary is None) != (per_value or sweep.values == (None,)):
            raise InputError(
                "the sweep has values but nothing that takes them, or the reverse",
                where=place,
                expected="values together with `vary`, or with a kind of map that is made for each value",
            )
        wanted = WantedMap(sweep.headmap, value if per_value else None)
        policy = replace(changed(base, fields, place), name=name)
        variants.append(Variant(sweep.family, name, policy, wanted, number if sweep.draws else None))
    return variants


def control_map(wanted: WantedMap, profiled: HeadMap, unsplit: Collection[int]) -> HeadMap:
    """A control of the kind and draw that is wanted.

    Args:
        wanted: `static`, `dynamic`, `inverted`, `random-in-layer` (as many of each label in each layer as the
            map has), or another (as many in all); its value is the number of the draw.
        profiled: the map that it is a control of.
        unsplit: layers whose labels the policy does not read. They keep theirs: heads moved there would
            change how many are compressed.

    Raises ValueError for a kind that needs statistics.
    """
    if wanted.kind in ("static", "dynamic"):
        return uniform(profiled.model, STATIC if wanted.kind == "static" else DYNAMIC)
    split = [layer for layer in range(profiled.model.layers) if layer not in unsplit]
    labels = [list(profiled.labels[layer]) for layer in split]
    if wanted.kind == "inverted":
        other = {STATIC: DYNAMIC, DYNAMIC: STATIC}
        labels = [[other[label] for label in row] for row in labels]
    elif wanted.kind in ("random", "random-in-layer", "dummy-random", "shares"):
        # The kind is part of the seed, so that draw 1 of one is not draw 1 of the other.
        rng = np.random.default_rng((zlib.crc32(wanted.kind.encode()), int(wanted.value or 0)))
        labels = _shuffled(labels, rng, wanted.kind == "random-in-layer")
    else:
        raise ValueError(f"a map of the kind {wanted.kind} needs statistics")
    rows = dict(zip(split, labels, strict=True))
    return HeadMap(
        profiled.model,
        tuple(tuple(rows.get(layer, row)) for layer, row in enumerate(profiled.labels)),
        Rule(wanted.kind),
    )


def _shuffled(labels: list[list[str]], rng: np.random.Generator, in_layer: bool) -> list[list[str]]:
    if in_layer:
        return [rng.permutation(row).tolist() for row in labels]
    shape = len(labels), len(labels[0])
    drawn: list[list[str]] = rng.permutation(np.array(labels).ravel()).reshape(shape).tolist()
    return drawn
