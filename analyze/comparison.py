"""How far two head maps agree, and which heads changed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from forcingkv.headmaps import HeadMap, InputError, read_headmap
from forcingkv.headmaps.headmap import size_in_words

RUN_FILE = "headmap.json"

Pair = tuple[str, str]
"""A head's labels in the first and in the second map."""


@dataclass(frozen=True)
class Agreement:
    """Two labellings of the same heads. 1 is full agreement; by chance kappa and Rand are about 0."""

    share: float
    """Share of heads with the same label."""
    kappa: float
    """Cohen's kappa."""
    rand: float
    """Adjusted Rand index."""
    iou: dict[str, float]
    """Label that either map uses -> intersection over union of the heads that have it."""


@dataclass(frozen=True)
class Change:
    """A head whose label differs."""

    layer: int
    head: int
    labels: Pair
    scores: tuple[float | None, float | None]
    distances: tuple[float | None, float | None]
    """How far it is from the boundary in each map, in the units of that map's rule; None: unknown."""
    undecided: tuple[bool | None, bool | None]
    """Whether each map calls it undecided; None: it does not say."""


@dataclass(frozen=True)
class ScoreDifference:
    """Differences between the scores of two maps, without sign."""

    mean: float
    largest: float
    layer: int
    """Where the largest is."""
    head: int


def agree(a: HeadMap, b: HeadMap) -> Agreement:
    """Compare two maps. Raises InputError unless they are for models of the same size, with heads."""
    from sklearn.metrics import adjusted_rand_score, cohen_kappa_score  # see `labels._clusters`

    if (a.model.layers, a.model.heads) != (b.model.layers, b.model.heads):
        raise InputError(
            f"one map is for {size_in_words(a.model.layers, a.model.heads)}, the other for"
            f" {size_in_words(b.model.layers, b.model.heads)}",
            where="compare",
            expected="maps of models of the same size",
        )
    if not a.model.layers * a.model.heads:
        raise InputError("the maps have no heads", where="compare", expected="at least one")
    first, second = (np.array(one.labels).ravel() for one in (a, b))
    same = first == second
    iou = {}
    for label in sorted({*first, *second}):
        either = (first == label) | (second == label)
        iou[str(label)] = int((same & either).sum()) / int(either.sum())
    return Agreement(
        share=float(same.mean()),
        # With the same single label everywhere kappa would be 0 / 0.
        kappa=1.0 if same.all() else float(cohen_kappa_score(first, second)),
        rand=float(adjusted_rand_score(first, second)),
        iou=iou,
    )


def changes(a: HeadMap, b: HeadMap) -> list[Change]:
    """The heads whose labels differ, the farthest from a boundary first, then in order."""
    found = []
    for layer, head in np.ndindex(a.model.layers, a.model.heads):
        old, new = (_evidence(one, layer, head) for one in (a, b))
        if old[0] != new[0]:
            found.append(Change(layer, head, *zip(old, new, strict=True)))  # type: ignore[arg-type]
    return sorted(found, key=lambda change: -max(distance or 0.0 for distance in change.distances))


def score_difference(a: HeadMap, b: HeadMap) -> ScoreDifference | None:
    """How far apart the scores of two maps are; None where one has none."""
    if a.scores is None or b.scores is None:
        return None
    apart = np.abs(np.array(a.scores) - np.array(b.scores))
    layer, head = np.unravel_index(int(apart.argmax()), apart.shape)
    return ScoreDifference(float(apart.mean()), float(apart.max()), int(layer), int(head))


def pairwise(maps: Mapping[str, HeadMap]) -> dict[tuple[str, str], Agreement]:
    """The agreement of every two of several maps."""
    return {(a, b): agree(maps[a], maps[b]) for a in maps for b in maps}


def read_map_or_run(place: Path) -> HeadMap:
    """The head map of a file of any known format, or of a folder that `analyze heads` wrote.

    Raises InputError for what `read_headmap` refuses, and for a folder without headmap.json.
    """
    file = place / RUN_FILE if os.path.isdir(place) else place
    if file != place and not os.path.isfile(file):
        expected = "a folder that `forcingkv analyze heads --out` wrote, or a head map"
        raise InputError(f"has no {RUN_FILE}", where=str(place), expected=expected)
    return read_headmap(file)


def short_names(a: Path, b: Path) -> Pair:
    """Names to show for two places: their last parts, or all of both if those are the same."""
    first, second = (place.resolve() for place in (a, b))
    short = tuple((p.parent if p.name == RUN_FILE else p).name or str(p) for p in (first, second))
    return (short[0], short[1]) if short[0] != short[1] else (str(a), str(b))


def common_letters(a: HeadMap, b: HeadMap) -> dict[str, str]:
    """A letter for each label that either map uses, as `HeadMap.letters` gives for one."""
    return replace(a, labels=a.labels + b.labels).letters()


def moves(a: HeadMap, b: HeadMap) -> dict[Pair, int]:
    """(label in a, label in b) -> number of heads, for labels that differ; the most frequent first."""
    return {pair: number for pair, number in label_pairs(a, b).items() if pair[0] != pair[1]}


def undecided_among(a: HeadMap, b: HeadMap, changed: Sequence[Change]) -> int | None:
    """How many of the changed heads at least one map calls undecided.

    None unless both maps were measured (have statistics) and one of them names its undecided heads.
    """
    measured = a.statistics is not None and b.statistics is not None
    if not measured or (a.undecided is None and b.undecided is None):
        return None
    return sum(any(change.undecided) for change in changed)


def label_pairs(a: HeadMap, b: HeadMap) -> dict[Pair, int]:
    """(label in a, label in b) -> number of heads, the most frequent first."""
    counts = Counter(zip(chain(*a.labels), chain(*b.labels), strict=True))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _evidence(found: HeadMap, layer: int, head: int) -> tuple[str, float | None, float | None, bool | None]:
    """A head's label, score and distance from the boundary, and whether it is undecided; None: unknown."""
    score = found.scores[layer][head] if found.scores else None
    margin = found.margins[layer][head] if found.margins else None
    if margin is None and score is not None and found.rule.alpha is not None:
        margin = score - found.rule.alpha
    undecided = None if found.undecided is None else head in found.undecided[layer]
    return found.labels[layer][head], score, None if margin is None else abs(margin), undecided
