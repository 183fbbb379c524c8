"""Tables of text: a row a layer, a cell a head."""

from __future__ import annotations

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.readers.choices import size_limit


def read_grid(text: str, separator: str, where: str) -> list[list[str]]:
    """The cells, [layer][head], without the blanks around them.

    Raises InputError for an empty line between rows, and for rows of different lengths.
    """
    lines = text.strip("\r\n").splitlines()
    rows = [[cell.strip() for cell in line.split(separator)] for line in lines]
    for layer, row in enumerate(rows):
        if row == [""]:
            raise InputError(f"line {layer + 1} is empty", where=where, expected="a row for each layer")
        if len(row) != len(rows[0]):
            raise InputError(
                f"layer {layer} has {len(row)} heads", where=where, expected=f"{len(rows[0])}, as layer 0 has"
            )
    size_limit(len(rows), "the number of layers", where)
    size_limit(len(rows[0]), "the number of heads", where)
    return rows
