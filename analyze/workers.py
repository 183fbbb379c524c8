"""Samples spread over Ray workers, each with its own model and device.

A worker writes each sample where the run's statistics lie; nothing travels back. A worker
that dies is started anew and its sample recorded again: since a sample's file appears whole or not at
all, and always under the same name, nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from forcingkv.analyze.run import Job, SampleRecorder
from forcingkv.analyze.space import workers_that_fit
from forcingkv.analyze.storage import Storage
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.ray_cluster import LOCAL, check_device, cluster, need_ray, room, spread
from forcingkv.runtime.threads import cpu_threads


def record_with_ray(
    job: Job,
    storage: Storage,
    samples: Sequence[int],
    address: str,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda left: None,
) -> None:
    """Record those samples on Ray workers.

    Args:
        job: what to record; with `threads` None, workers on this machine share its cores.
        storage: where files go; workers on other machines must see the same place.
        samples: numbers of the samples.
        address: `local`, for workers on this machine, or the address of a running cluster.
        workers: how many at a time; each takes one GPU where the job runs on GPUs. None: as many as
            there are GPUs or cores for, and on this machine memory.
        progress: called with how many samples are left.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: the cluster is not there or has no room, a worker died more than `RETRIES` times,
            or what a worker raised.
    """
    need_ray()
    check_device(job.device)
    with cluster(address, workers):
        count = min(workers or _room(job, address), len(samples))
        if job.threads is None and address == LOCAL:
            job = replace(job, threads=max(1, cpu_threads().number // count))
        needs = {"num_cpus": job.threads or 1} if job.device == "cpu" else {"num_gpus": 1}
        # A worker started anew needs its arguments again, so they are small: texts go with the samples.
        arguments = (replace(job, texts=()), job.recording, storage.place)
        kept = "What was recorded is kept: run the same command again, with fewer --workers."
        recorded = spread(
            SampleRecorder,
            arguments,
            count,
            needs,
            lambda actor, sample: actor.record.remote(sample, job.text(sample)),
            samples,
            kept,
        )
        for done, _ in enumerate(recorded, 1):
            progress(len(samples) - done)
    absent = sorted(set(samples) - set(storage.samples()))
    if absent:
        raise InputError(
            f"lacks {len(absent)} samples that workers recorded",
            where=storage.place,
            expected="a place that all workers share",
            hint="Give one with --stats, for example an s3:// URL.",
        )


def _room(job: Job, address: str) -> int:
    """Workers that the cluster has GPUs or cores for, and this machine memory."""
    kind = "CPU" if job.device == "cpu" else "GPU"
    found = room(kind, 1 if kind == "GPU" else job.threads or 1)
    if address == LOCAL and kind == "CPU":
        found = min(found, workers_that_fit(job.plan(), job.dtype, job.length, job.passes))
    return found
