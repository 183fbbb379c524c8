"""What comes of measures: differences in pairs, draws told together, the frontier; tables and pictures."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image

from forcingkv.models.demo.data import make_clip
from studies.ablation.demo_scores import MEASURES, measure_videos
from studies.ablation.variant_pictures import difference_picture, pareto_picture
from studies.ablation.variant_scores import Cost, VariantRow, VariantScores, frontier, rows_of
from studies.ablation.variant_tables import csv_text, markdown_table
from studies.ablation.variant_videos import Sample
from studies.ablation.variants import Variant, read_variants

FRAMES = 3
CHUNKS = 7
COST = Cost(1, 1)


def made(variant: Variant, kv_bytes: int, digits: list[float], psnr: list[float | None]) -> VariantScores:
    values: dict[str, list[float | None]] = {name: [1.0] * len(digits) for name in MEASURES}
    values |= {"digits": list(digits), "psnr": psnr}
    return VariantScores(variant, Cost(kv_bytes, 2 * kv_bytes), values)


@pytest.fixture(scope="module")
def rows() -> list[VariantRow]:
    """Six variants with planted measures, of the prompts a, b and c."""
    variants = {(v.name, v.draw): v for v in read_variants()}
    return rows_of(
        [
            made(variants["full", None], 1000, [1.0, 1.0, 0.5], [None, None, None]),
            made(variants["forcing-kv", None], 400, [1.0, 0.5, 0.5], [20.0, 22.0, 24.0]),
            made(variants["random", 1], 400, [0.5, 0.5, 0.5], [18.0, 20.0, 22.0]),
            made(variants["random", 2], 400, [1.0, 1.0, 0.0], [20.0, 20.0, None]),
            made(variants["all static", None], 300, [0.0, 0.5, 0.5], [19.0, 19.5, 22.0]),
            made(variants["window 6", None], 700, [0.5, 0.5, 0.5], [25.0, 26.0, 27.0]),
        ],
        "abc",
    )


def test_differences_are_of_the_same_sample(rows: list[VariantRow]) -> None:
    found = {row.name: row for row in rows}
    static = found["all static"]
    assert static.to_full["digits"].mean == pytest.approx(np.mean([-1.0, -0.5, 0.0]))
    assert static.to_profiled["psnr"].mean == pytest.approx(np.mean([-1.0, -2.5, -2.0]))
    assert static.to_profiled["psnr"].excludes_zero
    assert static.to_full["psnr"].mean is None, "full has no PSNR to itself"
    assert found["forcing-kv"].to_profiled["psnr"].mean == 0


def test_draws_are_one_row_with_their_spread(rows: list[VariantRow]) -> None:
    assert [row.name for row in rows] == ["full", "forcing-kv", "random", "all static", "window 6"]
    drawn = rows[2]
    assert (drawn.draws, drawn.kv_bytes, drawn.attention) == (2, 400, 0.4)
    assert drawn.means["digits"].mean == pytest.approx(np.mean([0.5, 0.5, 0.5, 1, 1, 0]))
    assert (drawn.means["digits"].videos, drawn.means["digits"].prompts) == (6, 3)
    assert drawn.spread["digits"] == pytest.approx((0.5, 2 / 3))
    assert drawn.means["psnr"].mean == pytest.approx(20.0), "what is not known is left out"


def test_the_frontier_is_what_nothing_beats(rows: list[VariantRow]) -> None:
    assert [row.name for row in frontier(rows, "digits")] == ["all static", "forcing-kv", "full"]
    assert [row.name for row in frontier(rows, "psnr")] == ["all static", "forcing-kv", "window 6", "full"]


def test_the_csv_has_all_of_it(rows: list[VariantRow]) -> None:
    table = {row["variant"]: row for row in csv.DictReader(io.StringIO(csv_text(rows)))}
    static = table["all static"]
    assert static["kv_bytes"] == "300"
    assert float(static["digits_minus_full"]) == -0.5
    assert float(static["psnr_minus_profiled_low"]) < -1.8 < float(static["psnr_minus_profiled_high"])
    assert (static["digits_least_draw"], table["random"]["digits_least_draw"]) == ("", "0.5")
    assert table["full"]["psnr"] == "", "unknown stays unknown"


def test_the_markdown_table_is_one(rows: list[VariantRow]) -> None:
    lines = markdown_table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(rows)
    assert "`random`, 2 draws" in lines[4]
    assert "draws 50.0% to 66.7%" in lines[4]
    assert lines[3].endswith("| digits, PSNR |")
    assert "**-1.83 [" in lines[5], "an interval that excludes 0 is bold"


def test_pictures_are_drawn_alike_each_time(rows: list[VariantRow]) -> None:
    for draw in (pareto_picture, difference_picture):
        png = draw(rows)
        assert png == draw(rows)
        assert min(Image.open(io.BytesIO(png)).size) > 200


def test_real_clips_are_read_and_noise_is_not() -> None:
    rng, variant = np.random.default_rng(0), read_variants()[1]
    clips = [make_clip(rng, FRAMES * CHUNKS, "held-out") for _ in range(6)]
    samples = [Sample(clip.prompt, number, CHUNKS) for number, clip in enumerate(clips)]
    grey = np.stack([np.round((clip.frames + 1) * 127.5) for clip in clips]).astype(np.uint8)
    coloured = grey[..., None].repeat(3, -1)
    videos, noise = list(coloured), list(rng.integers(0, 256, coloured.shape, dtype=np.uint8))

    same = measure_videos(variant, COST, videos, videos, samples, FRAMES)
    assert np.mean(same.values["digits"]) > 0.9
    assert np.mean(same.values["directions"]) > 0.9
    assert same.values["psnr"] == [None] * 6
    assert same.values["ssim"] == pytest.approx([1.0] * 6)

    other = measure_videos(variant, COST, noise, videos, samples, FRAMES)
    assert np.mean(other.values["digits"]) < 0.5
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(noise, videos, strict=True)]
    assert other.values["psnr"] == pytest.approx([10 * np.log10(255**2 / error) for error in errors])
