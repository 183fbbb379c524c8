"""From recorded statistics to a head map and what to think of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from forcingkv.analyze.budget import decide_budget
from forcingkv.analyze.dummy import context_mass, label_dummies
from forcingkv.analyze.labels import ALPHA, Decision, RuleName, decide
from forcingkv.analyze.maps import Undecided, Verdict, headmap_of, labels_of_rule, undecided_choice, verdict
from forcingkv.analyze.scores import Observations, observe
from forcingkv.analyze.stability import Stability, judge_stability
from forcingkv.analyze.storage import Recorded, read_statistics
from forcingkv.analyze.variance import Divergence, divergence, variance_split
from forcingkv.headmaps import HeadMap
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import Budget

SINK_FRAMES = 1
"""Frames left out of the score's denominator: as many as `forcing-kv` keeps as its sink."""

COMPARED_RULES: tuple[RuleName, ...] = ("threshold", "quota", "kmeans", "mixture")
"""Rules whose maps a report sets side by side."""


@dataclass(frozen=True)
class Labelling:
    """How heads are to be labelled."""

    rule: RuleName = "auto"
    alpha: float = ALPHA
    """Cut of the rule `threshold`."""
    static_per_layer: int | None = None
    """Heads of the rule `quota`; None: half of a layer."""
    sink_frames: int = SINK_FRAMES
    budget: Budget | None = None
    """Target of the rule `budget`."""
    undecided: Undecided | None = None
    """What becomes of undecided heads; None: see `maps.undecided_choice`."""


@dataclass(frozen=True)
class Analysis:
    """What was found, ready to be written down."""

    recorded: Recorded
    labelling: Labelling
    observations: Observations
    headmap: HeadMap
    decision: Decision
    """The rule behind the map; for the classes of Dummy Forcing, which are no two sides of a
    boundary, the rule `auto`."""
    stability: Stability
    """Of `decision`."""
    verdict: Verdict
    variance: dict[str, float]
    """Source -> share of the variance of scores."""
    divergence: Divergence
    alternatives: dict[str, HeadMap] = field(default_factory=dict)
    """Rule -> the labels it gives, not judged, for every rule that can be applied."""
    missing: dict[str, str] = field(default_factory=dict)
    """Rule -> why it cannot be applied."""


def analyze_statistics(place: str | Path, labelling: Labelling | None = None) -> Analysis:
    """Label and judge recorded statistics, in a folder or at a URL that fsspec knows.

    Raises InputError where there are no statistics, they are damaged or of several runs, or the rule
    cannot be applied.
    """
    asked = labelling or Labelling()
    recorded = read_statistics(place)
    observations = observe(recorded, asked.sink_frames)
    decision = _decide(
        observations, recorded, replace(asked, rule="auto") if asked.rule == "dummy" else asked
    )
    stability = judge_stability(observations, decision)
    recording = recorded.recording
    measured = recording.measured(len(recorded.samples))
    choice = undecided_choice(asked.rule, asked.undecided)
    judged = verdict(stability, choice)
    if asked.rule == "dummy":
        headmap = label_dummies(context_mass(recorded), stability.score, recording.model, statistics=measured)
        about = f"The classes of Dummy Forcing are not judged; by the rule {decision.rule.name}:"
        judged = Verdict(judged.level, (about, *judged.sentences))
    else:
        headmap = headmap_of(decision, stability, recording.model, measured, choice)
    alternatives: dict[str, HeadMap] = {}
    missing: dict[str, str] = {}
    for rule in COMPARED_RULES:
        try:
            other = _decide(observations, recorded, replace(asked, rule=rule))
        except InputError as error:
            missing[rule] = error.what
            continue
        alternatives[rule] = labels_of_rule(other, observations, recording.model)
    if asked.rule == "budget":
        alternatives["budget"] = labels_of_rule(decision, observations, recording.model)
    return Analysis(
        recorded,
        asked,
        observations,
        headmap,
        decision,
        stability,
        judged,
        variance_split(observations),
        divergence(recorded),
        alternatives,
        missing,
    )


def _decide(observations: Observations, recorded: Recorded, asked: Labelling) -> Decision:
    if asked.rule != "budget":
        return decide(observations, asked.rule, alpha=asked.alpha, static_per_layer=asked.static_per_layer)
    recording = recorded.recording
    budget = asked.budget or Budget("forcing-kv", f"{recording.width}x{recording.height}")
    scores = observations.mean()[..., 0]
    return decide_budget(scores, recording.spec, budget, observations.sink_frames)
