"""Optimization profiles of an engine of the graph `step`: which phases of the cache share one.

TensorRT compiles a graph anew for each profile, which takes time and bytes for each, so an engine has at most
`MOST_PROFILES`. Export builds engines as this says and writes it into their records; what runs an engine asks
its record (`EngineRecord.starts`), since another version may have built it by another rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    another and have the same inputs empty: a tensor without tokens takes other ways through TensorRT.
    """
    shapes = [plan.phase_shapes(phase) for phase in plan.phases]
    starts = _starts([frozenset(name for name, shape in one.items() if 0 in shape) for one in shapes])
    return tuple(
        _profile(shapes, range(*ends)) for ends in zip(starts, [*starts[1:], len(shapes)], strict=True)
    )


def _starts(empty: Sequence[frozenset[str]]) -> list[int]:
    """First phase of each profile; `empty` has for each phase the inputs that hold nothing."""
    last = len(empty) - 1
    if last < MOST_PROFILES:
        return list(range(len(empty)))
    starts = [n for n in range(last) if n == 0 or empty[n] != empty[n - 1]]
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
