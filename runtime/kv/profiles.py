"""Optimization profiles of an engine of the graph `step`: which phases of the cache share one.

TensorRT compiles a graph anew for each profile, which takes time and bytes for each, so an engine has at most
`MOST_PROFILES`. Export builds engines as this says and writes it into their records; what runs an engine asks
its record (`EngineRecord.starts`), since another version may have built it by another rule.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from forcingkv.runtime.kv.plan import CachePlan

MOST_PROFILES = 8
"""What an engine has at most."""

Shape: TypeAlias = tuple[int, ...]


class Profile(NamedTuple):
    """Phases that follow one another, and what their inputs are."""

    phases: range
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    """Name of each input that varies by phase -> of each dimension the least; the shape that kernels are
    chosen for, which is that of the last of the phases; of each dimension the most."""


def profiles_of(plan: CachePlan) -> tuple[Profile, ...]:
    """The profiles of a plan, in the order of their phases; each phase is in one.

    With at most `MOST_PROFILES` phases each has its own, and static shapes. With more, the last phase, in
    which a video stays, has its own; of the others, which a video sees once, those share one that follow one
    another, have the same inputs empty and as many tokens taken (`CachePlan.rows`): a tensor without tokens
    takes other ways through TensorRT, and of a sink that is being collected TensorRT-RTX 1.7 builds static
    shapes only. Of roles that are told anew in each chunk it builds lengths that vary.
    """
    return grouped(plan, _starts(_kinds(plan)))


def of_unlike_phases(plan: CachePlan) -> range | None:
    """Phases that share a profile for want of others, though they have not the same inputs empty and as many
    tokens taken; None: there are none."""
    kinds = _kinds(plan)
    shared = (profile.phases for profile in profiles_of(plan))
    return next((phases for phases in shared if len({kinds[phase] for phase in phases}) > 1), None)


def _kinds(plan: CachePlan) -> list[Hashable]:
    """Of each phase what is the same in all that may share a profile."""
    kinds: list[Hashable] = []
    for phase in plan.phases:
        empty = frozenset(name for name, shape in plan.phase_shapes(phase).items() if 0 in shape)
        rows = plan.rows(phase.first_chunk).items()
        kinds.append((empty, tuple(len(taken) for name, taken in rows if name not in plan.told_by_chunk)))
    return kinds


def grouped(plan: CachePlan, starts: Sequence[int]) -> tuple[Profile, ...]:
    """The profiles that begin with those phases, of which 0 is the first."""
    shapes, stops = [plan.phase_shapes(phase) for phase in plan.phases], [*starts[1:], len(plan.phases)]
    return tuple(_profile(shapes, range(*ends)) for ends in zip(starts, stops, strict=True))


def _starts(alike: Sequence[Hashable]) -> list[int]:
    """First phase of each profile; `alike` has for each phase what is the same in all that may share one."""
    last = len(alike) - 1
    if last < MOST_PROFILES:
        return list(range(len(alike)))
    starts = [n for n in range(last) if n == 0 or alike[n] != alike[n - 1]]
    while len(starts) >= MOST_PROFILES:
        ends = [*starts[1:], last]
        # Join the two neighbours that have fewest phases together, of equals the later ones.
        place = min(range(1, len(starts)), key=lambda at: (ends[at] - starts[at - 1], -at))
        del starts[place]
    return [*starts, last]


def _profile(shapes: Sequence[Mapping[str, Shape]], phases: range) -> Profile:
    ranges = {}
    for name in shapes[0]:
        in_each = [shapes[phase][name] for phase in phases]
        least, most = (tuple(map(pick, zip(*in_each, strict=True))) for pick in (min, max))
        ranges[name] = least, in_each[-1], most
    return Profile(phases, ranges)
