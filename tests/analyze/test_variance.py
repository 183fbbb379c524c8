"""Variance: planted sources, and an analysis of variance by least squares. Divergence: by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.analyze.scoring import Scoring
from forcingkv.analyze.storage import Recorded
from forcingkv.analyze.variance import Divergence, divergence, variance_split
from forcingkv.runtime.spec import Schedule
from tests.analyze.test_labels import grid, of_scores, recorded

Array = npt.NDArray[np.float64]

SHAPE = (3, 4, 2, 2, 3)
AXES = ("sample", "chunk", "step", "layer", "head")
SOURCES = {
    "layer": ("layer",),
    "head": ("layer", "head"),
    "sample": ("sample",),
    "step": ("step",),
    "chunk": ("chunk",),
    "head x sample": ("layer", "head", "sample"),
    "head x step": ("layer", "head", "step"),
    "head x chunk": ("layer", "head", "chunk"),
}
"""What each share belongs to; the rest depends on everything."""


def split(scores: Array) -> dict[str, float]:
    return variance_split(grid(np.repeat(scores[..., None], 3, -1)))


sizes = st.tuples(*(st.integers(1, 4) for _ in range(5)))


@given(sizes, st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-3, 1e-9]))
def test_shares_sum_to_one(shape: tuple[int, ...], seed: int, scale: float) -> None:
    shares = split(0.5 + scale * np.random.default_rng(seed).uniform(-0.5, 0.5, shape))
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0


@given(sizes, st.floats(0, 1))
def test_scores_that_are_all_alike_leave_only_the_rest(shape: tuple[int, ...], score: float) -> None:
    shares = split(np.full(shape, score))
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {*SOURCES, "rest"}
    assert shares["rest"] == 1


def planted(axes: tuple[str, ...]) -> Array:
    """Scores that vary along those axes only, and not on the mean along any one of them."""
    values = np.random.default_rng(0).uniform(-1, 1, SHAPE)
    for number, name in enumerate(AXES):
        mean = values.mean(number, keepdims=True)
        values = values - mean if name in axes else np.broadcast_to(mean, SHAPE)
    return 0.5 + values / np.abs(values).max() / 2


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_by_itself_has_the_whole_share(source: str) -> None:
    assert split(planted(SOURCES[source])) == {
        name: pytest.approx(float(name == source)) for name in (*SOURCES, "rest")
    }


def test_what_no_source_explains_is_the_rest() -> None:
    assert split(planted(AXES))["rest"] == pytest.approx(1)
    assert split(planted(("sample", "chunk")))["rest"] == pytest.approx(1)


def indicators(axes: tuple[str, ...]) -> Array:
    """A column for each combination of the levels of those axes: 1 for the observations that have it."""
    places = np.indices(SHAPE).reshape(len(AXES), -1)
    columns = np.ones((places.shape[1], 1))
    for name in axes:
        number = AXES.index(name)
        levels = np.eye(SHAPE[number])[places[number]]
        columns = (columns[:, :, None] * levels[:, None]).reshape(len(columns), -1)
    return columns


def test_shares_are_those_of_an_analysis_of_variance() -> None:
    """Least squares: what each source takes off the squared residuals when its columns are added."""
    scores = np.random.default_rng(1).beta(3, 2, SHAPE)
    scores[:, :, :, 1] += 0.3
    scores[1] -= 0.1
    shares = split(scores)
    columns = np.ones((scores.size, 1))
    total = left = float(((scores - scores.mean()) ** 2).sum())
    for name, axes in SOURCES.items():
        columns = np.hstack([columns, indicators(axes)])
        fitted = columns @ np.linalg.lstsq(columns, scores.ravel(), rcond=None)[0]
        remaining = float(((scores.ravel() - fitted) ** 2).sum())
        assert shares[name] == pytest.approx((left - remaining) / total), name
        left = remaining
    assert shares["rest"] == pytest.approx(left / total)


def test_features_other_than_the_score_do_not_matter() -> None:
    scores = np.random.default_rng(2).uniform(0.1, 0.9, SHAPE)
    other = variance_split(grid(of_scores(scores)))
    assert other == pytest.approx(split(scores))


# --- divergence -------------------------------------------------------------------------------------


def rows_of(features: Array, chunk: int = 4) -> list[dict[str, object]]:
    """Rows of a chunk, from attention (heads, samples, steps, key frames); one query frame, one layer."""
    return [
        {
            "sample": sample,
            "chunk": chunk,
            "step": step,
            "layer": 0,
            "head": head,
            "query_frame": 0,
            "key_frame": list(range(features.shape[3])),
            "mass": features[head, sample, step].tolist(),
        }
        for head, sample, step in np.ndindex(features.shape[:3])
    ]


def divergence_of(found: Recorded) -> Divergence:
    """Of all denoising passes after the split."""
    recording = found.recording
    return divergence(found, Scoring(0).of(recording.spec, recording.chunks, "denoise"))


def apart(features: Array, others: list[dict[str, object]] | None = None) -> tuple[float, float]:
    steps = {1: (1000.0,), 2: (1000.0, 500.0)}[features.shape[2]]
    rows = [*(others or []), *rows_of(features)]
    order = np.random.default_rng(0).permutation(len(rows))
    found = divergence_of(
        recorded([rows[i] for i in order], features.shape[1], heads=len(features), schedule=Schedule(steps))
    )
    return found.intra, found.inter


def test_heads_that_never_change_diverge_from_one_another_alone() -> None:
    features = np.broadcast_to(np.eye(5)[:3, None, None], (3, 2, 2, 5))
    assert apart(features) == (0, 1)


def test_heads_with_the_same_mean_diverge_within_themselves_alone() -> None:
    features = np.broadcast_to(np.eye(5)[None, :4].reshape(1, 2, 2, 5), (3, 2, 2, 5))
    assert apart(features) == (1, 0)


def test_heads_all_alike_do_not_diverge() -> None:
    assert apart(np.full((3, 2, 2, 5), 0.2)) == (0, 0)


def test_divergence_by_hand() -> None:
    """Two heads at a and b, each 1 unit to either side of its mean in half of its samples; the means lie
    4 units apart: within 1, between (2^2 + 2^2) / 2 = 4."""
    features = np.zeros((2, 2, 1, 2))
    features[0, :, 0, 0], features[1, :, 0, 0] = (-1, 1), (3, 5)
    assert apart(features) == pytest.approx((0.2, 0.8))


@given(st.integers(0, 2**32 - 1))
def test_the_parts_are_shares_of_the_distance_from_the_common_mean(seed: int) -> None:
    features = np.random.default_rng(seed).dirichlet(np.ones(5), (3, 2, 2))
    intra, inter = apart(features)
    total = ((features - features.mean((0, 1, 2))) ** 2).sum()
    within = ((features - features.mean((1, 2), keepdims=True)) ** 2).sum()
    assert (intra, inter) == pytest.approx((within / total, 1 - within / total))


def test_only_the_last_chunk_counts() -> None:
    features = np.random.default_rng(3).dirichlet(np.ones(5), (3, 2, 2))
    earlier = rows_of(np.random.default_rng(4).dirichlet(np.ones(4), (3, 2, 2)), chunk=3)
    assert apart(features, earlier) == apart(features)


def test_heads_may_see_different_numbers_of_frames() -> None:
    """As under policies that prune: a frame that is not seen has no mass."""
    features = np.random.default_rng(5).dirichlet(np.ones(5), (3, 2, 2))
    features[1, ..., 1:3] = 0
    rows = rows_of(features)
    for row in rows:
        if row["head"] == 1:
            for name in ("key_frame", "mass"):
                row[name] = [row[name][frame] for frame in (0, 3, 4)]  # type: ignore[index]
    short = divergence_of(recorded(rows, 2, heads=3))
    assert (short.intra, short.inter) == pytest.approx(apart(features))
