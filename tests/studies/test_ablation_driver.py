"""python -m studies.ablation on two prompts and two variants, twice: the second run makes no video again."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from studies.ablation import __main__ as driver
from studies.ablation.variant_videos import VariantVideos


@pytest.mark.long
def test_a_run_writes_everything_and_goes_on_from_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "docs"
    out.mkdir()
    page = out / "ablations.md"
    page.write_text(f"# Before\n\n{driver.BEGIN}\nan old table\n{driver.END}\n\nAfter\n")
    words = "ablations.py --prompts 2 --samples 1 --chunks 3 --only forcing-kv"
    words += f" --out {out} --folder {tmp_path}/done"
    monkeypatch.setattr("sys.argv", words.split())
    driver.main()
    first = (out / "ablations.csv").read_bytes()
    rows = list(csv.DictReader(first.decode().splitlines()))
    assert [row["variant"] for row in rows] == ["full", "forcing-kv"]
    assert [row["videos"] for row in rows] == ["2", "2"]
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith(f"{driver.END}\n\nAfter\n")
    assert "an old table" not in text
    command = "`python -m studies.ablation --prompts 2 --chunks 3 --samples 1 --only forcing-kv`"
    assert command in text
    assert (out / "pictures" / "ablations.png").is_file()
    assert (out / "pictures" / "ablation-differences.png").is_file()
    assert "2/2 forcing-kv" in capsys.readouterr().err

    def made(*_: object) -> None:
        raise AssertionError("a video is made again")

    monkeypatch.setattr(VariantVideos, "_made", made)
    driver.main()
    assert (out / "ablations.csv").read_bytes() == first


def test_too_many_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", "--prompts", "60"])
    with pytest.raises(SystemExit, match="--prompts is 60: only 48 are left"):
        driver.main()


def test_a_variant_that_there_is_not_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no variant 'best'; expected some of .*uniform"):
        driver.chosen_variants(["best"])
