"""Names from files: nothing of them is a command to a terminal, a line of ours, or a formula."""

from __future__ import annotations

import csv
import pickle
import re
import unicodedata
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.headmaps.plain import plain, plain_cell
from forcingkv.measure.tables import write_csv
from forcingkv.runtime.faults import SessionError

HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "\x1b]52;c;aGk=\x07": r"\x1b]52;c;aGk=\x07",
    "\x9b31m": r"\x9b31m",
    "a\nerror: forged": r"a\nerror: forged",
    "a\rb\tc\x7f\0": r"a\rb\tc\x7f\x00",
    "\u202egnp.exe\u2066": r"\u202egnp.exe\u2066",
    "\u2028\u2029\ufeff": r"\u2028\u2029\ufeff",
    "\ud800": r"\ud800",
}


def test_commands_are_shown_by_their_names() -> None:
    assert {text: plain(text) for text in HOSTILE} == HOSTILE
    assert plain("a\nb\x1b", lines=True) == "a\nb\\x1b"


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_else_is_changed_and_nothing_is_left(text: str) -> None:
    shown = plain(text)
    shown.encode()  # no half characters
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs")]
    kept = [c for c in text if plain(c) == c]
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    if len(kept) == len(text):
        assert shown == text
    assert plain("日本 é 🪁 e\u0301 \u200d") == "日本 é 🪁 e\u0301 \u200d"


def test_errors_are_shown_so_and_keep_what_they_were_given() -> None:
    for text, shown in HOSTILE.items():
        error = InputError(f"is {text}", where=text, expected=text, hint=text)
        assert str(error) == f"{shown} is {shown}; expected {shown}. {shown}"
        assert (error.what, error.where, error.expected, error.hint) == (f"is {text}", text, text, text)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert str(SessionError(text)) == shown
    assert str(InputError("is old", where="it", form="a = 1\nb = '\x1b'")) == "it is old.\na = 1\nb = '\\x1b'"


def test_cells_are_no_formulas(tmp_path: Path) -> None:
    cells = ["=cmd|'calc'!A0", "+1", "-1", "@SUM(1)", "\tx", "\rx", "a=1", "kite.mp4", "", -1.5, 2, None]
    write_csv(tmp_path / "a.csv", ["cell"], [{"cell": cell} for cell in cells])
    with (tmp_path / "a.csv").open(newline="") as file:
        found = [row["cell"] for row in csv.DictReader(file)]
    quoted = ["'=cmd|'calc'!A0", "'+1", "'-1", "'@SUM(1)", "'\\tx", "'\\rx"]
    assert found == [*quoted, "a=1", "kite.mp4", "", "-1.5", "2", ""]
    assert plain_cell(-3) == -3
