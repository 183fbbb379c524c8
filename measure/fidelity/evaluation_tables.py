"""Results of `forcingkv evaluate` as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from forcingkv.measure.fidelity.evaluation import Estimate
from forcingkv.measure.fidelity.video_measures import METRICS
from forcingkv.measure.tables import PlainConsole, printable
from forcingkv.resampling import CONFIDENCE

Cells = dict[str, str]
"""Metric -> what a column shows of it."""

COLUMN = 24
"""Characters of a policy's or a video's column."""
FIRST = 30
"""Of the metrics' names."""


def print_policies(report: Mapping[str, Any]) -> None:
    """Print what `summarize` found: means with intervals, and differences to the reference."""
    reference, prompts = report["reference"], report["prompts"]
    shown, apart = dict[str, Cells](), dict[str, Cells]()
    for one in sorted(report["policies"], key=lambda one: one["policy"] != reference):
        policy, metrics = one["policy"], one["metrics"]
        shown[policy] = {metric: _interval(metric, found) for metric, found in metrics.items()}
        if policy != reference:
            differences = {metric: found["difference"] for metric, found in metrics.items()}
            apart[policy] = {
                metric: _interval(metric, found, "+") + "*" * Estimate(**found).excludes_zero
                for metric, found in differences.items()
                if found
            }
    out = _console(len(shown))
    title = f"{report['videos']} videos a policy, {prompts} prompts: mean and {CONFIDENCE:.0%} interval"
    out.print(printable(title, ["", *shown], _rows(list(shown.values()))))
    if any(apart.values()):
        title = f"difference to {reference}, pair by pair; * where the interval excludes 0"
        out.print(printable(title, ["", *apart], _rows(list(apart.values()))))
    for warning in report["warnings"]:
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
    return PlainConsole(width=FIRST + (COLUMN + 3) * columns + 4)


def _rows(columns: Sequence[Cells]) -> Iterator[list[str]]:
    """A row for each metric that any of the columns has."""
    for name, (title, unit) in METRICS.items():
        if any(name in cells for cells in columns):
            named = title if unit in ("", "share") else f"{title}, {unit}"
            yield [named, *(cells.get(name, "-") for cells in columns)]


def _interval(metric: str, found: Mapping[str, Any], sign: Literal["", "+"] = "") -> str:
    """The mean of an `Estimate` and its interval."""
    numbers = [found[name] for name in ("mean", "low", "high") if found[name] is not None]
    mean, *ends = [_number(metric, number, sign) for number in numbers]
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def _number(metric: str, value: float, sign: Literal["", "+"] = "") -> str:
    """Shares in percent (of differences: in points), decibels to 0.1, all else to 0.01 or 0.001."""
    _, unit = METRICS[metric]
    if unit == "share":
        return f"{100 * value:{sign}z.0f}%"
    digits = 1 if unit == "dB" else 2 if abs(value) >= 1 else 3
    return f"{value:{sign}z.{digits}f}"
