"""The variants of an ablation as data: sweeps in `variants.toml`, each of which varies one thing."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.runtime.policies import Policy, load_policy

REFERENCE, PROFILED = "full", "forcing-kv"
"""The variants that the others are compared with; they are in every study."""

MapKind = Literal[
    "profiled", "dummy", "threshold", "static", "dynamic", "inverted", "random", "random-in-layer"
]
"""Which head map: the model's own; those that a rule makes of its statistics; controls that look at none."""

PER_VALUE = ("threshold", "random", "random-in-layer")
"""Kinds of which there is a map for each value: an alpha, or the number of a draw."""


@dataclass(frozen=True)
class MapWanted:
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
    """Whether the values are draws of the same thing, to be told together."""


@dataclass(frozen=True)
class _Study:
    sweep: tuple[Sweep, ...]


@dataclass(frozen=True)
class Variant:
    """A policy and the head map it is to be run with."""

    family: str
    name: str
    policy: Policy
    wanted: MapWanted
    draw: int | None = None
    """Number of the draw, from 1, where several variants are draws of the same thing."""


def read_variants(path: Path | None = None) -> list[Variant]:
    """The variants of a file; None: those that ship.

    Raises InputError naming the file and field that is wrong, or the variants that are missing.
    """
    where = str(path) if path else "variants.toml"
    source = path or resources.files(__package__).joinpath("variants.toml")
    try:
        data = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as TOML ({error})", where=where) from error
    variants = [v for sweep in from_data(_Study, data, where).sweep for v in _variants_of(sweep, where)]
    names = [(variant.name, variant.draw) for variant in variants]
    for name in (REFERENCE, PROFILED):
        if (name, None) not in names:
            raise InputError(f"has no variant {name!r}", where=where, expected="it, to compare others with")
    twins = [name for name in names if names.count(name) > 1]
    if twins:
        raise InputError(f"names {twins[0][0]!r} twice", where=where, expected="a name for each variant")
    return variants


def changed(policy: Policy, fields: Mapping[str, Any], where: str) -> Policy:
    """The policy with other values at those dotted names. Raises InputError for a name that it has not."""
    data = to_data(policy)
    for dotted, value in fields.items():
        *tables, last = dotted.split(".")
        table = data
        for name in tables:
            table = table.get(name)
            if not isinstance(table, dict):
                raise InputError(f"{policy.name} has no {dotted}", where=where, expected="one of its fields")
        table[last] = value
    return from_data(Policy, data, where)


def _variants_of(sweep: Sweep, where: str) -> list[Variant]:
    base = load_policy(sweep.policy)
    named = [sweep.name.format(value=value) for value in sweep.values]
    variants = []
    for number, (value, name) in enumerate(zip(sweep.values, named, strict=True), 1):
        place = f"{where}: {name}"
        fields = dict(sweep.fixed) | ({sweep.vary: value} if sweep.vary else {})
        per_value = sweep.headmap in PER_VALUE
        if (sweep.vary is None) != (per_value or sweep.values == (None,)):
            raise InputError("its values have no place", where=place, expected="a field, or a map for each")
        wanted = MapWanted(sweep.headmap, value if per_value else None)
        policy = replace(changed(base, fields, place), name=name)
        variants.append(Variant(sweep.family, name, policy, wanted, number if sweep.draws else None))
    return variants
