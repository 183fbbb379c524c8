"""Results as tables and text: in the terminal, and as CSV files."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from forcingkv.headmaps.writing import write_text

WIDTH = 80
"""Columns that lines of text keep to, wherever they are shown."""


def printable(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for people: the first column begins on the left, the others end on the right."""
    table = Table(title=title)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def wrapped(first: str, text: str) -> list[str]:
    """Lines of `WIDTH` columns: `first`, then the text; others begin below its first word, or set in."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * (len(first) or 2))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV; a cell without a value is empty. Raises InputError where that cannot be written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
