"""Results as tables and text: in the terminal, and as CSV files."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from forcingkv.headmaps.plain import plain, plain_cell
from forcingkv.headmaps.writing import write_text

WIDTH = 80
"""Columns that lines of text keep to, wherever they are shown."""


class PlainConsole(Console):
    """A console that shows text as it is: rich would take [x] for markup, :fire: for a picture.

    What would be a command to the terminal is replaced (`headmaps.plain`), in cells of tables too; a
    text of several lines is given as rich's `Text`, or line by line.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)


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
    return textwrap.wrap(plain(text), WIDTH, initial_indent=first, subsequent_indent=" " * (len(first) or 2))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV; a cell without a value is empty, a formula to a spreadsheet begins with a quote.

    Raises InputError where that cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain_cell(cell) for name, cell in row.items()} for row in rows)
    write_text(path, text.getvalue())
