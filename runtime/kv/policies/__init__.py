"""Cache policies as data: one TOML file each, read into a `Policy`.

A policy names groups of heads by their label in the head map, and lists for each the roles of cached tokens
that it sees beside the current chunk, in the order in which attention sees them. The group name `all` stands
for every head and needs no head map. A table `[about]` says where a policy comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, check_bounds, from_data
from forcingkv.headmaps.headmap import MOST
from forcingkv.runtime.kv.bank import Bank
from forcingkv.runtime.kv.early import Early, Opening
from forcingkv.runtime.kv.ema import Ema
from forcingkv.runtime.kv.merged import Merged
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.kv.scenes import Scene
from forcingkv.runtime.kv.strided import Strided
from forcingkv.runtime.kv.tokens import Tokens
from forcingkv.runtime.shipped import read_table, shipped_names
from forcingkv.runtime.spec import MOST_FRAMES, Positions

Role.KINDS.update(
    {
        kind.name: kind
        for kind in (Sink, Retained, Recent, Early, Opening, Scene, Ema, Strided, Merged, Bank, Tokens)
    }
)

ALL = "all"
"""The group of every head, in policies that need no head map."""
ABOUT = "about"
"""The table of a policy's file that is for people alone."""
MOST_GROUPS = 16
"""Groups of heads; those that ship have three at most."""


@dataclass(frozen=True)
class Unsplit:
    """Layers whose heads are all treated as one group."""

    layers: tuple[int, ...]
    group: str

    def __post_init__(self) -> None:
        check_bounds(self, {"layers": (0, MOST)}, "unsplit")
        if len(self.layers) > MOST:
            raise InputError(f"has {len(self.layers)} layers", where="unsplit", expected=f"at most {MOST}")


@dataclass(frozen=True)
class About:
    """Where a policy comes from and what it is good for: the table `[about]` of its file. Neither bundles nor
    sessions know it."""

    source: str
    """The paper, and the public code with its commit."""
    use: str
    differs: tuple[str, ...] = ()
    """What is not as in the source: a sentence each."""


@dataclass(frozen=True)
class Policy:
    """Which cached tokens each group of heads sees."""

    name: str
    summary: str
    groups: Mapping[str, tuple[Role, ...]]
    unsplit: Unsplit | None = None
    positions: Positions | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What positions are counted from; None: as the model says (`ModelSpec.positions`)."""
    ar_start: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Last chunk index before heads are split; None: as the model says (`ModelSpec.ar_start`)."""

    def __post_init__(self) -> None:
        where = f"policy {self.name}"
        check_bounds(self, {"ar_start": (0, MOST_FRAMES)}, where)
        if len(self.groups) > MOST_GROUPS:
            what = f"has {len(self.groups)} groups"
            raise InputError(what, where=where, expected=f"at most {MOST_GROUPS}")
        if not self.groups or (ALL in self.groups and len(self.groups) > 1):
            raise InputError(
                f"its groups are {sorted(self.groups)}", where=where, expected=f"{ALL!r} alone, or labels"
            )
        for label, roles in self.groups.items():
            names = [role.name for role in roles]
            if len(set(names)) < len(names):
                raise InputError(
                    f"the group {label} has a role twice ({', '.join(names)})",
                    where=where,
                    expected="each role once in a group",
                )
        choosing = {role for roles in self.groups.values() for role in roles if role.chooses}
        if len(choosing) > 1:
            raise InputError(
                "its groups choose segments in different ways",
                where=where,
                expected="the same parameters in every group, since there is one choice for all",
            )
        if self.unsplit and self.unsplit.group not in self.groups:
            raise InputError(
                f"unsplit.group is {self.unsplit.group!r}",
                where=where,
                expected=f"one of its groups: {', '.join(self.groups)}",
            )

    @classmethod
    def check_data(cls, data: Mapping[str, Any], where: str) -> None:
        """Refuse a policy as it was written before roles were listed, and show how it is written now."""
        groups = data.get("groups")
        if isinstance(groups, Mapping) and (
            "retain" in data or any(isinstance(group, Mapping) for group in groups.values())
        ):
            raise InputError(
                "is written as policies were before each group listed its roles",
                where=where,
                expected="this form",
                form=_in_new_form(data),
            )

    @property
    def needs_headmap(self) -> bool:
        return ALL not in self.groups

    def in_any_layer(self) -> Policy:
        """The policy with no layer treated apart, for a few layers that stand for a whole model."""
        groups = {label: tuple(role.in_any_layer() for role in roles) for label, roles in self.groups.items()}
        return replace(self, groups=groups, unsplit=None)


def policy_names() -> list[str]:
    """Names that `load_policy` knows, the plainest first: without a head map, and of few roles."""

    def plainness(name: str) -> tuple[bool, int, str]:
        policy = load_policy(name)
        return policy.needs_headmap, 0 if policy.needs_headmap else len(policy.groups[ALL]), name

    return sorted(shipped_names(__name__), key=plainness)


def load_policy(name: str) -> Policy:
    """The policy of that name, or of a TOML file. Raises InputError naming the fault."""
    return _read(name)[0]


def load_about(name: str) -> About | None:
    """What the file of a policy says of where it comes from. Raises InputError naming the fault."""
    return _read(name)[1]


def _read(name: str) -> tuple[Policy, About | None]:
    where, data = f"policy {name}", read_table("policy", name, __name__)
    about = data.pop(ABOUT, None)
    told = None if about is None else from_data(About, about, f"{where}: {ABOUT}")
    return from_data(Policy, data, where), told


def _in_new_form(data: Mapping[str, Any]) -> str:
    """The groups of an old policy (sink_frames, recent_frames, retained and one [retain]) as TOML."""
    retain = dict(data.get("retain") or {})
    lines = ["[groups]"]
    for label, group in data["groups"].items():
        roles = list(group) if isinstance(group, list | tuple) else []  # of a base, in the new form already
        if isinstance(group, Mapping):
            frames = {
                role: {"role": role} | ({"frames": group[field]} if group.get(field) is not None else {})
                for role, field in (("sink", "sink_frames"), ("recent", "recent_frames"))
                if group.get(field) != 0
            }
            middle = {"role": "retained"} if group.get("retained") else None
            roles = [role for role in (frames.get("sink"), middle, frames.get("recent")) if role]
        shown = [role | (retain if role.get("role") == "retained" else {}) for role in roles]
        lines.append(f"{_key(label)} = [{', '.join(map(_toml, shown))}]")
    return "\n".join(lines)


def _toml(table: Mapping[str, Any]) -> str:
    """An inline table. JSON writes strings, numbers and booleans as TOML does."""
    return "{ " + ", ".join(f"{_key(name)} = {json.dumps(value)}" for name, value in table.items()) + " }"


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name)
