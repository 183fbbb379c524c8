"""The report of an analysis: one HTML file that works offline."""

from __future__ import annotations

import base64
import html
import shlex
from collections.abc import Sequence

import polars as pl

from forcingkv.analyze.pictures import headmap_picture, recency_picture, spread_picture
from forcingkv.analyze.scores import mean_scores
from forcingkv.headmaps import HeadMap

__all__ = ["report_html", "summary"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Head map of {name}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
img {{ max-width: 100%; height: auto; background: white; border-radius: 6px; padding: 4px; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem; text-align: left; }}
tr:nth-child(even) {{ background: color-mix(in srgb, currentColor 8%, transparent); }}
code {{ overflow-wrap: anywhere; }} figure {{ margin: 1.5rem 0; overflow-x: auto; }}
</style></head><body>
<h1>Head map of {name}</h1>
<p>{verdict}</p>
<table>{rows}</table>
{figures}
<h2>How it was made</h2><p><code>{command}</code></p>
</body></html>
"""


def summary(scores: pl.DataFrame, headmap: HeadMap) -> list[tuple[str, str]]:
    """What the scores say, as (name, value) lines for people."""
    means = mean_scores(scores)
    spread = scores.group_by("layer", "head", "sample").agg(pl.col("score").mean())
    over_samples = spread.group_by("layer", "head").agg(pl.col("score").std()).get_column("score")
    steps = scores.group_by("layer", "head", "step").agg(pl.col("score").mean())
    over_steps = steps.group_by("layer", "head").agg(pl.col("score").std()).get_column("score")
    counts = headmap.counts()
    rule = headmap.rule
    how = rule.name if rule.alpha is None else f"{rule.name}, cut at {rule.alpha:.3f}"
    lines = [
        ("labels", ", ".join(f"{n} {label}" for label, n in counts.items())),
        ("rule", how + (f" ({rule.reason})" if rule.reason else "")),
        ("mean recency score of a head", f"{means.min():.3f} to {means.max():.3f}"),
        ("its spread over samples (median head)", _number(over_samples.median())),
        ("its spread over denoising steps (median head)", _number(over_steps.median())),
    ]
    if headmap.confidence:
        flat = sorted(value for row in headmap.confidence for value in row)
        sure = sum(value >= 0.95 for value in flat)
        lines.append(("keep their label in at least 95% of observations", f"{sure} of {len(flat)} heads"))
    if headmap.statistics:
        s = headmap.statistics
        lines.append(("measured on", f"{s.samples} samples x {s.chunks} chunks x {s.steps} steps"))
    return lines


def report_html(scores: pl.DataFrame, headmap: HeadMap, command: Sequence[str]) -> str:
    """The page: verdict, pictures, and the command that made it."""
    lines = summary(scores, headmap)
    figures = [
        (headmap_picture(headmap), "Mean recency score of each head, layers by heads, with its label"),
        (
            spread_picture(scores, headmap),
            "Mean score of each head; the bar holds 90% of its observations (samples, chunks, steps)",
        ),
        (recency_picture(scores), "Mean recency score of each layer over the denoising steps"),
    ]
    return _PAGE.format(
        name=html.escape(headmap.model.name),
        verdict=html.escape(f"{lines[0][1]}, by {lines[1][1]}."),
        rows="".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in lines),
        figures="".join(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            f"<figcaption>{alt}</figcaption></figure>"
            for png, alt in figures
        ),
        command=html.escape(shlex.join(command)),
    )


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "unknown"
