"""A run: record the samples that are not there yet, then label, judge and write everything down."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from forcingkv.analyze.analysis import Analysis, Labelling, analyze_statistics
from forcingkv.analyze.job import Job, SampleRecorder
from forcingkv.analyze.report import report_html
from forcingkv.analyze.storage import Storage, check_same
from forcingkv.analyze.summary import summary_json
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import write_text

STATS = "stats"

Say = Callable[[int, int], None]
"""(samples done, chunks done of those under way)."""


def analyze_heads(
    job: Job,
    out: Path,
    *,
    samples: int,
    labelling: Labelling | None = None,
    stats: str | Path | None = None,
    restart: bool = False,
    cluster: str | None = None,
    workers: int | None = None,
    command: Sequence[str] = (),
    progress: Say = lambda done, chunk: None,
) -> Analysis:
    """Measure every head over `samples` videos, and write `out`: headmap.json, stability.json, report.html.

    Args:
        job: model, text, seed, policy and the like.
        out: the folder.
        samples: videos to measure. Those recorded before are kept, so an interrupted run goes on.
        labelling: how to label; None: the rule `auto`.
        stats: where the Parquet files go, a folder or a URL that fsspec knows; None: `out`/stats.
        restart: forget what was recorded before.
        cluster: None: in this process; `local`, or the address of a Ray cluster: see `analyze.workers`.
        workers: Ray workers at a time; None: as many as the cluster has GPUs or cores for.
        command: what a person would run to repeat it, for the report.
        progress: told of progress.

    Raises:
        InputError: there are no prompts, too few chunks, recordings of another run, or the rule
            cannot be applied.
    """
    place = stats or out / STATS
    record_samples(
        job, place, samples=samples, restart=restart, cluster=cluster, workers=workers, progress=progress
    )
    analysis = analyze_statistics(place, labelling)
    write_analysis(analysis, out, command)
    return analysis


def record_samples(
    job: Job,
    place: str | Path,
    *,
    samples: int,
    restart: bool = False,
    cluster: str | None = None,
    workers: int | None = None,
    progress: Say = lambda done, chunk: None,
) -> list[int]:
    """Record samples 0 to `samples` - 1 that are not there yet. Returns those recorded now.

    Each becomes a file when it is whole. Raises InputError as `analyze_heads` does.
    """
    if not job.texts or samples < 1:
        raise InputError(f"{len(job.texts)} prompts, {samples} samples", where="analysis", expected="some")
    storage, recording = Storage(place), job.recording
    if restart:  # not before what is asked for is known to be possible
        storage.remove(storage.samples())
    missing = _missing(job, storage, samples)
    progress(samples - len(missing), 0)
    if not missing:
        return []
    if cluster:
        from forcingkv.analyze.workers import record_with_ray

        record_with_ray(job, storage, missing, cluster, workers, lambda left: progress(samples - left, 0))
        return missing
    recorder = SampleRecorder(job, recording)
    for done, sample in enumerate(missing, samples - len(missing)):
        text = job.text(sample)
        rows = recorder.record(sample, text, lambda chunk, done=done: progress(done, chunk))  # type: ignore[misc]
        storage.write(rows, recording.of(sample, text))
        progress(done + 1, 0)
    return missing


def write_analysis(analysis: Analysis, out: Path, command: Sequence[str] = ()) -> None:
    """Write headmap.json, stability.json and report.html, each under a temporary name first.

    Raises InputError where they cannot be written.
    """
    page = report_html(analysis, command)
    write_text(out / "stability.json", json.dumps(summary_json(analysis), indent=1) + "\n")
    write_text(out / "report.html", page)
    analysis.headmap.write(out / "headmap.json")


def _missing(job: Job, storage: Storage, samples: int) -> list[int]:
    """Samples to be recorded. Raises InputError where what is there does not belong to this run."""
    recording, there = job.recording, storage.samples()
    if there and there[-1] >= samples:
        raise InputError(
            f"holds sample {there[-1]}, and {samples} {'is' if samples == 1 else 'are'} asked for",
            where=storage.place,
            expected=f"samples 0 to {samples - 1}",
            hint=f"Ask for --samples {there[-1] + 1}, choose another folder, or measure anew with --restart.",
        )
    for sample in there:
        wanted = recording.of(sample, job.text(sample))
        check_same(storage.recording(sample), wanted, storage.path(sample))
    return [sample for sample in range(samples) if sample not in there]
