"""Measured queries against a head map: on made-up queries whose figures are known, and on LongLive's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from forcingkv.headmaps import InputError, read_headmap
from forcingkv.models.presets import load_spec
from studies.query_statistics import (
    QueryStatistics,
    agreement,
    compare,
    figures,
    read_query_statistics,
    told_apart,
)
from tests.conftest import headmap_of, small_spec

SPEC = small_spec(layers=2, heads=3, head_dim=12, attended_frames=12)
"""Two rotary pairs each of time, height and width. Over 12 frames those of time turn 12 and 0.12 radians."""


def statistics(mean: np.ndarray, size: np.ndarray) -> QueryStatistics:
    return QueryStatistics(mean.astype(np.complex128), size.astype(np.float64), 1)


def test_figures_are_shares_of_the_mean_and_of_its_size() -> None:
    assert SPEC.rotary_pairs == (2, 2, 2)
    mean, size = np.zeros((2, 3, 6), complex), np.ones((2, 3, 6))
    mean[0, 0] = [0.6j, 0.2, 0, 0, 0, 1]
    found = figures(statistics(mean + (mean == 0) * 1e-12, size), SPEC)
    assert found["one_way"][0, 0] == pytest.approx(1.8 / 6)
    assert found["one_way_in_time"][0, 0] == pytest.approx(0.8 / 2)
    assert found["fast_in_time"][0, 0] == pytest.approx(0.6 / 0.8), "only the first time pair is fast"


def test_heads_are_told_apart_within_their_layer() -> None:
    static = np.array([[True, False, False], [True, True, False]])
    assert told_apart(np.array([[3.0, 2, 1], [9, 8, 7]]), static) == 1
    assert told_apart(np.array([[1.0, 2, 3], [7, 8, 9]]), static) == 0
    assert told_apart(np.zeros((2, 3)), static) == 0.5
    assert told_apart(np.array([[2.0, 1, 3], [1, 3, 2]]), static) == 0.5
    assert told_apart(np.array([[5.0, 5, 5], [0, 0, 0]]), static) == 0.5, "layers do not count"
    assert np.isnan(told_apart(np.zeros((1, 3)), static[:1] & False))
    both = told_apart(np.array([[3.0, 2, 1], [9, 8, 7]]), np.stack([static, ~static]))
    assert both.tolist() == [1, 0], "several labellings at once"


def test_labels_that_follow_from_the_queries_are_found_and_others_are_not() -> None:
    spec = small_spec(layers=30, heads=12, head_dim=12)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(30, 12, 6)) + 1j * rng.normal(size=(30, 12, 6))
    found = statistics(mean, np.abs(mean) + 0.5)
    fast = figures(found, spec)["fast_in_time"]
    told = compare(found, spec, headmap_of(spec, [sorted(np.argsort(row)[6:].tolist()) for row in fast]))
    assert told["figures"]["fast_in_time"]["told_apart"] == 1
    assert told["figures"]["fast_in_time"]["by_chance"] == pytest.approx(1 / 2001)
    drawn = [sorted(rng.permutation(12)[:6].tolist()) for _ in range(30)]
    told = compare(found, spec, headmap_of(spec, drawn))
    assert all(one["by_chance"] > 0.01 for one in told["figures"].values())
    assert told["heads"] == {"static": 180, "dynamic": 180}


def test_equal_recordings_agree_and_opposite_ones_do_not() -> None:
    mean = np.exp(1j * np.arange(36)).reshape(2, 3, 6)
    one, other = statistics(mean, np.abs(mean)), statistics(-mean, np.abs(mean))
    assert agreement(one, one) == pytest.approx({"median": 1, "least": 1})
    assert agreement(one, other) == pytest.approx({"median": -1, "least": -1})


def test_files_that_are_no_statistics_of_the_model_are_refused(tmp_path: Path) -> None:
    path, shape = tmp_path / "s.safetensors", (2, 3, 6)
    whole = {
        "q_mean_real": np.full(shape, 0.3, np.float32),
        "q_mean_imag": np.full(shape, 0.4, np.float32),
        "q_abs_mean": np.full(shape, 0.5, np.float32),
        "token_count": np.full(2, 7.0),
    }
    save_file(whole, path)
    found = read_query_statistics(path, SPEC)
    assert found.tokens == 7
    np.testing.assert_allclose(np.abs(found.mean), found.size, rtol=1e-6)
    for changes, message in (
        ({"q_abs_mean": np.full(shape, 0.4, np.float32)}, "larger than the mean absolute value"),
        ({"q_mean_real": np.full(shape, np.nan, np.float32)}, "are no numbers"),
        (
            {"q_mean_imag": np.zeros((2, 3, 5), np.float32)},
            r"q_mean_imag is \(2, 3, 5\); expected \(2, 3, 6\)",
        ),
    ):
        save_file(whole | changes, path)
        with pytest.raises(InputError, match=message):
            read_query_statistics(path, SPEC)
    save_file({"q_abs_mean": whole["q_abs_mean"]}, path)
    with pytest.raises(InputError, match="has no tensor q_mean_real, q_mean_imag, token_count"):
        read_query_statistics(path, SPEC)


def test_longlive_s_own_queries_bear_its_released_map_out_in_part(data: Path) -> None:
    """The figures of docs/headmaps.md."""
    spec = load_spec("longlive")
    headmap = read_headmap(data / "headmaps" / "forcingkv_heads_longlive.json")
    names = ("calibration_stats_81f", "normal_q_stats_120f_peak49")
    files = [data / "statistics" / f"triattention_longlive_{name}.safetensors" for name in names]
    found = [read_query_statistics(file, spec) for file in files]
    assert [one.tokens for one in found] == [631_800, 936_000]
    shares = [np.abs(one.mean) / one.size for one in found]
    assert [round(float(share.mean()), 2) for share in shares] == [0.62, 0.65]
    told = [compare(one, spec, headmap)["figures"] for one in found]
    apart = {name: [round(one[name]["told_apart"], 2) for one in told] for name in told[0]}
    assert apart == EXPECTED
    assert all(one[name]["by_chance"] < 0.001 for one in told for name in one)
    alike = agreement(*found)
    assert (round(alike["median"], 2), round(alike["least"], 2)) == (0.96, 0.8)


EXPECTED = {"one_way": [0.76, 0.77], "one_way_in_time": [0.8, 0.81], "fast_in_time": [0.9, 0.9]}
