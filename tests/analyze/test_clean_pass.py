"""Statistics of the clean pass: recorded beside the denoising passes, never mixed with them unsaid."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from forcingkv.analyze import Analysis, Job, Labelling, analyze_statistics, record_samples
from forcingkv.analyze.recording import Passes, Recording
from forcingkv.analyze.report.attention import shown_passes
from forcingkv.analyze.scores import observe
from forcingkv.analyze.scoring import Scored, Scoring
from forcingkv.analyze.space import recording_memory
from forcingkv.analyze.storage import METADATA_KEY, read_statistics
from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import random_weights
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import CLEAN_PASS
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, small_spec

pytestmark = pytest.mark.usefixtures("white_pictures")

SPEC = small_spec(layers=2)
JOB = Job(SPEC, random_weights(SPEC), [encode_words(SPEC, "a b")], seed=5, chunks=4, threads=1)
TIMESTEPS = SPEC.schedule.later.timesteps
STEPS = len(TIMESTEPS)
KINDS: tuple[Passes, ...] = ("all", "denoise", "clean")


@pytest.fixture(scope="module")
def places(white_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind of passes, the same otherwise."""
    folder = tmp_path_factory.mktemp("passes")
    for passes in KINDS:
        record_samples(replace(JOB, passes=passes), folder / passes / "stats", samples=2)
    return {passes: folder / passes / "stats" for passes in KINDS}


@pytest.fixture(scope="module")
def every(places: dict[str, Path]) -> Analysis:
    """All passes, judged by one threshold."""
    return analyze_statistics(places["all"], Labelling("threshold", alpha=0.6))


def rows_of(place: Path) -> pl.DataFrame:
    return read_statistics(place).rows.collect()


def test_each_kind_of_passes_is_a_part_of_all(places: dict[str, Path]) -> None:
    rows = rows_of(places["all"])
    clean = pl.col("step") == CLEAN_PASS
    assert set(rows["step"]) == {-1, *range(STEPS)}
    assert len(rows.filter(clean)) * STEPS == len(rows.filter(~clean)) == len(rows_of(places["denoise"]))
    assert rows.filter(~clean).equals(rows_of(places["denoise"]))
    assert rows.filter(clean).equals(rows_of(places["clean"]))
    assert rows["mass"].list.sum().is_between(1 - 1e-5, 1 + 1e-5).all()


def test_the_clean_pass_sees_the_history_that_the_steps_saw(places: dict[str, Path]) -> None:
    rows = rows_of(places["all"])
    key = ("sample", "chunk", "layer", "head", "query_frame")
    seen = rows.group_by(key).agg(pl.col("key_frame").n_unique(), pl.col("role").n_unique())
    assert set(seen["key_frame"]) == set(seen["role"]) == {1}
    assert set(rows.filter(chunk=3)["key_frame"].explode()) == set(range(12))
    assert (
        rows.select("entropy", "mass")
        .filter(rows["step"] == 0)
        .equals(rows.select("entropy", "mass").filter(rows["step"] == CLEAN_PASS))
        is False
    )


def test_query_rows_of_a_clean_pass_are_drawn_too(tmp_path: Path) -> None:
    spec = small_spec(layers=1, width=24, height=12)
    job = replace(JOB, spec=spec, weights=random_weights(spec), rows=9, chunks=3, passes="all")
    record_samples(job, tmp_path / "a", samples=1)
    record_samples(job, tmp_path / "b", samples=1)
    rows = rows_of(tmp_path / "a")
    assert rows.equals(rows_of(tmp_path / "b"))
    assert (rows.filter(step=CLEAN_PASS)["mass_error"].explode() > 0).mean() > 0.99
    record_samples(replace(job, passes="denoise"), tmp_path / "c", samples=1)
    assert rows.filter(pl.col("step") >= 0).equals(rows_of(tmp_path / "c")), "the others are drawn as ever"


@pytest.mark.parametrize("passes", KINDS)
def test_scores_of_a_part_are_those_of_its_own_recording(passes: Passes, places: dict[str, Path]) -> None:
    part = observe(read_statistics(places["all"]), Scoring(passes=passes))
    alone = observe(read_statistics(places[passes]), Scoring())
    np.testing.assert_array_equal(part.values, alone.values)
    assert part.scored == alone.scored
    assert part.scored.kind == passes


def by_hand(rows: pl.DataFrame, recent: int, sink: int) -> float:
    """Mass on the newest frames over all but the sink's, of the rows of a pass and head."""
    flat = rows.explode("key_frame", "mass")
    newest = 3 * rows["chunk"][0] + 3
    part = flat.filter(pl.col("key_frame") >= newest - recent)["mass"].sum()
    return float(part / flat.filter(pl.col("key_frame") >= sink)["mass"].sum())


@pytest.mark.parametrize(("sink", "recent"), [(1, None), (3, None), (3, 5), (0, 6)])
def test_scores_by_hand(sink: int, recent: int | None, places: dict[str, Path]) -> None:
    """The released maps' descriptions leave out a sink of 3 frames, the released script 1."""
    rows = rows_of(places["all"])
    found = observe(read_statistics(places["all"]), Scoring(sink, recent, chunks=(3,)))
    assert [(made.chunk, made.step) for made in found.scored.passes] == [(3, 0), (3, 1), (3, -1)]
    assert [made.timestep for made in found.scored.passes] == [*TIMESTEPS, 0.0]
    for sample, place, layer, head in np.ndindex(*found.scores.shape):
        made = found.scored.passes[place]
        of = rows.filter(sample=sample, chunk=made.chunk, step=made.step, layer=layer, head=head)
        assert found.scores[sample, place, layer, head] == pytest.approx(
            by_hand(of, recent or 4, sink), abs=1e-6
        )


def test_a_map_says_which_passes_chunks_and_frames_it_comes_from(places: dict[str, Path]) -> None:
    asked = Labelling("threshold", sink_frames=3, score_chunks=(3,), passes="clean")
    headmap = analyze_statistics(places["all"], asked).headmap
    assert (headmap.rule.sink_frames, headmap.rule.recent_frames, headmap.rule.alpha) == (3, 4, 0.8)
    measured = headmap.statistics
    assert measured is not None
    assert (measured.passes, measured.scored_chunks) == ("clean", (3,))
    assert (measured.chunks, measured.steps) == (1, 0)
    whole = analyze_statistics(places["all"], Labelling("threshold")).headmap.statistics
    assert whole is not None
    assert (whole.passes, whole.scored_chunks, whole.steps) == ("all", (2, 3), STEPS)


@pytest.mark.parametrize("rule", ["quota", "kmeans", "mixture", "auto"])
def test_every_rule_records_the_frames_that_its_scores_count(rule: str, places: dict[str, Path]) -> None:
    found = analyze_statistics(places["all"], Labelling(rule, sink_frames=2, recent_frames=5)).headmap.rule
    assert (found.sink_frames, found.recent_frames) == (2, 5)


# --- the clean pass is no step ------------------------------------------------------------------------


def test_steps_are_denoising_steps_and_the_clean_pass_is_asked_by_itself(every: Analysis) -> None:
    parts, scores = every.observations.scored.parts, every.observations.scores
    assert list(parts) == ["steps", "clean pass", "chunks"]
    assert parts == {
        "steps": {TIMESTEPS[0]: [0, 3], TIMESTEPS[1]: [1, 4]},
        "clean pass": {0.0: [2, 5]},
        "chunks": {2: [0, 1, 2], 3: [3, 4, 5]},
    }
    static = scores.mean((0, 1)) >= 0.6
    np.testing.assert_array_equal(every.stability.static, static)
    same = (scores[:, [2, 5]].mean((0, 1)) >= 0.6) == static
    np.testing.assert_array_equal(every.stability.kept_parts["clean pass"], same)
    steps = [(scores[:, at].mean((0, 1)) >= 0.6) == static for at in ([0, 3], [1, 4])]
    np.testing.assert_array_equal(every.stability.kept_parts["steps"], np.mean(steps, 0))


@pytest.mark.parametrize(
    ("passes", "parts", "sources"),
    [
        ("all", ["steps", "clean pass", "chunks"], ["step", "clean pass", "chunk"]),
        ("denoise", ["steps", "chunks"], ["step", "chunk"]),
        ("clean", ["chunks"], ["chunk"]),
    ],
)
def test_what_is_judged_is_what_there_is(
    passes: Passes, parts: list[str], sources: list[str], places: dict[str, Path]
) -> None:
    analysis = analyze_statistics(places["all"], Labelling("threshold", passes=passes))
    assert list(analysis.stability.kept_parts) == ["samples", *parts]
    assert list(analysis.stability.reasons) == ["interval", "samples", *parts]
    names = ["sample", *sources]
    assert list(analysis.variance) == ["layer", "head", *names, *(f"head x {name}" for name in names), "rest"]
    assert sum(analysis.variance.values()) == pytest.approx(1)


def test_how_the_clean_pass_differs_is_a_source_of_its_own(every: Analysis) -> None:
    """The contrast of the clean passes with the denoising passes; the step's is among these alone."""
    scores = every.observations.scores
    apart = scores - scores.mean()
    of_pass = apart.mean((0, 2, 3))
    clean = of_pass[[2, 5]].mean() ** 2 * 2 + of_pass[[0, 1, 3, 4]].mean() ** 2 * 4
    noisy, less = of_pass[[0, 3]].mean(), of_pass[[1, 4]].mean()
    step = 4 * ((noisy - less) / 2) ** 2
    total = (apart**2).sum() / (scores.size / len(of_pass))
    assert every.variance["clean pass"] == pytest.approx(clean / total)
    assert every.variance["step"] == pytest.approx(step / total)


def test_the_report_says_passes_and_chunks(
    places: dict[str, Path], tmp_path: Path, run: Callable[..., Ran]
) -> None:
    ran = run(
        "analyze", "report", places["all"].parent, "--score-chunks", 3, "--sink-frames", 3, "--out", tmp_path
    )
    assert ran.code == 0, ran.err
    page = (tmp_path / "report.html").read_text()
    for said in (
        "denoising passes and clean passes",
        "4 of 3 latent frames, scored: chunk 3",
        "clean pass 0",
        "4: the current chunk and the transition frame",
        "chunk 3, clean pass at timestep 0:",
        "and the clean pass",
    ):
        assert said in page, said
    lines = " ".join(ran.out.split())
    assert "2 samples x 1 chunk x 2 steps and the clean pass" in lines
    assert "chunk 3; the newest 4 key frames over all but the first 3" in lines
    of_one = run("analyze", "report", places["all"].parent, "--passes", "clean", "--out", tmp_path, "--json")
    found = json.loads(of_one.out)
    assert found["headmap"]["statistics"]["passes"] == "clean"
    assert "kept_steps" not in found["stability"]["heads"][0]
    page = (tmp_path / "report.html").read_text()
    assert "clean passes alone; recorded: denoising passes and clean passes" in page
    assert "By denoising step" not in page


def test_pictures_show_the_ends_of_denoising_and_the_clean_pass(every: Analysis) -> None:
    scored = every.observations.scored
    assert [(made.chunk, made.step) for made in shown_passes(scored, 3)] == [(3, 0), (3, 1), (3, -1)]
    clean = Scored(tuple(made for made in scored.passes if made.clean), 1, 4)
    assert [made.step for made in shown_passes(clean, 2)] == [-1]
    one = Scored(scored.passes[:1], 1, 4)
    assert [made.step for made in shown_passes(one, 2)] == [0]


# --- what goes on, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize(("there", "asked"), [("all", "denoise"), ("denoise", "all"), ("clean", "all")])
def test_a_run_does_not_go_on_with_other_passes(there: str, asked: Passes, places: dict[str, Path]) -> None:
    message = f"is of another run: passes differs; expected passes '{asked}', not '{there}'.*--restart"
    with pytest.raises(InputError, match=message):
        record_samples(replace(JOB, passes=asked), places[there], samples=3)
    assert len(list(places[there].glob("*.parquet"))) == 2


def test_statistics_of_before_are_of_denoising_passes(places: dict[str, Path]) -> None:
    """Files do not name the denoising passes, as those of earlier versions did not: they open, and go on."""
    file = places["denoise"] / "sample-0000.parquet"
    text = pl.read_parquet_metadata(file)[METADATA_KEY]
    assert "passes" not in json.loads(text)
    assert Recording.from_text(text, "x").recorded == "denoise"
    assert record_samples(JOB, places["denoise"], samples=2) == []


@pytest.mark.parametrize(
    ("there", "scoring", "message"),
    [
        ("denoise", Scoring(passes="clean"), "asks for clean passes alone, and denoising passes alone were"),
        ("denoise", Scoring(passes="all"), "asks for denoising passes and clean passes.*--passes all"),
        ("clean", Scoring(passes="denoise"), "asks for denoising passes alone, and clean passes alone were"),
        ("all", Scoring(chunks=(4,)), r"chunk 4 is asked for.* 4 chunks .*2 to 3 .*--chunks 5"),
        ("all", Scoring(chunks=(3, 9)), "chunk 9 is asked for.*--chunks 10"),
        ("all", Scoring(chunks=(-1,)), "chunk -1 is asked for"),
        (
            "all",
            Scoring(chunks=(1, 2)),
            "chunk 1 lies before the split: small treats all heads alike up to chunk 1",
        ),
        ("all", Scoring(chunks=()), "no chunk is asked for"),
        ("all", Scoring(sink_frames=5, chunks=(2,)), "chunk 2 has no history between the 5 frames"),
        ("all", Scoring(sink_frames=8), "8 frames are left out, which leaves no history"),
        ("all", Scoring(sink_frames=7, recent_frames=5), "7 frames are left out beside the newest 5, which"),
        ("all", Scoring(sink_frames=-1), "-1 frames are left out"),
        ("all", Scoring(recent_frames=3), "newest 3 key frames .* a chunk has 3.*at least 4"),
        ("all", Scoring(recent_frames=12), "newest 12 .* no history to any chunk; expected 4 to 11"),
        ("all", Scoring(0, recent_frames=11, chunks=(2,)), "chunk 2 has no history .*some of the chunks 3 "),
    ],
)
def test_what_cannot_be_scored_is_refused(
    there: str, scoring: Scoring, message: str, places: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=message):
        observe(read_statistics(places[there]), scoring)


def test_a_policy_without_history_is_no_evidence(tmp_path: Path) -> None:
    policy = tmp_path / "near.toml"
    roles = '[{ role = "sink", frames = 1 }, { role = "recent", frames = 1 }]'
    policy.write_text(f'name = "near"\nsummary = "nothing old"\n[groups]\nall = {roles}\n', encoding="utf-8")
    record_samples(replace(JOB, policy=str(policy), chunks=3), tmp_path / "stats", samples=1)
    with pytest.raises(
        InputError, match="no head has a key frame between the first 1 and the newest 4, in the chunks 2"
    ):
        observe(read_statistics(tmp_path / "stats"), Scoring())


def test_rows_of_a_pass_that_was_not_recorded_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    for name in ("sample-0000.parquet", "sample-0001.parquet"):
        metadata = pl.read_parquet_metadata(places["denoise"] / name)
        rows = pl.read_parquet(places["denoise"] / name)
        moved = rows.with_columns(step=pl.when(pl.col("step") == 1).then(-1).otherwise("step").cast(pl.Int32))
        moved.write_parquet(tmp_path / name, metadata={METADATA_KEY: metadata[METADATA_KEY]})
    with pytest.raises(InputError, match="has a row of the step -1; expected 0 to 1"):
        observe(read_statistics(tmp_path), Scoring())


def test_a_clean_pass_more_is_counted_in_memory() -> None:
    plan = build_plan(SPEC, SPEC.geometry(), load_policy("full"))
    parts: dict[str, npt.NDArray[np.float64] | float] = {
        passes: recording_memory(plan, "float32", 4, passes)["statistics"] for passes in KINDS
    }
    assert parts["all"] == parts["denoise"] + parts["clean"] == parts["clean"] * (STEPS + 1)


def test_nothing_is_recorded_where_nothing_can_be_scored(tmp_path: Path, run: Callable[..., Ran]) -> None:
    (tmp_path / "spec.toml").write_text('base = "demo"\nname = "tiny"\nlayers = 1\n')
    words = ["analyze", "heads", "--model", tmp_path / "spec.toml", "--random-weights", "--chunks", 3]
    for options, message in (
        (["--score-chunks", "4"], "chunk 4 is asked for, and videos of 3 chunks are recorded"),
        (["--score-chunks", "1"], "chunk 1 lies before the split"),
        (["--score-chunks", "4-2"], "--score-chunks is '4-2'; expected chunks, such as 4, 2-6 or 2,4,6"),
        (["--passes", "both"], "there is no passes 'both'; expected one of all, denoise, clean"),
        (["--recent-frames", "3"], "the newest 3 key frames count as recent, and a chunk has 3"),
    ):
        ran = run(*words, "--out", tmp_path / "out", *options)
        assert ran.code == 2, ran.out
        assert message in " ".join(ran.err.replace("│", " ").split())
        assert not (tmp_path / "out").exists()
