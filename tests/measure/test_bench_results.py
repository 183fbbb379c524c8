"""Rows of the benchmark: ratios of the same round, the limit, and what a session really holds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from forcingkv.measure.bench import sweeps, turns
from forcingkv.measure.bench.cases import bundle_cases
from forcingkv.measure.bench.results import report, rows
from forcingkv.measure.bench.sweeps import lengths, resolutions, write_lengths, write_resolutions
from forcingkv.measure.bench.turns import BenchCase, BenchSetup, BenchTurns, Turn, take_turns
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.schedule import Schedule

Bundles = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _passes_are_timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TIMED_SECONDS", 0.02)
    monkeypatch.setattr(turns, "give_back", lambda: None)  # 0.4 seconds where torch is loaded


@pytest.fixture(name="cases")
def _cases(bundles: Bundles) -> list[BenchCase]:
    return bundle_cases([bundles("forcing-kv"), bundles("full")])


def turn(seconds: float, decoding: float | None = None) -> Turn:
    return Turn(seconds, 2 * seconds, decoding, 10, 20)


def test_the_speedup_is_the_median_of_the_ratios_of_rounds(cases: list[BenchCase]) -> None:
    ours, full = cases
    measured = [
        BenchTurns(ours, [turn(1.0, 3.0), turn(2.0, 3.0), turn(4.0, 3.0)]),
        BenchTurns(full, [turn(3.0, 3.0), turn(4.0, 3.0), turn(20.0, 3.0)]),
    ]
    row, against = rows(measured)
    assert (row["speedup"], row["speedup_least"], row["speedup_most"]) == (3.0, 2.0, 5.0)
    assert (row["seconds"], row["seconds_least"], row["seconds_most"]) == (2.0, 1.0, 4.0)
    assert row["speedup_undisturbed"] == 3.0
    limit = pass_flops(full.bundle.plan).total / pass_flops(ours.bundle.plan).total
    assert row["flop_limit"] == pytest.approx(limit)
    assert row["share_of_limit"] == pytest.approx(3.0 / limit)
    assert (against["speedup"], against["flop_limit"], against["share_of_limit"]) == (1.0, 1.0, 1.0)
    passes = len(ours.bundle.plan.spec.schedule.later) + 2  # the clean pass took twice as long
    assert row["seconds_per_chunk"] == pytest.approx(passes * 2.0)
    assert row["speedup_with_decoding"] == pytest.approx((passes * 4.0 + 3.0) / (passes * 2.0 + 3.0))
    assert row["kv_bytes"] == ours.bundle.plan.kv_bytes()


def test_without_decoding_there_is_no_speedup_with_it(cases: list[BenchCase]) -> None:
    row, _ = rows([BenchTurns(case, [turn(1.0)]) for case in cases])
    assert (row["seconds_to_decode"], row["speedup_with_decoding"]) == (None, None)


def test_policies_take_turns(cases: list[BenchCase]) -> None:
    said: list[str] = []
    measured = take_turns(cases, BenchSetup(2, threads=1), progress=said.append)
    assert said == [f"round {n} of 2: {name}" for n in (1, 2) for name in ("forcing-kv", "full")]
    for one in measured:
        assert len(one.turns) == 2
        assert all(taken.pass_seconds > 0 for taken in one.turns)
        with Session.open(one.bundle) as session:
            assert one.turns[0].cache_bytes == session.pass_timer(0).cache_bytes


def test_rounds_that_there_is_no_time_for_are_left_out_and_said(cases: list[BenchCase]) -> None:
    said: list[str] = []
    measured = take_turns(cases, BenchSetup(3, threads=1), seconds=0.0, progress=said.append)
    assert [len(one.turns) for one in measured] == [1, 1]
    assert said[-1] == "2 of 3 rounds are left out: they would take too long"


def test_a_rehearsal_runs_the_shapes_of_its_chunk_and_changes_no_video(bundles: Bundles) -> None:
    with Session.open(bundles("forcing-kv"), threads=1) as session:
        before = [chunk.latents.tobytes() for chunk in session.generate("a b c", seed=3, chunks=4)]
        for chunk in (0, 1, 5, 6, 99):
            rehearsal = session.pass_timer(chunk)
            assert rehearsal.denoise() > 0
            assert rehearsal.fill() > 0
            assert rehearsal.decode() > 0
        after = [chunk.latents.tobytes() for chunk in session.generate("a b c", seed=3, chunks=4)]
    assert before == after


def test_a_rehearsal_ends_the_video_there_was(bundles: Bundles) -> None:
    with Session.open(bundles("full")) as session:
        video = session.generate("a b c", seed=3, chunks=4)
        next(video)
        session.pass_timer(2)
        with pytest.raises(RuntimeError, match="this video ended"):
            next(video)


@pytest.mark.slow
def test_lengths_grow_until_the_last_phase_and_are_written(cases: list[BenchCase], tmp_path: Path) -> None:
    points = lengths(cases, BenchSetup(1, threads=1), chunks=12)
    written = write_lengths(tmp_path / "new", points, "a title")
    assert [path.name for path in written] == ["lengths.csv", "lengths.png"]
    with written[0].open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [set(row) for row in read] == [set(point) for point in points]
    for case in cases:
        plan = case.bundle.plan
        line = [point for point in points if point["policy"] == plan.policy.name]
        assert [point["chunk"] for point in line] == list(range(1, 13))
        assert [point["kv_bytes"] for point in line] == [plan.kv_bytes(chunk=n) for n in range(12)]
        assert [point["flops"] for point in line] == sorted(point["flops"] for point in line)
        assert line[-1]["total_seconds"] == pytest.approx(sum(point["seconds"] for point in line))
        assert line[-1]["seconds"] == line[-2]["seconds"]


def test_each_chunk_of_a_video_costs_its_own_passes(
    cases: list[BenchCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second a denoising pass, two the clean one; chunks of 4, 2, then 1 denoising passes."""
    schedule = Schedule((1000.0,), by_chunk=((1000.0, 750.0, 500.0, 250.0), (1000.0, 500.0)))
    ours = cases[0].bundle
    manifest = replace(ours.manifest, model=replace(ours.manifest.model, schedule=schedule))
    case = BenchCase(Bundle(ours.path, manifest, ours.headmap))
    monkeypatch.setattr(
        sweeps, "take_turns", lambda at, *_, **__: [BenchTurns(one, [turn(1.0)]) for one in at]
    )
    points = lengths([case], BenchSetup(1), chunks=4)
    assert [point["seconds"] for point in points] == [6.0, 4.0, 3.0, 3.0]
    assert [point["total_seconds"] for point in points] == [6.0, 10.0, 13.0, 16.0]
    assert [point["fps"] for point in points] == [3 / 6, 6 / 10, 9 / 13, 12 / 16]
    assert BenchTurns(case, [turn(1.0)]).chunk_seconds == 3.0, "of a later chunk"
    said = report([BenchTurns(case, [turn(1.0)])], BenchSetup(1))
    assert (said["passes"], said["opening_passes"]) == (2, [5, 3])


def test_resolutions_are_written(cases: list[BenchCase], tmp_path: Path) -> None:
    measured = [BenchTurns(case, [turn(1.0)]) for case in cases]
    points = resolutions([("small", measured)])
    assert [(p["policy"], p["resolution"], p["speedup"]) for p in points] == [
        ("forcing-kv", "small", 1.0),
        ("full", "small", 1.0),
    ]
    table, picture = write_resolutions(tmp_path, points, "a title")
    assert table.read_text().count("\n") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
