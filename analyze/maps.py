"""The head map of a decision, and the words for how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from forcingkv.analyze.labels import Decision, label_rows
from forcingkv.analyze.scores import Observations
from forcingkv.analyze.stability import CONFIDENCE, Stability
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Statistics

Undecided = Literal["kept", "dynamic"]

FIXED_COUNT = ("quota", "budget", "dummy")
"""Rules that say how many heads are static: their undecided heads keep their labels."""

FEW_SAMPLES = 16
"""With fewer the 95% interval holds the mean in less than 91% (`python benchmarks/interval_coverage.py`)."""
SAFE, UNSAFE = 0.05, 0.5
"""Share of the rule's static heads that is undecided: safe up to the first, unsafe from the second."""


def undecided_choice(rule: str, asked: Undecided | None) -> Undecided:
    """What becomes of undecided heads: dynamic, which loses nothing, unless the rule fixes their number.

    Raises InputError where they are asked to be dynamic under such a rule.
    """
    if rule in FIXED_COUNT:
        if asked == "dynamic":
            raise InputError(
                f"the rule {rule} fixes how many heads are static",
                where="undecided",
                expected="kept",
                hint="Choose another rule to make undecided heads dynamic.",
            )
        return "kept"
    return asked or "dynamic"


def headmap_of(
    decision: Decision,
    stability: Stability,
    model: ModelIdentity,
    measured: Statistics,
    undecided: Undecided = "kept",
) -> HeadMap:
    """The map: labels, scores, confidence (share of observations that agree), margins, undecided heads."""
    open_heads = stability.undecided
    static = stability.static & ~open_heads if undecided == "dynamic" else stability.static
    agree = np.where(static == stability.static, stability.kept, 1 - stability.kept)
    return HeadMap(
        model=model,
        labels=label_rows(static),
        rule=replace(decision.rule, undecided=undecided),
        scores=_rows(stability.score),
        confidence=_rows(agree),
        statistics=measured,
        margins=_rows(stability.margin),
        undecided=tuple(tuple(int(head) for head in np.flatnonzero(row)) for row in open_heads),
    )


def labels_of_rule(decision: Decision, observations: Observations, model: ModelIdentity) -> HeadMap:
    """The map of a rule's labels alone, to be compared with others."""
    mean = observations.mean()
    return HeadMap(model, label_rows(decision.static(mean)), decision.rule, scores=_rows(mean[..., 0]))


@dataclass(frozen=True)
class Verdict:
    """What the statistics say of the map, for people and for machines."""

    level: Literal["safe", "care", "unsafe", "unknown"]
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.sentences)


def verdict(stability: Stability, undecided: Undecided) -> Verdict:
    """Whether a map that is the same for every video, step and chunk is safe for the model."""
    total, open_heads = stability.static.size, int(stability.undecided.sum())
    if stability.samples < 2:
        return Verdict(
            "unknown",
            (
                f"One sample says nothing about others; within it {open_heads} of {total} heads change"
                " sides with the step or chunk.",
                "Record more samples before you trust this map.",
            ),
        )
    keeps = "it keeps" if open_heads == 1 else "they keep"
    treated = "treated as dynamic" if undecided == "dynamic" else f"{keeps} the rule's label"
    sentences = [
        f"{int(stability.firm.sum())} of {total} heads keep their label in {CONFIDENCE:.0%} of samples;"
        f" {open_heads} {'is' if open_heads == 1 else 'are'} undecided: {treated}."
    ]
    static = int(stability.static.sum())
    shaky = int((stability.static & stability.undecided).sum())
    share = shaky / static if static else 0.0
    level: Literal["safe", "care", "unsafe"] = (
        "safe" if share <= SAFE else "unsafe" if share >= UNSAFE else "care"
    )
    of = f"{shaky} of the {static} heads that the rule calls static are undecided"
    if not static:
        of = "the rule calls no head static"
    if level == "safe":
        sentences.append(f"A static map is safe for this model ({of}).")
    elif level == "care":
        sentences.append(f"A static map is safe only with the undecided heads dynamic ({of}).")
    else:
        sentences.append(f"A static map is not safe for this model ({of}): roles change while it runs.")
    if stability.samples < FEW_SAMPLES:
        sentences.append(f"Measured on {stability.samples} samples only: intervals are too narrow.")
    return Verdict(level, tuple(sentences))


def _rows(values: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(v), 6) for v in row) for row in values)
