"""Chunks with different numbers of denoising passes: means over what there is, and nothing in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from forcingkv.analyze import Job, Labelling, analyze_statistics, record_samples
from forcingkv.analyze.labels import decide
from forcingkv.analyze.recording import Pass
from forcingkv.analyze.report import report_html
from forcingkv.analyze.scores import Observations, observe
from forcingkv.analyze.scoring import Scored, Scoring, told_numbers
from forcingkv.analyze.stability import judge_stability
from forcingkv.analyze.storage import read_statistics
from forcingkv.analyze.variance import variance_split
from forcingkv.commands.analyze import numbers_of
from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import random_weights
from forcingkv.runtime.schedule import CLEAN_PASS, Schedule
from forcingkv.runtime.text import encode_words
from tests.analyze.test_labels import of_scores
from tests.conftest import small_spec

pytestmark = pytest.mark.usefixtures("white_pictures")

Array = npt.NDArray[np.float64]

UNEVEN = Scored(
    (
        *(Pass(2, step, at) for step, at in enumerate((1000.0, 750.0, 500.0, 250.0))),
        Pass(2, CLEAN_PASS, 0.0),
        Pass(3, 0, 1000.0),
        Pass(3, 1, 500.0),
        Pass(3, CLEAN_PASS, 0.0),
        Pass(4, 0, 1000.0),
        Pass(4, CLEAN_PASS, 0.0),
    ),
    sink_frames=1,
    recent_frames=4,
)
"""A chunk of four steps, one of two, one of one, each with its clean pass."""


def observed(scores: Array) -> Observations:
    """From scores (samples, passes, layers, heads)."""
    return Observations(of_scores(scores), tuple(range(len(scores))), UNEVEN)


def test_a_step_is_known_by_its_timestep_not_by_its_number() -> None:
    """Step 1 of the chunk of four is at 750, of the chunk of two at 500."""
    assert UNEVEN.parts == {
        "steps": {1000.0: [0, 5, 8], 750.0: [1], 500.0: [2, 6], 250.0: [3]},
        "clean pass": {0.0: [4, 7, 9]},
        "chunks": {2: [0, 1, 2, 3, 4], 3: [5, 6, 7], 4: [8, 9]},
    }
    assert UNEVEN.timesteps == (1000.0, 750.0, 500.0, 250.0)
    assert (UNEVEN.kind, UNEVEN.chunks) == ("all", (2, 3, 4))


def test_a_denoising_pass_at_0_is_no_clean_pass() -> None:
    """As Krea's last step."""
    krea = Scored((Pass(2, 0, 1000.0), Pass(2, 1, 0.0), Pass(2, CLEAN_PASS, 0.0)), 1, 4)
    assert krea.parts["steps"] == {1000.0: [0], 0.0: [1]}
    assert krea.parts["clean pass"] == {0.0: [2]}


def test_means_are_over_the_passes_that_there_are() -> None:
    scores = np.random.default_rng(0).uniform(0.1, 0.9, (3, 10, 2, 2))
    found = observed(scores)
    np.testing.assert_allclose(found.mean()[..., 0], scores.mean((0, 1)))
    np.testing.assert_allclose(found.parts("chunks")[4][..., 0], (scores[:, 8] + scores[:, 9]) / 2)
    np.testing.assert_allclose(found.parts("steps")[500.0][..., 0], (scores[:, 2] + scores[:, 6]) / 2)
    np.testing.assert_allclose(found.parts("steps")[750.0][..., 0], scores[:, 1])
    assert np.isfinite(found.values).all()


def test_shares_are_over_steps_chunks_and_observations_that_there_are() -> None:
    """A head that is dynamic at timestep 500 alone: in 2 of 10 passes, and in 1 of 4 steps."""
    scores = np.full((4, 10, 1, 2), 0.9)
    scores[:, [2, 6], 0, 1] = 0.2
    found = judge_stability(observed(scores), decide(observed(scores), "threshold", alpha=0.5))
    assert found.static.tolist() == [[True, True]]
    assert found.kept_parts["steps"].tolist() == [[1.0, 0.75]]
    assert found.kept_parts["clean pass"].tolist() == [[1.0, 1.0]]
    assert found.kept_parts["chunks"].tolist() == [[1.0, 1.0]]
    assert found.kept[0] == pytest.approx([1.0, 0.8])
    assert {name: heads[0, 1] for name, heads in found.reasons.items() if heads[0, 1]} == {"steps": True}


def test_variance_of_uneven_chunks_is_that_of_least_squares() -> None:
    """Each source has what it takes off the squared residuals, those before it being fitted already."""
    scores = np.random.default_rng(1).uniform(0.25, 0.7, (3, 10, 2, 2))
    scores[:, [4, 7, 9]] += 0.2
    scores[:, [0, 5, 8], :, 1] -= 0.2
    samples, passes, layers, heads = (axis.ravel() for axis in np.indices(scores.shape))
    of_pass = {
        "clean pass": np.array([made.clean for made in UNEVEN.passes]),
        "step": np.array([-1.0 if made.clean else made.timestep for made in UNEVEN.passes]),
        "chunk": np.array([made.chunk for made in UNEVEN.passes]),
    }
    levels = {name: values[passes] for name, values in of_pass.items()}
    levels |= {"layer": layers, "head": layers * 2 + heads, "sample": samples}
    order = ["layer", "head", "sample", *of_pass]
    shares = variance_split(observed(scores))
    sources = [*order, *(f"head x {name}" for name in order[2:])]
    assert set(shares) == {*sources, "rest"}

    def indicators(*names: str) -> Array:
        columns = np.ones((scores.size, 1))
        for name in names:
            each = levels[name][:, None] == np.unique(levels[name])
            columns = (columns[:, :, None] * each[:, None]).reshape(scores.size, -1)
        return columns

    columns = np.ones((scores.size, 1))
    total = left = float(((scores - scores.mean()) ** 2).sum())
    for name in sources:
        columns = np.hstack([columns, indicators(*name.split(" x "))])
        fitted = columns @ np.linalg.lstsq(columns, scores.ravel(), rcond=None)[0]
        remaining = float(((scores.ravel() - fitted) ** 2).sum())
        assert shares[name] == pytest.approx((left - remaining) / total), name
        left = remaining
    assert shares["rest"] == pytest.approx(left / total)


@pytest.mark.parametrize(
    ("frames", "recent", "chunks"),
    [(1, 2, (3, 4, 5, 6)), (3, 4, (2, 3, 4, 5, 6)), (4, 5, (2, 3, 4, 5, 6)), (8, 9, (2, 3, 4, 5, 6))],
)
def test_what_is_recent_is_the_chunk_and_the_frame_before_it(
    frames: int, recent: int, chunks: tuple[int, ...]
) -> None:
    """4 frames for chunks of 3. Of single frames chunk 2 sees the sink, the transition frame and itself: no
    history, so it cannot tell heads apart, and is not scored."""
    spec = small_spec(frames_per_chunk=frames, attended_frames=7 * frames)
    scored = Scoring().of(spec, 7, "denoise")
    assert (scored.recent_frames, scored.chunks) == (recent, chunks)
    with pytest.raises(InputError, match=f"expected at least {frames + 1}: every head sees its whole chunk"):
        Scoring(recent_frames=frames).of(spec, 7, "denoise")


def test_the_literal_last_four_frames_of_a_frame_wise_model() -> None:
    spec = small_spec(frames_per_chunk=1, attended_frames=9)
    scored = Scoring(sink_frames=3, recent_frames=4).of(spec, 9, "denoise")
    assert (scored.recent_frames, scored.chunks) == (4, (7, 8))


def test_chunks_as_people_write_them() -> None:
    given = ["4", "2-6", "2,4,6", " 2 - 3 , 5", "6,2-3,2"]
    assert [numbers_of(text) for text in given] == [(4,), (2, 3, 4, 5, 6), (2, 4, 6), (2, 3, 5), (2, 3, 6)]
    for text in ("", "4,", "6-2", "-1", "a", "2-", "1.5", "2--3", "4 5", "1234567"):
        with pytest.raises(InputError, match=r"--score-chunks is .*; expected chunks, such as 4"):
            numbers_of(text)


def test_numbers_are_told_as_runs() -> None:
    told = [told_numbers(numbers) for numbers in ((4,), (2, 3, 4), (2, 4, 5, 6, 9), (-1, 0, 1), ())]
    assert told == ["4", "2 to 4", "2, 4 to 6, 9", "-1 to 1", ""]


def test_a_schedule_by_chunk_is_recorded_and_scored_as_it_is(tmp_path: Path) -> None:
    """Three steps in chunk 2, two in chunk 3: step 1 is at 750 in one and at 500 in the other."""
    steps = Schedule((1000.0, 500.0), by_chunk=((1000.0,), (1000.0, 250.0), (1000.0, 750.0, 500.0)))
    spec = small_spec(layers=1, schedule=steps)
    job = Job(spec, random_weights(spec), [encode_words(spec, "a b")], chunks=4, passes="all", threads=1)
    record_samples(job, tmp_path, samples=2)
    recorded = read_statistics(tmp_path)
    rows = recorded.rows.collect()
    made = rows.select("chunk", "step").unique().sort("chunk", "step").rows()
    assert made == [
        *((0, step) for step in (-1, 0)),
        *((1, step) for step in (-1, 0, 1)),
        *((2, step) for step in (-1, 0, 1, 2)),
        *((3, step) for step in (-1, 0, 1)),
    ]
    observed = observe(recorded, Scoring())
    assert observed.scored.passes == (
        Pass(2, 0, 1000.0),
        Pass(2, 1, 750.0),
        Pass(2, 2, 500.0),
        Pass(2, -1, 0.0),
        Pass(3, 0, 1000.0),
        Pass(3, 1, 500.0),
        Pass(3, -1, 0.0),
    )
    for place, one in enumerate(observed.scored.passes):
        of = rows.filter(sample=1, chunk=one.chunk, step=one.step, layer=0, head=2).explode(
            "key_frame", "mass"
        )
        recent = of.filter(of["key_frame"] >= 3 * one.chunk - 1)["mass"].sum()
        kept = of.filter(of["key_frame"] >= 1)["mass"].sum()
        assert observed.scores[1, place, 0, 2] == pytest.approx(recent / kept, abs=1e-6)
    analysis = analyze_statistics(tmp_path, Labelling("threshold"))
    measured = analysis.headmap.statistics
    assert measured is not None
    assert (measured.chunks, measured.steps) == (2, 3)
    assert sum(analysis.variance.values()) == pytest.approx(1)
    assert "2 to 3 denoising passes a chunk" in report_html(analysis, ())
    with pytest.raises(InputError, match=r"sample 0 has \d+ scored rows"):
        observe(
            replace(recorded, rows=recorded.rows.filter((pl.col("chunk") != 2) | (pl.col("step") != 2))),
            Scoring(),
        )
