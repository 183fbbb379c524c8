"""The files that an analysis writes beside its statistics, and which in a folder are an earlier one's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from forcingkv.analyze.analysis import Analysis, summary_json
from forcingkv.analyze.report import report_html
from forcingkv.analyze.storage import Storage
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.reading import read_json
from forcingkv.headmaps.writing import check_file, held_inside, refuse_name, unwritable_where, write_text

HEADMAP, STABILITY, REPORT = "headmap.json", "stability.json", "report.html"
_SCHEMAS = {HEADMAP: "forcingkv.headmap/", STABILITY: "forcingkv.stability/"}
"""What the schema of each begins with, in any version."""


def write_analysis(analysis: Analysis, out: Path, command: Sequence[str] = ()) -> None:
    """Write headmap.json, stability.json and report.html, each whole or not at all.

    Raises InputError where they cannot be written, or others of those names are there.
    """
    check_results(out)
    page = report_html(analysis, command)
    write_text(out / STABILITY, json.dumps(summary_json(analysis), indent=1) + "\n")
    write_text(out / REPORT, page)
    analysis.headmap.write(out / HEADMAP)


def check_results(out: Path) -> None:
    """Raise InputError unless results can be written into a folder now, and replace nothing but earlier ones.

    A report is one of ours where stability.json is, which is written before it.
    """
    for name in (HEADMAP, STABILITY, REPORT):
        path = out / name
        check_file(path)
        if path.exists() and not _is_ours(path):
            raise InputError(
                "is there, and is none of an earlier analysis", where=str(path), hint="Choose another --out."
            )


def check_places(out: Path, stats: str | Path | None, *, samples: int, restart: bool) -> None:
    """Raise InputError unless an analysis can be written, and samples that are still to be recorded.

    For before the weights are fetched. The arguments are those of `analyze_heads`.
    """
    storage = Storage(stats or out / "stats")
    if restart or storage.lacks(samples):
        storage.check_writable()
    check_results(out)


@contextmanager
def analyzed_alone(out: Path) -> Iterator[None]:
    """Hold the folder of an analysis. Raises InputError where another process analyses into it."""
    refuse_name(out)
    with unwritable_where(out), held_inside(out, "analysis"):
        yield


def _is_ours(path: Path) -> bool:
    if path.name == REPORT:
        path = path.with_name(STABILITY)
    try:
        data = read_json(path)
    except InputError:
        return False
    schema = data.get("schema") if isinstance(data, dict) else None
    return isinstance(schema, str) and schema.startswith(_SCHEMAS[path.name])
