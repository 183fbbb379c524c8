"""Cache policies as data: one TOML file each, read into a `Policy`.

A policy names groups of heads by their label in the head map, and says which roles of cached frames
each group sees. The group name `all` stands for every head and needs no head map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.shipped import read_named, shipped_names

__all__ = ["ALL", "Choice", "Policy", "Retain", "Roles", "Unsplit", "load_policy", "policy_names"]

ALL = "all"
"""The group of every head, in policies that need no head map."""

Choice = Literal["least-similar", "uniform", "random"]
"""Which of the candidate segments are kept: those least similar to the same place one frame later; evenly
spaced ones, the same at every chunk; or ones drawn anew at every chunk."""


@dataclass(frozen=True)
class Roles:
    """What the heads of a group see beside the current chunk."""

    sink_frames: int | None = None
    """The video's first frames, kept for ever; None: as many as the model was made for."""
    recent_frames: int | None = None
    """The newest frames; None: as many as the model attends to (`attended_frames`)."""
    retained: bool = False
    """Whether segments chosen by `Retain` are kept too."""


@dataclass(frozen=True)
class Retain:
    """How segments are retained (METHOD.md section 3)."""

    segments: int
    """Equal runs a frame's tokens are split into."""
    ratio: float
    """Share of the candidate segments that is kept (the retention ratio)."""
    score_layer: int
    """First layer whose dynamic heads may score; later layers use its choice."""
    choose: Choice = "least-similar"
    shared: bool = True
    """Whether later layers use the first one's choice. False: every layer chooses for itself."""
    seed: int = 0
    """What `random` draws from, with the index of the chunk."""

    def kept(self, frames_per_chunk: int) -> int:
        """Segments kept of those of a chunk's worth of frames."""
        return round(self.segments * frames_per_chunk * self.ratio)


@dataclass(frozen=True)
class Unsplit:
    """Layers whose heads are all treated as one group."""

    layers: tuple[int, ...]
    group: str


@dataclass(frozen=True)
class Policy:
    """Which cached frames each group of heads sees."""

    name: str
    summary: str
    groups: Mapping[str, Roles]
    unsplit: Unsplit | None = None
    retain: Retain | None = None

    def __post_init__(self) -> None:
        where = f"policy {self.name}"
        if not self.groups or (ALL in self.groups and len(self.groups) > 1):
            raise InputError(
                f"groups are {sorted(self.groups)}", where=where, expected=f"{ALL!r} alone, or labels"
            )
        if any(roles.retained for roles in self.groups.values()) and self.retain is None:
            raise InputError("a group retains segments but [retain] is missing", where=where)
        if self.retain and self.retain.seed < 0:
            raise InputError(f"retain.seed is {self.retain.seed}", where=where, expected="0 or more")
        if self.retain and self.retain.ratio > 1:
            raise InputError(f"retain.ratio is {self.retain.ratio}", where=where, expected="at most 1")
        if self.unsplit and self.unsplit.group not in self.groups:
            raise InputError(
                f"unsplit.group is {self.unsplit.group!r}",
                where=where,
                expected=f"one of its groups: {', '.join(self.groups)}",
            )

    @property
    def needs_headmap(self) -> bool:
        return ALL not in self.groups


def policy_names() -> list[str]:
    """Names that `load_policy` knows, the plainest first."""
    return sorted(shipped_names(__name__), key=lambda name: (load_policy(name).needs_headmap, name))


def load_policy(name: str) -> Policy:
    """The policy of that name, or of a TOML file. Raises InputError naming the fault."""
    return read_named(Policy, "policy", name, __name__)
