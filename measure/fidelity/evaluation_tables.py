"""Results of `forcingkv evaluate` as tables, JSON and CSV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from forcingkv.measure.fidelity.evaluation import Estimate, EvaluationSummary
from forcingkv.measure.fidelity.video_measures import METRICS
from forcingkv.measure.tables import printable
from forcingkv.resampling import CONFIDENCE

Cells = dict[str, str]
"""Metric -> what a column shows of it."""

COLUMN = 24
"""Characters of a policy's or a video's column."""
FIRST = 30
"""Of the metrics' names."""


def summary_data(summary: EvaluationSummary, bundles: Mapping[str, str], chunks: int) -> dict[str, Any]:
    """The summary for JSON.

    Args:
        summary: what was found.
        bundles: folder of each policy.
        chunks: length of the videos.
    """
    return {
        "reference": summary.reference,
        "videos": summary.videos,
        "prompts": summary.prompts,
        "chunks": chunks,
        "confidence": CONFIDENCE,
        "warnings": summary.warnings,
        "policies": [
            {
                "policy": policy,
                "bundle": bundle,
                "metrics": {
                    metric: vars(one.value) | {"difference": one.difference and vars(one.difference)}
                    for metric, one in summary.policies[policy].items()
                },
            }
            for policy, bundle in bundles.items()
        ],
    }


def print_policies(summary: EvaluationSummary) -> None:
    """Print means with intervals, and differences to the reference."""
    title = f"{summary.videos} videos a policy, {summary.prompts} prompts: mean and {CONFIDENCE:.0%} interval"
    shown, apart = dict[str, Cells](), dict[str, Cells]()
    for policy, results in summary.policies.items():
        shown[policy] = {metric: _interval(metric, one.value) for metric, one in results.items()}
        if policy != summary.reference:
            differences = {metric: one.difference for metric, one in results.items() if one.difference}
            apart[policy] = {metric: _interval(metric, one, "+") for metric, one in differences.items()}
    out = _console(len(shown))
    out.print(printable(title, ["", *shown], _rows(list(shown.values()))))
    if any(apart.values()):
        title = f"difference to {summary.reference}, pair by pair; * where the interval excludes 0"
        out.print(printable(title, ["", *apart], _rows(list(apart.values()))))
    for warning in summary.warnings:
        out.print(f"warning: {warning}", soft_wrap=True)


def print_files(files: Sequence[Mapping[str, Any]]) -> None:
    """Print the numbers of video files, a column a file."""
    values = [{m: _number(m, v) for m, v in file["values"].items() if v is not None} for file in files]
    rows = [["frames", *(str(file["frames"]) for file in files)], *_rows(values)]
    table = printable("videos", ["", *(Path(file["video"]).stem for file in files)], rows)
    for column in table.columns[1:]:
        column.overflow = "fold"  # a file's name has no spaces to break it at
    _console(len(files)).print(table)


def metric_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of rows of videos: what a video is, then its metrics in their order."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [*(name for name in names if name not in METRICS), *(name for name in METRICS if name in names)]


def _console(columns: int) -> Console:
    return Console(width=FIRST + (COLUMN + 3) * columns + 4, highlight=False)


def _rows(columns: Sequence[Cells]) -> Iterator[list[str]]:
    """A row for each metric that any of the columns has."""
    for name, metric in METRICS.items():
        if any(name in cells for cells in columns):
            title = metric.title if metric.unit in ("", "share") else f"{metric.title}, {metric.unit}"
            yield [title, *(cells.get(name, "-") for cells in columns)]


def _interval(metric: str, value: Estimate, sign: Literal["", "+"] = "") -> str:
    """A mean and its interval; a difference (sign "+") is marked where that excludes 0."""
    mean, *ends = (
        "-" if number is None else _number(metric, number, sign)
        for number in (value.mean, value.low, value.high)
    )
    if value.low is None:
        return mean
    return f"{mean} [{', '.join(ends)}]{'*' if sign and value.excludes_zero else ''}"


def _number(metric: str, value: float, sign: Literal["", "+"] = "") -> str:
    """Shares in percent (of differences: in points), decibels to 0.1, all else to 0.01 or 0.001."""
    unit = METRICS[metric].unit
    if unit == "share":
        return f"{100 * value:{sign}z.0f}%"
    digits = 1 if unit == "dB" else 2 if abs(value) >= 1 else 3
    return f"{value:{sign}z.{digits}f}"
