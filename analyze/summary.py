"""What an analysis found, in numbers for machines and in lines for people."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.analyze.agreement import pairwise
from forcingkv.analyze.analysis import Analysis
from forcingkv.analyze.stability import samples_needed
from forcingkv.headmaps.fields import to_data

HALF_WIDTHS = (0.01, 0.02, 0.05)
"""Half-widths of a score's interval for which the samples needed are said."""

Numbers = npt.NDArray[Any]


def summary_json(analysis: Analysis) -> dict[str, Any]:
    """The content of stability.json."""
    stability, recorded, apart = analysis.stability, analysis.recorded, analysis.divergence
    rules = pairwise(analysis.alternatives)
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
        "divergence": {"intra": _round(apart.intra), "inter": _round(apart.inter)},
        "samples_needed": needed(stability.spread),
        "rules": {
            "agreement": [
                {
                    "a": a,
                    "b": b,
                    "share": _round(found.share),
                    "kappa": _round(found.kappa),
                    "rand": _round(found.rand),
                }
                for (a, b), found in rules.items()
                if a < b
            ],
            "not_applied": analysis.missing,
        },
        "heads": _heads(analysis),
    }


def summary_lines(analysis: Analysis) -> list[tuple[str, str]]:
    """The same for people: (name, value)."""
    stability, rule = analysis.stability, analysis.headmap.rule
    counts = analysis.headmap.counts()
    how = rule.name if rule.alpha is None else f"{rule.name}, cut at {rule.alpha:g}"
    apart, split = analysis.divergence, analysis.variance
    largest = sorted(split, key=lambda name: -split[name])[:4]
    recording = analysis.recorded.recording
    lines = [
        ("labels", ", ".join(f"{n} {label}" for label, n in counts.items())),
        ("rule", how + (f" ({rule.reason})" if rule.reason else "")),
        ("score of a head", f"{stability.score.min():.3f} to {stability.score.max():.3f}"),
        ("undecided", _reasons(analysis)),
        ("variance explained by", ", ".join(f"{name} {split[name]:.0%}" for name in largest)),
        ("divergence", f"{apart.intra:.2f} within heads, {apart.inter:.2f} between them"),
    ]
    for width, counted in needed(stability.spread).items():
        lines.append((f"samples for ± {width}", f"{counted['median']} (median head), {counted['all']} (all)"))
    measured = analysis.headmap.statistics
    if measured:
        rows = "all query rows" if measured.rows is None else f"{measured.rows} query rows a pass"
        lines.append(
            (
                "measured on",
                f"{measured.samples} samples x {measured.chunks} chunks x {measured.steps} steps, {rows},"
                f" {recording.width}x{recording.height}, policy {recording.policy}",
            )
        )
    return lines


def needed(spread: Numbers) -> dict[str, dict[str, int]]:
    """Half-width -> samples that the median head, 95% of heads and all heads need; {} for one sample."""
    if not np.isfinite(spread).all():
        return {}
    found = {}
    for width in HALF_WIDTHS:
        counts = samples_needed(spread, width)
        found[f"{width:g}"] = {
            "median": int(np.median(counts)),
            "95% of heads": int(np.quantile(counts, 0.95, method="higher")),
            "all": int(counts.max()),
        }
    return found


def _reasons(analysis: Analysis) -> str:
    stability = analysis.stability
    total = int(stability.undecided.sum())
    named = [f"{int(found.sum())} by {name}" for name, found in stability.reasons.items() if found.any()]
    return f"{total} of {stability.static.size} heads" + (f" ({', '.join(named)})" if named else "")


def _heads(analysis: Analysis) -> list[dict[str, Any]]:
    stability, labels = analysis.stability, analysis.headmap.labels
    figures = {
        "score": stability.score,
        "low": stability.interval.low,
        "high": stability.interval.high,
        "margin": stability.margin,
        "kept_samples": stability.kept_samples,
        "kept_steps": stability.kept_steps,
        "kept_chunks": stability.kept_chunks,
        "kept": stability.kept,
    }
    return [
        {
            "layer": layer,
            "head": head,
            "label": labels[layer][head],
            **{name: _round(float(values[layer, head])) for name, values in figures.items()},
            "undecided_for": [name for name, found in stability.reasons.items() if found[layer, head]],
        }
        for layer, head in np.ndindex(stability.static.shape)
    ]


def _round(value: float) -> float | None:
    """Six decimals; None for what is not known."""
    return round(float(value), 6) if np.isfinite(value) else None
