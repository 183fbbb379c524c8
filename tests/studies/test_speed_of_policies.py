"""The table of how fast policies are: what a chunk is, what it is compared with, and where it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.headmaps import InputError
from forcingkv.measure.bench import turns
from forcingkv.measure.bench.turns import BenchCase, BenchTurns, Turn
from forcingkv.runtime import Bundle
from forcingkv.runtime.cost import pass_flops
from studies import speed_of_policies as study
from tests.runtime.conftest import bundles

__all__ = ["bundles"]


def timed(path: Path, *passes: tuple[float, float]) -> BenchTurns:
    return BenchTurns(BenchCase(Bundle.open(path)), [Turn(*seconds, None, 0, 0) for seconds in passes])


def test_ratios_are_those_of_a_round(bundles: Callable[[str], Path]) -> None:
    """Two denoising passes and one that fills the cache; in the second round the machine was slower."""
    full = timed(bundles("full"), (4.0, 5.0), (8.0, 10.0))
    window = timed(bundles("window"), (2.0, 3.0), (4.0, 6.0))
    rows = [*study.rows_of([full, window])]
    assert [(row["policy"], row["context"], row["passes"]) for row in rows] == [
        (policy, context, passes)
        for policy in ("full", "window")
        for context, passes in (("clean", 3), ("last", 2))
    ]
    assert [row["seconds"] for row in rows] == [19.5, 13.5, 10.5, 7.5]
    assert [row["ratio"] for row in rows] == pytest.approx([1, 13 / 9, 13 / 7, 13 / 5])
    assert rows[1]["ratio_least"] == rows[1]["ratio_most"]
    most, own = (pass_flops(one.bundle.plan).total for one in (full, window))
    assert [row["limit"] for row in rows] == pytest.approx([1, 1.5, most / own, 1.5 * most / own])
    assert all(row["share"] == pytest.approx(row["ratio"] / row["limit"]) for row in rows)
    text = study.table(rows)
    assert text.count("\n") == 6
    assert "| `window` | last | 2 | 7.50 | 2.60 (2.60 to 2.60) |" in text
    with pytest.raises(InputError, match="lacks full"):
        [*study.rows_of([window])]


def test_every_shipped_policy_can_be_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On torch, of one small layer, into a page."""
    monkeypatch.setattr(turns, "TIMED_SECONDS", 1e-6)
    page, model = tmp_path / "page.md", tmp_path / "narrow.toml"
    page.write_text("# Before\n")
    model.write_text(
        'base = "self-forcing"\nname = "self-forcing"\nhead_dim = 6\nffn_width = 8\ntext_width = 8\n'
        "text_length = 4\nlatent_channels = 3\nwidth = 24\nheight = 8\n"
        '[decoder]\nkind = "pixels"\nspatial_stride = 1\ntemporal_stride = 1\n'
    )
    words = (
        f"x --model {model} --layers 1 --resolution 24x8 --backend torch --rounds 1 --threads 1 --page {page}"
    )
    monkeypatch.setattr("sys.argv", words.split())
    study.main()
    table = capsys.readouterr().out
    begin, end = study.MARKS
    written = page.read_text()
    assert written.startswith(
        f"# Before\n\n{begin}\n{study.HEADING}\n\n`python -m studies.speed_of_policies --model"
    )
    assert written.endswith(f"\n\n{table}{end}\n")
    assert table.count("| clean | 5 |") == table.count("| last | 4 |") == len(study.policy_names())
