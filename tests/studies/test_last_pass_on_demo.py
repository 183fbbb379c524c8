"""The study of what the clean pass is worth: which videos are pairs, what is compared, how it goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from forcingkv.headmaps import InputError
from forcingkv.models.presets import load_spec
from studies import last_pass_on_demo as study
from studies import occluded_bed as bed
from tests.studies.test_occluded_bed import NEWEST, options


def asked(out: Path, **other: object) -> argparse.Namespace:
    given = {"out": out, "prompts": 2, "chunks": 2, "ends": [700.0], "policies": "full", "headmap": study.MAP}
    return argparse.Namespace(**(given | {"seed": 0, "backend": "torch"} | other))


def test_passes_are_made_down_to_an_end() -> None:
    spec = load_spec("demo")
    assert study.ending_at(spec, 500.0).schedule.denoising_steps == (1000.0, 950.0, 850.0, 700.0, 500.0)
    assert study.ending_at(spec, 250.0).schedule.later == spec.schedule.later
    with pytest.raises(InputError, match=r"has no pass at 600.*some of 1000, 950, 850, 700, 500, 250"):
        study.ending_at(spec, 600.0)


def test_videos_are_measured_once_each_and_compared_in_pairs(tmp_path: Path) -> None:
    rows = study.run(asked(tmp_path))
    path = tmp_path / study.VIDEOS
    assert [(row["policy"], row["end"]) for row in rows] == [
        ("full, clean", 700.0),
        ("full, last", 700.0),
    ] * 2
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]
    before = path.read_text()
    assert study.run(asked(tmp_path)) == rows
    assert path.read_text() == before
    compared = {row["measure"]: row for row in study.compared(rows)}
    assert compared["psnr"]["clean"].mean is None, "it is the reference"
    assert 5 < compared["psnr"]["last"].mean < 60, "another video"
    for name in ("motion", "chunk_discontinuity", "sharpness_drift"):
        row = compared[name]
        assert row["difference"].mean == pytest.approx(row["last"].mean - row["clean"].mean)
    text = study.table([*compared.values()])
    assert text.startswith(
        "| end | policy | measure | clean | last | difference |\n|---|---|---|---|---|---|\n"
    )
    with pytest.raises(InputError, match="has videos of other weights"):
        study.run(asked(tmp_path, chunks=3))
    with pytest.raises(InputError, match="lacks full"):
        study.run(asked(tmp_path / "other", policies="window"))


def test_returning_digits_are_compared_clip_by_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "MOST_AWAY", 1)
    monkeypatch.setattr(bed, "ENTRIES", {"first frame": (0, 0)})
    for context in ("clean", "last"):
        bed.run(tmp_path, [NEWEST], bed.bed_clips(2, 0), options(context=context))
        if context == "clean":
            with pytest.raises(InputError, match="no policy both as it is and as NAME, last pass"):
                [*study.returns(tmp_path / bed.RETURNS)]
    lines = [*map(json.loads, (tmp_path / bed.RETURNS).read_text().splitlines())]
    assert [line["policy"] for line in lines] == ["newest"] * 2 + ["newest, last pass"] * 2
    rows = [*study.returns(tmp_path / bed.RETURNS)]
    assert [(row["away"], row["measure"]) for row in rows] == [
        (away, name) for away in ("all", 1) for name in bed.JUDGED
    ]
    for row in rows:
        assert row["difference"].mean == pytest.approx(row["last"].mean - row["clean"].mean)
        assert row["difference"].videos == 2
