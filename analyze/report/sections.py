"""The sections of the report, and what they say."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from importlib import resources

import numpy as np

import forcingkv
from forcingkv.analyze.analysis import Analysis, needed, summary_lines
from forcingkv.analyze.comparison import pairwise
from forcingkv.analyze.labels import RULES
from forcingkv.analyze.report.attention import attention_pictures
from forcingkv.analyze.report.costs import cost_table
from forcingkv.analyze.report.page import Markup, figure, node, page, pairs, table
from forcingkv.analyze.report.pictures import (
    FOLLOWED,
    headmap_picture,
    histogram,
    intervals,
    kappa_matrix,
    kept_labels,
    roles,
    undecided_heads,
    variance_bars,
)
from forcingkv.analyze.scoring import Scored, in_words, told_numbers
from forcingkv.analyze.stability import REASONS
from forcingkv.headmaps.headmap import size_in_words
from forcingkv.headmaps.reading import parse_toml

LISTED = 40
"""Undecided heads listed; the others are counted."""
SHOWN = "this map"
UNKNOWN = "unknown"
FROM_SAMPLES = frozenset(("sample", "head x sample"))
"""Sources of variance that one sample does not show."""
VERSIONED = ("torch", "polars", "scikit-learn")


def report_html(analysis: Analysis, command: Sequence[str]) -> str:
    """The page, which names the command that a person would run to repeat it.

    The same analysis and command give the same text.
    """
    verdict = node(
        "div",
        node("p", f"Verdict: {analysis.verdict.level}", klass="level"),
        *(node("p", sentence) for sentence in analysis.verdict.sentences),
        _other_rule(analysis),
        klass="verdict",
    )
    sections = [
        ("map", "Head map", _map(analysis)),
        ("scores", "Scores", _scores(analysis)),
        ("stability", "Stability", _stability(analysis)),
        ("attention", "Frame-wise attention", _attention(analysis)),
        ("rules", "Rules side by side", _rules(analysis)),
        ("making", "How it was made", _making(analysis, command)),
    ]
    title = f"Head map of {analysis.headmap.model.name}"
    return page(title, analysis.verdict.level, [verdict, pairs(summary_lines(analysis))], sections)


def _map(analysis: Analysis) -> str:
    caption = "Colour: mean recency score."
    if undecided_heads(analysis.headmap).any():
        caption += " Undecided: the statistics do not settle the label."
    return node("div", figure(headmap_picture(analysis.headmap), caption), klass="figures")


def _scores(analysis: Analysis) -> str:
    stability, cuts, name = analysis.stability, analysis.decision.cuts, analysis.decision.rule.name
    bars = "Bars: 95% bootstrap intervals over samples."
    if stability.samples < 2:
        bars = "Intervals are unknown: one sample was measured."
    cut = f" The rule {name} does not cut the score at one value, so no cut is drawn."
    if cuts is not None and np.ptp(cuts) == 0:
        cut = f" Dashed: the cut of the rule {name}."
    drawn = histogram(analysis.headmap, stability.score)
    return node(
        "div",
        figure(intervals(analysis), bars + cut, title="Score of each head"),
        figure(drawn, "Each head once, by its label in the map.", title="Distribution"),
        klass="figures",
    )


def _stability(analysis: Analysis) -> str:
    several = analysis.stability.samples > 1
    kept = Markup()
    unknown = _unknown("How far labels hold over samples is unknown: one sample was measured.")
    if several:
        words = "How often a sample, judged by itself, gives the head the label that all samples together do."
        unknown, kept = Markup(), figure(kept_labels(analysis), words, title="Labels kept over samples")
    sources = figure(
        variance_bars(analysis.variance, frozenset() if several else FROM_SAMPLES),
        "Red: interactions with the head, which endanger a fixed label. The other sources move all"
        " heads alike, or set heads apart for good.",
        title="Where the variance of scores comes from",
    )
    drawn = [
        figure(roles(analysis, f"{one}s"), _band(one, analysis), title=title)
        for one, title in (("step", "By denoising step"), ("chunk", "By chunk"))
        if f"{one}s" in analysis.stability.reasons
    ]
    figures = node("div", kept, sources, *drawn, klass="figures")
    return Markup(_other_rule(analysis) + unknown + figures + _needed(analysis) + _undecided(analysis))


def _band(one: str, analysis: Analysis) -> str:
    count = int(analysis.stability.reasons[f"{one}s"].sum())
    said = f"Bands: decided heads, mean and middle 80%. {count} {'head is' if count == 1 else 'heads are'}"
    more = f"; the {FOLLOWED} that keep their label least are drawn" if count > FOLLOWED else ""
    return f"{said} clearly on the other side at some {one}{more}."


def _needed(analysis: Analysis) -> str:
    counts = needed(analysis.stability.spread)
    if not counts:
        return _unknown("How many samples are needed is unknown: it takes two samples or more to say.")
    columns = next(iter(counts.values()))
    return table(
        "Samples needed for a 95% interval of a head's score no wider than",
        [("half-width", *columns)],
        [(f"± {width}", *(f"{count:,}" for count in row.values())) for width, row in counts.items()],
    )


def _undecided(analysis: Analysis) -> str:
    stability = analysis.stability
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(stability.undecided)]
    title = node("h3", f"Undecided heads: {len(heads)} of {stability.static.size}")
    if not heads:
        return Markup(title + node("p", "No head is undecided."))
    counts = [(name, int(found.sum())) for name, found in stability.reasons.items() if found.any()]
    causes = pairs((f"{name}: {count}", REASONS[name]) for name, count in counts)
    nearest = sorted(heads, key=lambda at: abs(float(stability.margin[at])))
    more = f"; {len(heads) - LISTED} more are in stability.json" if len(heads) > LISTED else ""
    caption = (
        f"Nearest to the boundary first{more}. Kept: share of samples, steps and chunks in which the head has"
        " the rule's label."
    )
    columns = ["head", "by the rule", "score", "95% interval", "margin"]
    columns += [f"kept: {name}" if name == "samples" else name for name in stability.kept_parts] + ["why"]
    rows = []
    for at in nearest[:LISTED]:
        head, score = f"L{at[0]} H{at[1]}", f"{stability.score[at]:.3f}"
        margin = f"{stability.margin[at]:+.3f}"
        interval = f"{stability.interval.low[at]:.3f} to {stability.interval.high[at]:.3f}"
        shares = {name: f"{kept[at]:.0%}" for name, kept in stability.kept_parts.items()}
        if stability.samples < 2:
            interval = shares["samples"] = UNKNOWN
        why = ", ".join(name for name, found in stability.reasons.items() if found[at])
        rows.append([head, _side(analysis, at), score, interval, margin, *shares.values(), why])
    return Markup(title + causes + table(caption, [columns], rows))


def _attention(analysis: Analysis) -> str:
    stability = analysis.stability
    pruned = analysis.recorded.recording.policy != "full"
    said = node(
        "p",
        "Share of each query frame's attention on each key frame, mean over samples, all on one scale. Right"
        " of the blue line lie the newest frames, which the recency score counts: the current chunk and"
        f" {_before(analysis)}.",
        " Grey frames are not in the head's cache." if pruned else "",
    )
    figures = []
    for head, (kind, picture) in attention_pictures(analysis).items():
        unsure = ", undecided" if stability.undecided[head] else ""
        caption = f"Score {stability.score[head]:.2f}, {_side(analysis, head)} by the rule{unsure}."
        figures.append(figure(picture, caption, title=f"L{head[0]} H{head[1]}: {kind}"))
    return Markup(said + node("div", *figures, klass="figures"))


def _rules(analysis: Analysis) -> str:
    maps = {SHOWN: analysis.headmap, **analysis.alternatives}
    agreement = pairwise(maps)
    kinds = {name: set(found.counts()) for name, found in maps.items()}
    kappas = np.array(
        [[agreement[a, b].kappa if kinds[a] & kinds[b] else np.nan for b in maps] for a in maps]
    )
    rows = []
    for name, found in maps.items():
        title = f"{SHOWN} ({found.rule.name})" if name == SHOWN else name
        counts = ", ".join(f"{count} {label}" for label, count in found.counts().items())
        beside = agreement[SHOWN, name]
        comparable = (f"{beside.share:.0%}", f"{beside.kappa:.2f}")
        shown = comparable if kinds[SHOWN] & kinds[name] else ("–", "–")
        rows.append([title, counts, *shown, f"{beside.rand:.2f}"])
    for name, why in analysis.missing.items():
        rows.append([name, node("td", f"not applied: {why}", colspan=4, klass="words")])
    head = [("rule", "labels", "heads labelled as in this map", "kappa", "adjusted Rand")]
    note = "Undecided heads keep the rule's label in all maps."
    if analysis.headmap.rule.undecided == "dynamic":
        note = "In this map undecided heads are dynamic; in those of the rules they keep the rule's label."
    if _other_rule(analysis):
        note = "Where two maps have no label in common, only the adjusted Rand index says how alike they are."
    caption = "1: the same labels. 0: no more alike than by chance."
    matrix = figure(kappa_matrix(list(maps), kappas), caption, title="Agreement of the rules")
    return Markup(
        node("p", note)
        + table("Labels, and how far they agree with this map", head, rows)
        + node("div", matrix, klass="figures")
        + cost_table(analysis.recorded.recording.spec, maps)
    )


def _making(analysis: Analysis, command: Sequence[str]) -> str:
    recording = analysis.recorded.recording
    model, spec = recording.model, recording.spec
    versions = [f"forcingkv {forcingkv.__version__}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in VERSIONED]
    scored = analysis.observations.scored
    one = "scored: chunk" if len(scored.chunks) == 1 else "scored: chunks"
    chunks = (
        f"{recording.chunks} of {spec.frames_per_chunk} latent frames, {one} {told_numbers(scored.chunks)}"
    )
    lines = [
        ("command", node("code", shlex.join(command) or UNKNOWN)),
        ("model", f"{model.name}, {size_in_words(model.layers, model.heads)}"),
        ("weights, SHA-256", node("code", model.weights or UNKNOWN)),
        ("policy", recording.policy),
        ("samples", f"{len(analysis.recorded.samples)}, seeds from {recording.seed} on"),
        ("chunks", chunks),
        ("query rows", "all" if recording.rows is None else f"{recording.rows} a pass"),
        ("dtype", recording.dtype),
        ("resolution", f"{recording.width}x{recording.height}"),
        ("passes", f"{in_words(scored.kind)}{_of_recorded(analysis)}"),
        ("timesteps", _timesteps(scored)),
        ("sink frames left out", str(scored.sink_frames)),
        ("frames that count as recent", f"{scored.recent_frames}: the current chunk and {_before(analysis)}"),
        ("head map, SHA-256", node("code", analysis.headmap.digest)),
        ("versions", ", ".join(versions)),
    ]
    lines[3:3] = [("LoRA", record.told) for record in recording.loras or ()]
    if recording.headmap:
        lines.insert(
            lines.index(("policy", recording.policy)) + 1,
            ("grouped by, SHA-256", node("code", recording.headmap)),
        )
    words = parse_toml((resources.files(__package__) / "definitions.toml").read_bytes(), "definitions.toml")
    return Markup(pairs(lines) + node("h3", "What the words mean") + pairs(words.items()))


def _before(analysis: Analysis) -> str:
    """The frames before the current chunk that count as recent."""
    spec = analysis.recorded.recording.spec
    before = analysis.observations.scored.recent_frames - spec.frames_per_chunk
    return "the transition frame" if before == 1 else f"the {before} frames before it"


def _of_recorded(analysis: Analysis) -> str:
    """Of what was recorded, where only a part is scored."""
    scored, recorded = analysis.observations.scored.kind, analysis.recorded.recording.recorded
    return "" if scored == recorded else f"; recorded: {in_words(recorded)}"


def _timesteps(scored: Scored) -> str:
    """Those of the passes that are scored."""
    clean = {made.timestep for made in scored.passes if made.clean}
    told = [f"{timestep:g}" for timestep in scored.timesteps]
    told += [f"clean pass {timestep:g}" for timestep in clean]
    lengths = {
        sum(made.chunk == chunk and not made.clean for made in scored.passes) for chunk in scored.chunks
    }
    uneven = f"; {min(lengths)} to {max(lengths)} denoising passes a chunk" if len(lengths) > 1 else ""
    return ", ".join(told) + uneven


def _other_rule(analysis: Analysis) -> str:
    """A paragraph, where another rule is judged than the one that labelled."""
    kind, static = RULES[analysis.labelling.rule], analysis.stability.static
    if kind.classes is None:
        return ""
    return node(
        "p",
        f"The classes of {kind.origin} are not two sides of a boundary. The verdict"
        f" and the section on stability are about another rule: {analysis.decision.rule.name}, which calls"
        f" {int(static.sum())} of {static.size} heads static.",
    )


def _side(analysis: Analysis, head: tuple[int, int]) -> str:
    return "static" if analysis.stability.static[head] else "dynamic"


def _unknown(text: str) -> Markup:
    return node("p", text, klass="unknown-part")
