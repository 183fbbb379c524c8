"""Where chunks meet, and that what is planted there is found there, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.measure.fidelity.seams import (
    FLOOR_PIXELS,
    ChunkLayout,
    chunk_discontinuity,
    seam,
    seam_ratios,
)
from forcingkv.measure.fidelity.video_measures import Values, measure_video
from forcingkv.models.presets import load_spec
from forcingkv.runtime.video_reader import open_video
from studies.planted_seams import SEAMS, chunk_of
from tests.measure.textures import Frames, moving

WAN, DEMO = ChunkLayout(9, 12), ChunkLayout(3, 3)


def latent_frames(frames: int, stride: int) -> list[int]:
    """The latent frame each pixel frame is of: the first gives one, the others `stride`."""
    return [0, *(1 + place // stride for place in range(frames - 1))]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 80))
def test_layouts_are_those_of_latent_frames(latent: int, stride: int, frames: int) -> None:
    layout = ChunkLayout(1 + (latent - 1) * stride, latent * stride)
    assert layout.stride == stride
    endless = latent_frames(200, stride)
    of = endless[:frames]
    assert [chunk_of(frame, layout) for frame in range(frames)] == [place // latent for place in of]
    steps = [pair for pair in range(frames - 1) if of[pair] != of[pair + 1]]
    jumps = [pair for pair in steps if of[pair] // latent != of[pair + 1] // latent]
    assert layout.boundaries(frames) == jumps
    assert layout.crossings(frames) == sorted(set(steps) - set(jumps))
    for pair in jumps:
        meeting = {of[pair] // latent, of[pair + 1] // latent}
        inside = {p for p in range(199) if {endless[p] // latent, endless[p + 1] // latent} <= meeting}
        assert set(layout.around(pair)) == inside


def test_layouts_of_models() -> None:
    assert ChunkLayout.of(load_spec("demo")) == DEMO
    assert ChunkLayout.of(load_spec("self-forcing")) == WAN
    assert WAN.boundaries(81) == [8, 20, 32, 44, 56, 68]
    assert WAN.crossings(81)[:6] == [0, 4, 12, 16, 24, 28]
    assert DEMO.boundaries(21) == [2, 5, 8, 11, 14, 17]
    for first, later in [(0, 3), (4, 3), (9, 13), (1, 0)]:
        with pytest.raises(InputError, match=r"9 and 12 for Wan's VAE: F = 3, S = 4"):
            ChunkLayout(first, later)


def test_the_published_metric_is_the_formula_written_out() -> None:
    values = np.array([1.0, 5, 2, 4, 3])
    assert chunk_discontinuity(values, 2) == 4.5 / 3
    assert chunk_discontinuity(values, 5) == 1
    assert chunk_discontinuity(np.zeros(5), 2) is None


def test_a_ratio_is_that_of_the_boundary_to_the_crossings_around_it() -> None:
    values = np.arange(32.0) ** 2  # 33 frames: three chunks; boundaries are pairs 8 and 20
    first = (8**2 + 0.5) / ((4**2 + 12**2) / 2 + 0.5)  # crossings 0, 4, 12, 16: their median
    second = (20**2 + 0.5) / ((16**2 + 24**2) / 2 + 0.5)
    assert seam_ratios(values, WAN, 0.5) == pytest.approx((first, second))
    assert seam((2.0, None, 8.0)) == pytest.approx(4)
    assert seam((None,)) is None
    # One latent frame a chunk: nothing inside to compare with.
    assert seam_ratios(values, ChunkLayout(1, 4), 0.5) == (None,) * 8


def measured(video: Frames, layout: ChunkLayout) -> Values:
    values: Values = measure_video(video, layout, 16.0)["values"]
    return values


OURS = ("seam_motion", "seam_jolt", "seam_residual")
FINDS = {
    "brightness, 4 levels": "seam_residual",
    "colour, 6 levels": "seam_residual",
    "shift, 2 pixels": "seam_jolt",
    "blur, 1 pixel": "seam_residual",
    "stall": "seam_jolt",
}
"""Planted fault -> the measure that must see it."""


@pytest.mark.parametrize(("layout", "frames"), [pytest.param(WAN, 45, marks=pytest.mark.long), (DEMO, 21)])
def test_planted_seams_are_found_and_motion_inside_chunks_is_not(layout: ChunkLayout, frames: int) -> None:
    video = moving(frames, (1, 1))
    plain = measured(video, layout)
    for name in OURS:
        assert plain[name] == pytest.approx(1, abs=0.15)
    for fault, measure in FINDS.items():
        found = measured(SEAMS[fault](video, layout), layout)
        assert (found[measure] or 0) > 1.4 * (plain[measure] or 0), (fault, found)


def test_a_burst_of_motion_raises_the_published_metric_and_not_ours() -> None:
    video = moving(45, (1, 1))
    plain, found = measured(video, WAN), measured(SEAMS["motion inside chunks"](video, WAN), WAN)
    assert (found["chunk_discontinuity"] or 0) > 2 * (plain["chunk_discontinuity"] or 0)
    elsewhere = measured(SEAMS["nothing, looked for elsewhere"](video, WAN), WAN)
    for name in OURS:
        assert found[name] == pytest.approx(plain[name], abs=0.1), name
        assert elsewhere[name] == pytest.approx(1, abs=0.15), name


def test_a_seam_against_the_motion_is_a_jolt_though_less_moves() -> None:
    """Two pixels right each frame, and two back at each boundary: there the picture stands still."""
    video = moving(45, (0, 2))
    back = np.stack([np.roll(frame, -2 * chunk_of(i, WAN), 1) for i, frame in enumerate(video)])
    plain, found = measured(video, WAN), measured(back, WAN)
    assert (found["seam_motion"] or 9) < 0.6
    assert (found["seam_jolt"] or 0) > 3 * (plain["seam_jolt"] or 0)


def test_a_video_that_stands_still_has_no_seams() -> None:
    found = measured(np.repeat(moving(1), 33, 0), WAN)
    assert [found[name] for name in OURS] == pytest.approx([1, 1, 1])
    assert found["chunk_discontinuity"] is None


def test_a_video_of_one_chunk_has_no_boundaries() -> None:
    found = measured(moving(9), WAN)
    assert [found[name] for name in (*OURS, "chunk_discontinuity")] == [None] * 4
    with pytest.raises(InputError, match="has 1 frame; expected two or more"):
        measured(moving(1), WAN)
    with pytest.raises(InputError, match="changes its size after 1 frames"):
        measure_video([moving(1)[0], moving(1)[0, :32]], WAN, 16.0)
    with pytest.raises(InputError, match="has 8 pairs of frames, and the 9 with most motion are asked for"):
        measure_video(moving(9), WAN, 16.0, top=9)


@pytest.mark.slow
def test_a_published_video_has_stronger_seams_with_pruned_caches(data: Path) -> None:
    """One of the authors' demo videos: the table of docs/fidelity.md, at a third of the size."""
    found = {}
    for kind in ("baseline", "forcingkv"):
        with open_video(data / "videos" / f"self_forcing_5s_case_01_{kind}.mp4") as (fps, frames):
            assert fps == 16
            measures = measure_video((f[::3, ::3] for f in frames), WAN, fps, top=7)
        assert (measures["frames"], len(measures["boundaries"])) == (81, 6)
        found[kind] = measures["values"]
    for values in found.values():
        assert all(value is not None and np.isfinite(value) for value in values.values())
    assert (found["forcingkv"]["seam_residual"] or 0) > (found["baseline"]["seam_residual"] or 9)


def test_chunks_of_one_latent_frame_have_nothing_to_compare_a_seam_with() -> None:
    """Every step to the next latent frame is a boundary there: no ratio, and no number made of none."""
    spec = load_spec("causal-forcing-framewise")
    layout = ChunkLayout.of(spec)
    assert (layout.first, layout.later, layout.stride) == (1, 4, 4)
    assert (layout.boundaries(13), layout.crossings(13)) == ([0, 4, 8], [])
    ratios = seam_ratios(np.ones(12), layout, FLOOR_PIXELS)
    assert (ratios, seam(ratios)) == ((None, None, None), None)
