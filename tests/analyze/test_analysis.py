"""A run: recorded whole, resumed, extended, stored anywhere, and refused where it does not fit."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from forcingkv.analyze import Job, Labelling, analyze_heads, analyze_statistics, record_samples
from forcingkv.analyze.recording import METADATA_KEY, Recording
from forcingkv.analyze.scores import observe
from forcingkv.analyze.scoring import Scoring
from forcingkv.analyze.storage import Storage, read_statistics
from forcingkv.headmaps import HeadMap, InputError
from forcingkv.models.checkpoint import Weights, random_weights
from forcingkv.runtime.text import encode_words
from tests.conftest import headmap_of, mixed_map, small_spec

pytestmark = pytest.mark.usefixtures("white_pictures")

SPEC = small_spec()
TEXTS = [encode_words(SPEC, prompt) for prompt in ("a b", "c d")]
JOB = Job(SPEC, random_weights(SPEC), TEXTS, seed=5, chunks=4)
EVERY = Scoring().of(SPEC, 4, "denoise")
FILES = ("headmap.json", "report.html", "stability.json")


@pytest.fixture(scope="module")
def recorded(white_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples, analyzed."""
    out = tmp_path_factory.mktemp("analysis") / "heads"
    analyze_heads(JOB, out, samples=3, command=["x"])
    return out


@pytest.fixture
def stats(recorded: Path, tmp_path: Path) -> Path:
    """A copy of its statistics, to be spoilt."""
    shutil.copytree(recorded / "stats", tmp_path / "stats")
    return tmp_path / "stats"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_run_leaves_statistics_map_stability_and_report(recorded: Path) -> None:
    assert sorted(path.name for path in recorded.iterdir()) == [*FILES, "stats"]
    assert [path.name for path in sorted((recorded / "stats").iterdir())] == [
        *(f"sample-000{sample}.parquet" for sample in range(3)),
        "versions.json",
    ]
    rows = read_statistics(recorded / "stats").rows.collect()
    assert len(rows) == 3 * 4 * 2 * SPEC.layers * SPEC.heads * 3
    totals = rows["mass"].list.sum()
    assert totals.is_between(1 - 1e-5, 1 + 1e-5).all()
    assert sorted(rows.filter(chunk=2)["key_frame"].explode().unique()) == list(range(9))


def test_a_file_says_what_it_was_measured_on(recorded: Path) -> None:
    found = Storage(recorded / "stats").recording(1)
    assert found == JOB.recording.of(1, TEXTS[1])
    assert (found.spec, found.seed, found.chunks, found.sample) == (SPEC, 5, 4, 1)


def test_scores_follow_the_definition(recorded: Path) -> None:
    """Mass on the last 4 key frames over total mass less sink mass, per observation, by the rows."""
    statistics = read_statistics(recorded / "stats")
    rows = statistics.rows.collect()
    for sink_frames in (0, 1, 3):
        observed = observe(statistics, Scoring(sink_frames))
        generator = np.random.default_rng(0)
        for _ in range(20):
            at = tuple(int(generator.integers(n)) for n in observed.scores.shape)
            sample, place, layer, head = at
            chunk, step, _ = observed.scored.passes[place]
            seen = rows.filter(sample=sample, chunk=chunk, step=step, layer=layer, head=head)
            flat = seen.explode("key_frame", "mass")
            recent = flat.filter(pl.col("key_frame") > 3 * chunk + 2 - 4)["mass"].sum()
            rest = flat["mass"].sum() - flat.filter(pl.col("key_frame") < sink_frames)["mass"].sum()
            assert abs(observed.scores[at] - recent / rest) < 1e-6


def test_the_same_run_gives_the_same_bytes(recorded: Path, tmp_path: Path) -> None:
    analyze_heads(JOB, tmp_path / "b", samples=3, command=["x"])
    assert contents(tmp_path / "b" / "stats") == contents(recorded / "stats")
    for name in FILES:
        assert (tmp_path / "b" / name).read_bytes() == (recorded / name).read_bytes()


def test_another_seed_gives_other_statistics(recorded: Path, tmp_path: Path) -> None:
    record_samples(replace(JOB, seed=6), tmp_path, samples=1)
    ours, theirs = (read_statistics(place).rows.collect() for place in (recorded / "stats", tmp_path))
    assert not ours.filter(sample=0)["mass"].equals(theirs["mass"])


def test_an_interrupted_run_goes_on_and_counts_nothing_twice(recorded: Path, tmp_path: Path) -> None:
    def interrupt(done: int, chunk: int) -> None:
        if (done, chunk) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_samples(JOB, tmp_path, samples=3, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample-0000.parquet", "versions.json"]
    told: list[tuple[int, int]] = []
    assert record_samples(JOB, tmp_path, samples=3, progress=lambda *at: told.append(at)) == [1, 2]
    assert told[0] == (1, 0)
    assert contents(tmp_path) == contents(recorded / "stats")
    assert record_samples(JOB, tmp_path, samples=3) == []


def test_samples_can_be_added_but_not_taken_away(stats: Path) -> None:
    assert record_samples(JOB, stats, samples=4) == [3]
    assert analyze_statistics(stats).headmap.statistics == EVERY.measured(JOB.recording, 4)
    with pytest.raises(InputError, match=r"holds sample 3, and 2 are asked for.*--samples 4"):
        record_samples(JOB, stats, samples=2)
    assert record_samples(JOB, stats, samples=2, restart=True) == [0, 1]
    assert len(list(stats.glob("*.parquet"))) == 2


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that those versions of packages are installed."""
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))


def test_samples_of_other_versions_are_not_added(stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(stats)
    assert json.loads(before["versions.json"]).keys() == {"forcingkv", "torch", "numpy"}
    installed(monkeypatch, torch="99.1")
    message = r"stats was recorded by forcingkv \S+, torch \S+, numpy \S+; expected .*torch 99\.1.*--restart"
    with pytest.raises(InputError, match=message):
        record_samples(JOB, stats, samples=4)
    assert contents(stats) == before
    assert record_samples(JOB, stats, samples=3) == []  # nothing to add
    assert analyze_statistics(stats).headmap
    assert record_samples(JOB, stats, samples=1, restart=True) == [0]
    assert json.loads((stats / "versions.json").read_text())["torch"] == "99.1"
    assert record_samples(JOB, stats, samples=2) == [1]


def test_samples_are_added_to_statistics_that_do_not_say_their_versions(
    stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stats / "versions.json").unlink()
    installed(monkeypatch, numpy="99.1")
    assert record_samples(JOB, stats, samples=4) == [3]
    assert not (stats / "versions.json").exists()


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("[]", r"was recorded by \[\]")])
def test_versions_that_make_no_sense_are_refused(content: str, message: str, stats: Path) -> None:
    (stats / "versions.json").write_text(content)
    with pytest.raises(InputError, match=rf"{message}.*--restart"):
        record_samples(JOB, stats, samples=4)


def test_statistics_can_lie_anywhere_that_fsspec_reaches(recorded: Path, tmp_path: Path) -> None:
    place = "memory://runs/one"
    analysis = analyze_heads(JOB, tmp_path / "out", samples=3, stats=place, command=["x"])
    assert analysis.headmap == HeadMap.read(recorded / "headmap.json")
    assert Storage(place).samples() == [0, 1, 2]
    assert record_samples(JOB, place, samples=3) == []
    assert not (tmp_path / "out" / "stats").exists()
    with pytest.raises(InputError, match=r"nosuch://x.*cannot be reached"):
        Storage("nosuch://x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "seed differs; expected seed 6, not 5"),
        ({"chunks": 5}, "chunks differs; expected chunks 5, not 4"),
        ({"rows": 9}, "rows differs; expected rows 9, not None"),
        ({"policy": "window"}, "policy differs; expected policy 'window', not 'full'"),
        ({"texts": TEXTS[::-1]}, "text differs"),
        (
            {"spec": small_spec(name="other"), "weights": random_weights(small_spec(name="other"))},
            r"model, spec differ \(the model small\)",
        ),
    ],
)
def test_recordings_of_another_run_are_not_mixed_in(
    recorded: Path, changes: dict[str, object], message: str
) -> None:
    before = contents(recorded / "stats")
    with pytest.raises(InputError, match=message):
        record_samples(replace(JOB, **changes), recorded / "stats", samples=4)  # type: ignore[arg-type]
    assert contents(recorded / "stats") == before


def rewritten(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], **metadata: object) -> None:
    recording = Recording.from_text(pl.read_parquet_metadata(path)[METADATA_KEY], str(path))
    text = replace(recording, **metadata).to_text()  # type: ignore[arg-type]
    change(pl.read_parquet(path)).write_parquet(path, metadata={METADATA_KEY: text})


def not_a_number(rows: pl.DataFrame) -> pl.DataFrame:
    broken = pl.lit([math.nan] * 9, pl.List(pl.Float32))
    at = (pl.col("chunk") == 2) & (pl.col("layer") == 1) & (pl.col("head") == 2)
    return rows.with_columns(mass=pl.when(at).then(broken).otherwise("mass"))


def spoil(stats: Path, how: str) -> None:
    one = stats / "sample-0001.parquet"
    content = one.read_bytes()
    if how == "truncated":
        one.write_bytes(content[: len(content) // 2])
    elif how == "damaged":
        one.write_bytes(content[:200] + bytes(len(content) - 3000) + content[-2800:])
    elif how == "empty":
        one.write_bytes(b"")
    elif how == "unknown":
        pl.read_parquet(one).write_parquet(one)
    elif how == "version":
        text = Storage(stats).recording(1).to_text().replace("statistics/1", "statistics/9")
        pl.read_parquet(one).write_parquet(one, metadata={METADATA_KEY: text})
    elif how == "model":
        rewritten(one, lambda rows: rows, model=replace(JOB.recording.model, name="other"))
    elif how == "columns":
        rewritten(one, lambda rows: rows.drop("entropy"))
    elif how == "nan":
        rewritten(one, not_a_number)
    elif how == "short":
        rewritten(one, lambda rows: rows.head(-1))
    elif how == "doubled":
        rewritten(one, lambda rows: pl.concat([rows.head(-1), rows.tail(2).head(1)]))
    elif how == "renamed":
        shutil.copy(stats / "sample-0002.parquet", one)
    else:
        shutil.rmtree(stats)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"sample-0001.parquet cannot be read .*expected a whole Parquet file"),
        ("damaged", "cannot be read .*expected a whole Parquet file"),
        ("empty", r"sample-0001.parquet cannot be read"),
        ("unknown", r"sample-0001.parquet does not say what it holds"),
        ("version", r"sample-0001.parquet has the schema 'forcingkv.statistics/9'"),
        ("model", r"sample-0001.parquet is of another run: model differs \(the model other\)"),
        ("columns", r"sample-0001.parquet has the columns"),
        ("nan", r"the mass of sample 1 sums to nan \(chunk 2, step 0, layer 1, head 2"),
        ("short", "sample 1 has 143 scored rows; expected 144"),
        ("doubled", "has a row twice"),
        ("renamed", r"sample-0001.parquet holds sample 2; expected sample 1"),
        ("gone", r"holds no statistics; expected files sample-NNNN.parquet"),
    ],
)
def test_statistics_that_are_wrong_are_refused(
    stats: Path, how: str, message: str, run: Callable[..., object]
) -> None:
    spoil(stats, how)
    with pytest.raises(InputError, match=message):
        analyze_statistics(stats)
    ran = run("analyze", "report", stats.parent)
    assert ran.code == 2  # type: ignore[attr-defined]
    assert "error: " in ran.err  # type: ignore[attr-defined]
    assert not any((stats.parent / name).exists() for name in FILES)


def test_a_run_that_cannot_be_made_leaves_no_files(tmp_path: Path) -> None:
    drawn = random_weights(SPEC)

    def spoilt(name: str) -> npt.NDArray[np.float32]:
        return drawn[name] * (math.nan if ".0.self_attn.q" in name else 1)  # type: ignore[return-value]

    bad = replace(JOB, weights=Weights(drawn.shapes, spoilt))  # type: ignore[arg-type]
    cases = [
        (bad, 1, r"sample 0, chunk 0, step 0: the attention of layer 0 is not a number"),
        (replace(JOB, chunks=2), 1, r"chunks: 2 are too few: small treats .*; expected at least 3"),
        (JOB, 0, "0 samples of 2 prompts cannot be measured"),
        (replace(JOB, texts=[]), 1, "1 samples of 0 prompts cannot be measured"),
        (replace(JOB, policy="forcing-kv"), 1, "needs a head map"),
    ]
    for job, samples, message in cases:
        with pytest.raises(InputError, match=message):
            analyze_heads(job, tmp_path / "out", samples=samples)
    assert list(tmp_path.iterdir()) == []


def test_heads_can_be_measured_under_a_policy_that_groups_them(tmp_path: Path) -> None:
    headmap = headmap_of(SPEC, [[0], [1], [2], [0, 2]])
    job = replace(JOB, policy="forcing-kv", headmap=headmap, chunks=5)
    analysis = analyze_heads(job, tmp_path / "a", samples=2, labelling=Labelling(rule="quota"))
    assert analysis.recorded.recording.headmap == headmap.digest
    rows = analysis.recorded.rows.collect()
    last = rows.filter(pl.col("chunk") == 4, pl.col("layer") == 1)
    roles = {head: set(last.filter(head=head)["role"].explode()) for head in range(3)}
    assert roles[1] == {"sink", "recent", "current"}, "the static head"
    assert roles[0] == roles[2] == {"sink", "retained", "recent", "current"}


def test_a_model_with_a_sink_of_its_own_is_measured_on_the_frames_it_sees(tmp_path: Path) -> None:
    """As LongLive: 9 frames at most, of which the first 3 stay."""
    spec = small_spec(attended_frames=9, sink_frames=3)
    record_samples(Job(spec, random_weights(spec), TEXTS, chunks=5), tmp_path, samples=1)
    rows = read_statistics(tmp_path).rows.collect()
    seen = [sorted(rows.filter(chunk=chunk)["key_frame"].explode().unique()) for chunk in range(5)]
    assert seen == [
        [0, 1, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 6, 7, 8, 9, 10, 11],
        [0, 1, 2, 9, 10, 11, 12, 13, 14],
    ]


def test_a_policy_whose_layers_choose_for_themselves_is_refused(tmp_path: Path) -> None:
    spec = small_spec()
    policy = tmp_path / "own.toml"
    roles = (
        '{ role = "retained", segments = 6, ratio = 0.33, shared = false }, { role = "recent", frames = 1 }'
    )
    policy.write_text(f'base = "forcing-kv"\nname = "own"\n[groups]\ndynamic = [{roles}]\n', encoding="utf-8")
    job = Job(spec, random_weights(spec), [], policy=str(policy), headmap=mixed_map(spec))
    with pytest.raises(InputError, match=r"policy own lets every layer choose .*shared = true"):
        job.plan()
