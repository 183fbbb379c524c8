"""Results of `forcingkv evaluate` as tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forcingkv.headmaps.files import write_text
from forcingkv.measure.fidelity.evaluation import EvaluationSummary
from forcingkv.measure.fidelity.intervals import Estimate
from forcingkv.measure.fidelity.video_measures import METRICS
from forcingkv.resampling import CONFIDENCE

COLUMN = 24
"""Characters of a policy's or a video's column."""
FIRST = 30
"""Of the metrics' names."""


def summary_data(summary: EvaluationSummary, bundles: Mapping[str, str], chunks: int) -> dict[str, Any]:
    """The summary for JSON."""
    policies = []
    for name, bundle in bundles.items():
        metrics = {
            result.metric: vars(result.value)
            | {"difference": vars(result.difference) if result.difference else None}
            for result in summary.results
            if result.policy == name
        }
        policies.append({"policy": name, "bundle": bundle, "metrics": metrics})
    return {
        "reference": summary.reference,
        "videos": summary.videos,
        "prompts": summary.prompts,
        "chunks": chunks,
        "confidence": CONFIDENCE,
        "warnings": list(summary.warnings),
        "policies": policies,
    }


def print_policies(summary: EvaluationSummary) -> None:
    """Print means with intervals, and differences to the reference."""
    names = list(dict.fromkeys(result.policy for result in summary.results))
    found = {(result.policy, result.metric): result for result in summary.results}
    title = f"{summary.videos} videos a policy, {summary.prompts} prompts: mean and {CONFIDENCE:.0%} interval"
    values = {key: result.value for key, result in found.items()}
    out = Console(width=FIRST + (COLUMN + 3) * len(names) + 4, highlight=False)
    out.print(_table(title, names, values))
    differences = {key: result.difference for key, result in found.items() if result.difference}
    if differences:
        others = [name for name in names if name != summary.reference]
        title = f"difference to {summary.reference}, pair by pair; * where the interval excludes 0"
        out.print(_table(title, others, differences, signed=True))
    for warning in summary.warnings:
        out.print(f"warning: {warning}", soft_wrap=True)


def print_files(files: Sequence[Mapping[str, Any]]) -> None:
    """Print the numbers of video files, a column a file."""
    table = Table(title="videos")
    table.add_column("")
    for file in files:
        table.add_column(Path(file["video"]).stem, justify="right", overflow="fold")
    table.add_row("frames", *(str(file["frames"]) for file in files))
    for name, metric in METRICS.items():
        if any(file["values"].get(name) is not None for file in files):
            cells = [_number(file["values"].get(name), metric.unit) for file in files]
            table.add_row(_title(name), *cells)
    Console(width=FIRST + (COLUMN + 3) * len(files) + 4, highlight=False).print(table)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV, with the columns of all of them; a cell without a value is empty.

    Raises InputError where the file cannot be written.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    metrics = [name for name in METRICS if name in columns]
    columns = [name for name in columns if name not in METRICS] + metrics
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _table(
    title: str, names: Sequence[str], values: Mapping[tuple[str, str], Estimate], signed: bool = False
) -> Table:
    table = Table(title=title)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for metric in METRICS:
        if any((name, metric) in values for name in names):
            cells = [_cell(values.get((name, metric)), METRICS[metric].unit, signed) for name in names]
            table.add_row(_title(metric), *cells)
    return table


def _cell(value: Estimate | None, unit: str, signed: bool) -> str:
    if value is None or value.mean is None:
        return "-"
    mark = "*" if signed and value.excludes_zero else ""
    shown = _number(value.mean, unit, signed)
    if value.low is None:
        return shown + mark
    low, high = (_number(end, unit, signed) for end in (value.low, value.high))
    return f"{shown} [{low}, {high}]{mark}"


def _title(name: str) -> str:
    metric = METRICS[name]
    return metric.title if metric.unit in ("", "share") else f"{metric.title}, {metric.unit}"


def _number(value: float | None, unit: str, signed: bool = False) -> str:
    """Shares in percent (of differences: in points), decibels to 0.1, all else to 0.01 or 0.001."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if unit == "share":
        return f"{100 * value:{sign}z.0f}%"
    if unit == "dB":
        return f"{value:{sign}z.1f}"
    return f"{value:{sign}z.{2 if abs(value) >= 1 else 3}f}"
