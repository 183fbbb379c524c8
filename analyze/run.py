"""A run: what is to be measured, recording the samples that are not there yet, and writing what follows.

`Job` says what, `SampleRecorder` records samples in any process, `analyze_heads` does everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from forcingkv.analyze.analysis import Analysis, Labelling, analyze_statistics
from forcingkv.analyze.recorder import record_sample
from forcingkv.analyze.recording import SCHEMA, Passes, RecordedDtype, Recording, check_length, check_passes
from forcingkv.analyze.results import analyzed_alone, check_places, write_analysis
from forcingkv.analyze.space import check_memory_to_record
from forcingkv.analyze.storage import Storage, check_same
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity
from forcingkv.models.checkpoint import Weights, build_model
from forcingkv.models.heads import head_orders, permute_tensor
from forcingkv.models.torch_threads import use_threads
from forcingkv.runtime.backends.torch_device import faults, find_device
from forcingkv.runtime.given import GivenNoise, LatentsWriter
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec

Text = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""(samples done, chunks done of those under way)."""
MOST_SAMPLES = 100_000
"""Of a run: each has a file, and is listed before any is recorded."""


@dataclass(frozen=True)
class Job:
    """A run of measurements. It can be sent to another process."""

    spec: ModelSpec
    weights: Weights
    texts: Sequence[Text]
    """Text inputs, each (1, text_length, text_width); sample i uses text i, in turn."""
    seed: int = 0
    """Seed of sample 0; sample i has this plus i."""
    chunks: int | None = None
    """Chunks a video; None: until the model attends to as much as it can."""
    policy: str = "full"
    headmap: HeadMap | None = None
    """For policies that group heads."""
    resolution: str | None = None
    rows: int | None = None
    """Query rows measured of each pass and layer; None: all."""
    device: str = "cpu"
    """As `choose_device` gives it."""
    dtype: RecordedDtype = "float32"
    threads: int | None = None
    """CPU threads; None: as `models.torch_threads.use_threads` says."""
    passes: Passes = "denoise"
    """Passes that are recorded."""
    latents: Path | None = None
    """Folder that the latents of each sample are written to; None: nowhere."""
    noises: tuple[GivenNoise, ...] = field(default=(), repr=False)
    """Noise of each sample, of files; of one, of all of them; none: that of the seeds."""

    def plan(self) -> CachePlan:
        """The cache plan. Raises InputError where policy, map and model do not fit."""
        return recording_plan(self.spec, self.resolution, self.policy, self.headmap)

    @property
    def length(self) -> int:
        """Chunks of a video."""
        return video_length(self.spec, self.chunks)

    @cached_property
    def recording(self) -> Recording:
        """What all samples have in common. Reads the weights through once, for their digest.

        Raises InputError for too few chunks, and as `plan` does.
        """
        spec, chunks = self.spec, self.length
        plan = self.plan()
        check_length(spec, chunks)
        check_passes(spec, self.passes)
        return Recording(
            schema=SCHEMA,
            model=ModelIdentity(spec.name, spec.layers, spec.heads, self.weights.digest),
            spec=spec,
            width=plan.geometry.width,
            height=plan.geometry.height,
            policy=self.policy,
            headmap=self.headmap.digest if self.headmap and plan.policy.needs_headmap else None,
            seed=self.seed,
            chunks=chunks,
            # Sampling all rows is not sampling.
            rows=self.rows if self.rows and self.rows < plan.chunk_tokens else None,
            dtype=self.dtype,
            loras=self.weights.loras or None,
            passes=None if self.passes == "denoise" else self.passes,
        )

    def noise_of(self, sample: int) -> GivenNoise | None:
        """The noise of a sample, of a file; None: it is that of its seed."""
        return self.noises[sample % len(self.noises)] if self.noises else None

    def latents_file(self, sample: int) -> AbstractContextManager[LatentsWriter | None]:
        """The file for the latents of a sample."""
        if self.latents is None:
            return nullcontext()
        said = {"forcingkv.model": self.spec.name, "forcingkv.policy": self.policy}
        said["forcingkv.seed"] = str(self.seed + sample)
        return LatentsWriter(self.latents / f"{sample:04}.safetensors", lambda: said)

    def text(self, sample: int) -> Text:
        """The text input of a sample."""
        return self.texts[sample % len(self.texts)]


def recording_plan(
    spec: ModelSpec, resolution: str | None, policy: str, headmap: HeadMap | None
) -> CachePlan:
    """The cache plan of a recording. Raises InputError where policy, map and model do not fit."""
    chosen = load_policy(policy)
    plan = build_plan(spec, spec.geometry(resolution), chosen, headmap)
    if plan.recomputes:
        raise InputError(
            f"makes its context anew before each chunk, of {spec.context_frames} frames that all heads see",
            where=f"model {spec.name}",
            expected="a model whose cache holds a history (context = 'cache')",
        )
    if plan.choice and not plan.choice.role.shared:
        raise InputError(
            "lets every layer choose segments for itself",
            where=f"policy {chosen.name}",
            expected="shared = true: one choice of retained segments a chunk is recorded",
        )
    return plan


def video_length(spec: ModelSpec, chunks: int | None) -> int:
    """Chunks of a video; where no number is given, until the model attends to as much as it can."""
    return chunks or spec.chunks_to_fill


class SampleRecorder:
    """A model on its device, ready to record samples of a job. Their files go to `place`."""

    def __init__(self, job: Job, recording: Recording, place: str) -> None:
        use_threads(job.threads)
        plan, weights, spec = job.plan(), job.weights, job.spec
        orders = head_orders(spec, plan.policy, job.headmap)
        if plan.policy.needs_headmap:
            weights = Weights(
                weights.shapes, lambda name: permute_tensor(name, job.weights[name], spec, orders)
            )
        self._placed: dict[str, Any] = {"dtype": getattr(torch, job.dtype), "device": job.device}
        with faults(f"loading {spec.name}"):
            model = build_model(spec, weights, **self._placed)
        self._job = job
        self._record = partial(
            record_sample,
            model,
            plan,
            chunks=recording.chunks,
            rows=recording.rows,
            orders=orders,
            passes=recording.recorded,
        )
        self._recording, self._storage = recording, Storage(place)

    def record(self, sample: int, text: Text, progress: Callable[[int], None] = lambda chunk: None) -> None:
        """Record a sample with that text.

        Raises InputError where attention is not a number, SessionError where the device fails.
        """
        with faults(f"recording sample {sample}"):
            placed = torch.tensor(text, **self._placed)
            noise = self._job.noise_of(sample)
            seed = self._recording.seed + sample
            with self._job.latents_file(sample) as file:

                def keep(latents: torch.Tensor) -> None:
                    if file:
                        file.write(latents.float().cpu().numpy())

                rows = self._record(placed, seed, sample, progress=progress, given=noise, keep=keep)
        self._storage.write(rows, self._recording.of(sample, text, noise.digest if noise else None))


def choose_device(name: str | None) -> str:
    """`cpu`, `cuda`, `cuda:1`, `mps` or `xpu`; None: a GPU of CUDA's where torch sees one.

    Raises InputError for another, and for one that is not there.
    """
    return str(find_device(name or ("cuda" if torch.cuda.is_available() else "cpu")))


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
    progress: Progress = lambda done, chunk: None,
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
        progress: called with how far it is.

    Raises:
        InputError: there are no prompts, too few chunks, too little memory, recordings of another run or
            by other versions, the rule cannot be applied, nothing is scored of what is recorded, `out`
            cannot be written or has another writer.
    """
    (labelling or Labelling()).scoring.check(job.spec, job.length, job.passes)
    place = stats or out / "stats"
    check_places(out, stats, samples=samples, restart=restart)
    with analyzed_alone(out):
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
    progress: Progress = lambda done, chunk: None,
) -> list[int]:
    """Record samples 0 to `samples` - 1 that are not there yet. Returns those recorded now.

    Each becomes a file when it is whole. Raises InputError as `analyze_heads` does; where memory is too
    little, before the weights are read.
    """
    if not job.texts or not 1 <= samples <= MOST_SAMPLES:
        raise InputError(
            f"{samples} samples of {len(job.texts)} prompts cannot be measured",
            expected=f"at least one sample and one prompt, and at most {MOST_SAMPLES} samples",
        )
    storage = Storage(place)
    check_room(
        job.plan(),
        place,
        samples=samples,
        restart=restart,
        cluster=cluster,
        workers=workers,
        chunks=job.length,
        dtype=job.dtype,
        device=job.device,
        passes=job.passes,
    )
    recording = job.recording
    if restart:  # not before what is asked for is known to be possible
        storage.clear()
    storage.remove_leftovers()
    missing = _missing(job, storage, samples)
    if missing:
        storage.check_versions()
        storage.check_writable()  # now, or the first sample would be lost
    progress(samples - len(missing), 0)
    if not missing:
        return []

    def finished(done: int) -> None:
        if done == 1:  # by this process alone, whoever recorded the sample
            storage.note_versions()
        progress(done, 0)

    if cluster:
        from forcingkv.analyze.workers import record_with_ray

        record_with_ray(job, storage, missing, cluster, workers, lambda left: finished(samples - left))
        return missing
    recorder = SampleRecorder(job, recording, storage.place)
    for done, sample in enumerate(missing, samples - len(missing)):
        recorder.record(sample, job.text(sample), partial(progress, done))
        finished(done + 1)
    return missing


def check_room(
    plan: CachePlan,
    place: str | Path,
    *,
    samples: int,
    restart: bool,
    cluster: str | None,
    workers: int | None,
    chunks: int,
    dtype: RecordedDtype,
    device: str,
    passes: Passes = "denoise",
) -> None:
    """Raise InputError where this machine has too little memory for samples that are still to be recorded.

    Reads no weights. The arguments are those of `record_samples` and of its job. What the machines of a
    cluster have is not known here.
    """
    from forcingkv.runtime.ray_cluster import LOCAL

    if cluster not in (None, LOCAL):
        return
    if restart or Storage(place).lacks(samples):
        here = max(1, min(workers or 1, samples)) if cluster else 0
        check_memory_to_record(plan, dtype, chunks, device, here, passes)


def _missing(job: Job, storage: Storage, samples: int) -> list[int]:
    """Samples to be recorded. Raises InputError where what is there does not belong to this run."""
    recording, there = job.recording, storage.samples()
    if there and there[-1] >= samples:
        are, highest = "is" if samples == 1 else "are", there[-1]
        raise InputError(
            f"holds sample {highest}, and {samples} {are} asked for",
            where=storage.place,
            expected=f"samples 0 to {samples - 1}",
            hint=f"Ask for --samples {highest + 1}, choose another folder, or measure anew with --restart.",
        )
    for sample in there:
        noise = job.noise_of(sample)
        wanted = recording.of(sample, job.text(sample), noise.digest if noise else None)
        check_same(storage.recording(sample), wanted, storage.path(sample))
    known = set(there)
    return [sample for sample in range(samples) if sample not in known]
