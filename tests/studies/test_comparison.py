"""The comparison of policies: its two beds, its variants, and that a run writes all of it and goes on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import policy_names
from studies.ablation.variants import read_variants
from studies.comparison import __main__ as driver
from studies.comparison.bed_pictures import TITLES
from studies.comparison.bed_tables import COLUMNS
from studies.comparison.beds import BEDS, CHUNKS, GOES_ON, demo_bed, occluded_bed

FRAMES = 3


def real(bed_clip_frames: np.ndarray) -> np.ndarray:
    return np.asarray((bed_clip_frames + 1) * 127.5).round().astype(np.uint8)[..., None].repeat(3, -1)


def test_every_policy_that_ships_is_compared() -> None:
    variants = read_variants(driver.POLICIES)
    spec = load_spec("demo")
    assert set(policy_names()) <= {variant.name for variant in variants}
    for variant in variants:
        if not variant.policy.needs_headmap:
            build_plan(spec, spec.geometry(), variant.policy)


def test_beds_say_what_they_compare_by() -> None:
    assert BEDS.keys() == COLUMNS.keys()
    for quality, _ in COLUMNS.values():
        assert quality in TITLES


def test_prompts_of_the_demo_bed_are_new_and_its_videos_longer_than_the_window() -> None:
    bed = demo_bed(8)
    assert len(set(bed.names)) == 8
    assert not set(bed.names) & set(bed.measured_on)
    assert bed.samples == demo_bed(16).samples[:8]
    assert load_spec("demo").attended_frames < CHUNKS * FRAMES


def test_a_real_clip_that_comes_back_is_right_and_black_frames_are_not() -> None:
    from studies.occluded_bed import bed_clips

    bed, asked = occluded_bed(16), bed_clips(1, 0)
    for number in (0, 7):
        sample, clip = bed.samples[number], asked[number].clip
        assert sample.start is not None
        frames = (sample.chunks - GOES_ON) * FRAMES
        video = np.concatenate(
            [real(clip.frames[:frames]), np.zeros((GOES_ON * FRAMES, 32, 48, 3), np.uint8)]
        )
        found = bed.measure(number, video, video)
        assert found["place"] == found["direction"] == 1
        assert found["psnr_real"] is None
        away = clip.timeline.away
        assert found[f"right_after_{away}"] == found["right"]
        assert found["right_in_window"] == (found["right"] if away <= 4 else None)
        black = bed.measure(number, np.zeros_like(video), video)
        assert black["right"] == 0


@pytest.mark.long
def test_a_run_writes_table_numbers_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("studies.comparison.beds.CHUNKS", 2)
    words = f"x --bed demo --prompts 2 --samples 1 --only full --out {tmp_path} --folder {tmp_path}/f"
    monkeypatch.setattr("sys.argv", words.split())
    driver.main()
    rows = list(csv.DictReader((tmp_path / "comparison-demo.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == ["full", "forcing-kv"]
    assert (tmp_path / "pictures" / "comparison-demo.png").is_file()
    assert "2/2 forcing-kv" in capsys.readouterr().err
    assert (
        "--bed demo --prompts 2 --samples 1 --only full`: 2 videos"
        in (tmp_path / "comparison.md").read_text()
    )
