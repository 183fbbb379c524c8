"""From recorded statistics to a head map, how far it can be trusted, and both in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from forcingkv.analyze.comparison import pairwise
from forcingkv.analyze.labels import ALPHA, RULES, Decision, decide, decide_budget, label_rows, rounded_rows
from forcingkv.analyze.recording import Passes
from forcingkv.analyze.scores import Observations, observe
from forcingkv.analyze.scoring import SINK_FRAMES, Scoring, told_numbers
from forcingkv.analyze.stability import Stability, judge_stability, samples_needed
from forcingkv.analyze.storage import Recorded, read_statistics
from forcingkv.analyze.variance import Divergence, divergence, variance_split
from forcingkv.headmaps import Budget, HeadMap, InputError, ModelIdentity, Statistics
from forcingkv.headmaps.fields import one_of, to_data
from forcingkv.resampling import CONFIDENCE

FEW_SAMPLES = 16
"""With fewer the 95% interval holds the mean in less than 91% of runs (`docs/ablations.md`)."""
SAFE, UNSAFE = 0.05, 0.5
"""Share of the rule's static heads that is undecided: safe up to the first, unsafe from the second."""

HALF_WIDTHS = (0.01, 0.02, 0.05)
"""Half-widths of a score's interval for which the samples needed are said."""

Undecided = Literal["kept", "dynamic"]


@dataclass(frozen=True)
class Labelling:
    """How heads are to be labelled."""

    rule: str = "auto"
    alpha: float = ALPHA
    """Cut of the rule `threshold`."""
    static_per_layer: int | None = None
    """Heads of the rule `quota`; None: half of a layer."""
    sink_frames: int = SINK_FRAMES
    budget: Budget | None = None
    """Target of the rule `budget`."""
    undecided: Undecided | None = None
    """What becomes of undecided heads; None: see `undecided_choice`."""
    recent_frames: int | None = None
    """Newest key frames that count as recent; None: the current chunk and the transition frame."""
    passes: Passes | None = None
    """Passes that are scored; None: all that were recorded."""
    score_chunks: tuple[int, ...] | None = None
    """Chunks that are scored; None: all after the split that have history."""

    @property
    def scoring(self) -> Scoring:
        """Which passes are to be scored, and how."""
        return Scoring(self.sink_frames, self.recent_frames, self.passes, self.score_chunks)


@dataclass(frozen=True)
class Verdict:
    """What the statistics say of the map, for people and for machines."""

    level: Literal["safe", "care", "unsafe", "unknown"]
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.sentences)


@dataclass(frozen=True)
class Analysis:
    """What was found, ready to be written down."""

    recorded: Recorded
    labelling: Labelling
    observations: Observations
    headmap: HeadMap
    decision: Decision
    """The rule behind the map; for classes that are not two sides of a boundary, the rule `auto`."""
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
    observations = observe(recorded, asked.scoring)
    kind = RULES[one_of(RULES, asked.rule, "rule")]
    decision = _decide(observations, recorded, replace(asked, rule="auto") if kind.classes else asked)
    stability = judge_stability(observations, decision)
    recording = recorded.recording
    scored = observations.scored
    measured = scored.measured(recording, len(recorded.samples))
    choice = undecided_choice(asked.rule, asked.undecided)
    judged = verdict(stability, choice)
    if kind.classes:
        headmap = kind.classes(recorded, scored, stability.score)
        about = f"The classes of {kind.origin} are not judged; by the rule {decision.rule.name}:"
        judged = Verdict(judged.level, (about, *judged.sentences))
    else:
        headmap = headmap_of(decision, stability, recording.model, measured, choice)
    others: dict[str, HeadMap] = {}
    missing: dict[str, str] = {}
    for rule in [name for name, other in RULES.items() if other.compared or name == asked.rule == "budget"]:
        try:
            same = rule == asked.rule
            found = decision if same else _decide(observations, recorded, replace(asked, rule=rule))
        except InputError as error:
            missing[rule] = error.what
        else:
            others[rule] = labels_of_rule(found, observations, recording.model)
    split, apart = variance_split(observations), divergence(recorded, scored)
    return Analysis(
        recorded, asked, observations, headmap, decision, stability, judged, split, apart, others, missing
    )


def undecided_choice(rule: str, asked: Undecided | None) -> Undecided:
    """What becomes of undecided heads: dynamic, which loses nothing, unless the rule fixes their number.

    Raises InputError where they are asked to be dynamic under such a rule.
    """
    if RULES[rule].fixes_count:
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
        scores=rounded_rows(stability.score),
        confidence=rounded_rows(agree),
        statistics=measured,
        margins=rounded_rows(stability.margin),
        undecided=tuple(tuple(int(head) for head in np.flatnonzero(row)) for row in open_heads),
    )


def labels_of_rule(decision: Decision, observations: Observations, model: ModelIdentity) -> HeadMap:
    """The map of a rule's labels alone, to be compared with others."""
    mean = observations.mean()
    return HeadMap(model, label_rows(decision.static(mean)), decision.rule, scores=rounded_rows(mean[..., 0]))


def verdict(stability: Stability, undecided: Undecided) -> Verdict:
    """Whether a map that is the same for every video, step and chunk is safe for the model."""
    total, open_heads = stability.static.size, int(stability.undecided.sum())
    if stability.samples < 2:
        alone = (
            f"One sample says nothing about others; within it {open_heads} of {total} heads change"
            " sides with the step or chunk."
        )
        return Verdict("unknown", (alone, "Record more samples before you trust this map."))
    are, they_keep = ("is", "it keeps") if open_heads == 1 else ("are", "they keep")
    treated = "treated as dynamic" if undecided == "dynamic" else f"{they_keep} the rule's label"
    kept = (
        f"{int(stability.firm.sum())} of {total} heads keep their label in {CONFIDENCE:.0%} of samples;"
        f" {open_heads} {are} undecided: {treated}."
    )
    static = int(stability.static.sum())
    shaky = int((stability.static & stability.undecided).sum())
    share = shaky / static if static else 0.0
    of = f"{shaky} of the {static} heads that the rule calls static are undecided"
    of = f"({of})" if static else "(the rule calls no head static)"
    level: Literal["safe", "care", "unsafe"]
    if share <= SAFE:
        level, judged = "safe", f"A static map is safe for this model {of}."
    elif share < UNSAFE:
        level, judged = "care", f"A static map is safe only with the undecided heads dynamic {of}."
    else:
        level, judged = "unsafe", f"A static map is not safe for this model {of}: roles change while it runs."
    few = f"Measured on {stability.samples} samples only: intervals are too narrow."
    return Verdict(level, (kept, judged, few) if stability.samples < FEW_SAMPLES else (kept, judged))


def summary_json(analysis: Analysis) -> dict[str, Any]:
    """The content of stability.json."""
    stability, recorded = analysis.stability, analysis.recorded
    rules = pairwise(analysis.alternatives)
    agreement = [
        {"a": a, "b": b} | {name: _round(getattr(found, name)) for name in ("share", "kappa", "rand")}
        for (a, b), found in rules.items()
        if a < b
    ]
    return {
        "schema": "forcingkv.stability/1",
        "model": to_data(recorded.recording.model),
        "headmap": analysis.headmap.digest,
        "rule": to_data(analysis.decision.rule),
        "samples": len(recorded.samples),
        "verdict": {"level": analysis.verdict.level, "text": str(analysis.verdict)},
        "counts": analysis.headmap.counts(),
        "keep_label_in_95_percent_of_samples": int(stability.firm.sum()),
        "undecided": int(stability.undecided.sum()),
        "undecided_for": {name: int(found.sum()) for name, found in stability.reasons.items()},
        "variance": {name: _round(share) for name, share in analysis.variance.items()},
        "divergence": {name: _round(share) for name, share in vars(analysis.divergence).items()},
        "samples_needed": needed(stability.spread),
        "rules": {"agreement": agreement, "not_applied": analysis.missing},
        "heads": _heads(analysis),
    }


def summary_lines(analysis: Analysis) -> list[tuple[str, str]]:
    """The same for people: (name, value)."""
    stability, rule = analysis.stability, analysis.headmap.rule
    counts = analysis.headmap.counts()
    how = rule.name if rule.alpha is None else f"{rule.name}, cut at {rule.alpha:g}"
    reasons = [f"{int(found.sum())} by {name}" for name, found in stability.reasons.items() if found.any()]
    undecided = f"{int(stability.undecided.sum())} of {stability.static.size} heads"
    apart, split = analysis.divergence, analysis.variance
    largest = sorted(split, key=lambda name: -split[name])[:4]
    recording = analysis.recorded.recording
    lines = [
        ("labels", ", ".join(f"{n} {label}" for label, n in counts.items())),
        ("rule", how + (f" ({rule.reason})" if rule.reason else "")),
        ("score of a head", f"{stability.score.min():.3f} to {stability.score.max():.3f}"),
        ("undecided", undecided + (f" ({', '.join(reasons)})" if reasons else "")),
        ("variance explained by", ", ".join(f"{name} {split[name]:.0%}" for name in largest)),
        ("divergence", f"{apart.intra:.2f} within heads, {apart.inter:.2f} between them"),
    ]
    for width, counted in needed(stability.spread).items():
        lines.append((f"samples for ± {width}", f"{counted['median']} (median head), {counted['all']} (all)"))
    measured = analysis.headmap.statistics
    if measured:
        rows = "all query rows" if measured.rows is None else f"{measured.rows} query rows a pass"
        where = f"{recording.width}x{recording.height}, policy {recording.policy}"
        lines.append(("measured on", f"{measured.samples} samples x {_size(analysis)}, {rows}, {where}"))
        scored = analysis.observations.scored
        frames = f"the newest {scored.recent_frames} key frames over all but the first {scored.sink_frames}"
        one = "chunk" if len(scored.chunks) == 1 else "chunks"
        lines.append(("scored", f"{one} {told_numbers(scored.chunks)}; {frames}"))
    return lines


def needed(spread: npt.NDArray[Any]) -> dict[str, dict[str, int]]:
    """Half-width -> samples that the median head, 95% of heads and all heads need; {} for one sample."""
    if not np.isfinite(spread).all():
        return {}
    counts = {f"{width:g}": samples_needed(spread, width) for width in HALF_WIDTHS}
    return {
        width: {
            "median": int(np.median(samples)),
            "95% of heads": int(np.quantile(samples, 0.95, method="higher")),
            "all": int(samples.max()),
        }
        for width, samples in counts.items()
    }


def _decide(observations: Observations, recorded: Recorded, asked: Labelling) -> Decision:
    if asked.rule != "budget":
        return decide(observations, asked.rule, alpha=asked.alpha, static_per_layer=asked.static_per_layer)
    budget, spec = asked.budget or Budget("forcing-kv", ""), recorded.recording.spec
    scored = observations.scored
    scores = observations.mean()[..., 0]
    return decide_budget(scores, spec, budget, scored.sink_frames, scored.recent_frames)


def _size(analysis: Analysis) -> str:
    """Chunks and passes that are scored."""
    scored = analysis.observations.scored
    steps, chunks = len(scored.timesteps), len(scored.chunks)
    of = {"denoise": f"{steps} steps", "clean": "the clean pass", "all": f"{steps} steps and the clean pass"}
    return f"{chunks} chunk{'' if chunks == 1 else 's'} x {of[scored.kind]}"


def _heads(analysis: Analysis) -> list[dict[str, Any]]:
    stability, labels = analysis.stability, analysis.headmap.labels
    kept = {f"kept_{part.replace(' ', '_')}": share for part, share in stability.kept_parts.items()} | {
        "kept": stability.kept
    }
    figures = {"score": stability.score, **vars(stability.interval), "margin": stability.margin} | kept
    return [
        {
            "layer": layer,
            "head": head,
            "label": labels[layer][head],
            **{name: _round(values[layer, head]) for name, values in figures.items()},
            "undecided_for": [name for name, found in stability.reasons.items() if found[layer, head]],
        }
        for layer, head in np.ndindex(stability.static.shape)
    ]


def _round(value: float) -> float | None:
    """Six decimals; None for what is not known."""
    return round(float(value), 6) if np.isfinite(value) else None
