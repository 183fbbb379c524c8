"""The study of what memory is worth: which clips it takes, what it counts, and that it goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from forcingkv.headmaps import InputError
from forcingkv.models.presets import shipped_file
from studies import occluded_bed as bed

NEWEST = str(Path(bed.__file__).with_name("newest.toml"))


def options(**other: object) -> argparse.Namespace:
    given = {
        "checkpoint": shipped_file("demo", "weights.safetensors"),
        "headmap": None,
        "seed": 0,
        "backend": "torch",
        "context": None,
        "waits": "given",
    }
    return argparse.Namespace(**(given | other))


def test_the_clips_are_as_many_of_every_length_and_entry() -> None:
    clips = bed.bed_clips(4, 0)
    assert len(clips) == 64
    assert len({asked.name for asked in clips}) == 64
    assert {asked.clip.timeline.away for asked in clips} == set(range(1, 9))
    for asked in clips:
        assert (asked.clip.timeline.late == 0) == (asked.entry == "first frame")
    fewer = bed.bed_clips(1, 0)
    assert {asked.name: asked.clip.prompt for asked in fewer}.items() <= {
        asked.name: asked.clip.prompt for asked in clips
    }.items()


@pytest.mark.long
def test_sessions_are_judged_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "MOST_AWAY", 1)
    monkeypatch.setattr(bed, "ENTRIES", {"first frame": (0, 0)})
    bed.run(tmp_path, [NEWEST], bed.bed_clips(1, 0), options())
    path = tmp_path / bed.RETURNS
    first = path.read_text()
    bed.run(tmp_path, [NEWEST], bed.bed_clips(2, 0), options())
    assert path.read_text().startswith(first)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["clip"] for line in lines] == ["1 away, first frame, 0", "1 away, first frame, 1"]
    for row in bed.rows(path):
        assert row["policy"] == "newest"
        assert row["seen_in_window"]
        for name in bed.JUDGED:
            low, high = row[f"{name}_interval"]
            assert 0 <= low <= row[name] / row["returns"] <= high <= 1
    assert [row["returns"] for row in bed.rows(path) if row["kind"] == "all"] == [4]
    with pytest.raises(InputError, match="videos of newest with other weights"):
        bed.run(tmp_path, [NEWEST], bed.bed_clips(2, 0), options(seed=1))


def test_what_is_counted(tmp_path: Path) -> None:
    line = {"policy": "full", "clip": "x", "away": 5, "late": 0, "entry": "first frame", "made_of": ""}
    line |= {"kind": ["bar", "side"], "wanted": [1, 2], "digit": [True, False]}
    (tmp_path / "r").write_text(
        json.dumps(line | {"place": [True, True], "direction": [False, False]}) + "\n"
    )
    rows = {(row["entry"], row["kind"]): row for row in bed.rows(tmp_path / "r")}
    assert {
        key: (row["returns"], row["digit"], row["place"], row["direction"]) for key, row in rows.items()
    } == {
        ("all", "all"): (2, 1, 2, 0),
        ("first frame", "bar"): (1, 1, 1, 0),
        ("first frame", "side"): (1, 0, 1, 0),
    }
    assert rows["all", "all"]["digit_interval"] == pytest.approx([0.095, 0.905], abs=0.001)
    assert not rows["all", "all"]["seen_in_window"]


@pytest.mark.long
@pytest.mark.parametrize("clips", [1, pytest.param(8, marks=pytest.mark.long)])
def test_what_comes_back_is_known_with_memory_and_not_with_the_newest_frame_alone(
    tmp_path: Path, clips: int
) -> None:
    """The instrument at its ends. A guess has digit and place right in one of thirty returns."""
    asked = [one for one in bed.bed_clips(4, 0) if one.clip.timeline.away == 2][:clips]
    bed.run(tmp_path, [NEWEST, "full"], asked, options(checkpoint=None))
    for row in bed.rows(tmp_path / bed.RETURNS):
        if row["kind"] == "all":
            right = (row["digit"] + row["place"]) / (4 * clips)
            assert right >= 0.8 if row["policy"] == "full" else right <= 0.25
