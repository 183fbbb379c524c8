"""Samples spread over Ray workers, each with its own model and device.

A worker writes each sample where the run's statistics lie; nothing travels back. A worker
that dies is started anew and its sample recorded again: since a sample's file appears whole or not at
all, and always under the same name, nothing is counted twice.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from forcingkv.analyze.run import Job, SampleRecorder
from forcingkv.analyze.space import workers_that_fit
from forcingkv.analyze.storage import Storage
from forcingkv.headmaps.errors import InputError, MissingExtraError, first_line
from forcingkv.runtime.faults import SessionError
from forcingkv.runtime.threads import cpu_threads

LOCAL = "local"
RETRIES = 3
"""How often a worker may die over one run before it is given up."""


def record_with_ray(
    job: Job,
    storage: Storage,
    samples: Sequence[int],
    cluster: str,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda left: None,
) -> None:
    """Record those samples on Ray workers.

    Args:
        job: what to record; with `threads` None, workers on this machine share its cores.
        storage: where files go; workers on other machines must see the same place.
        samples: numbers of the samples.
        cluster: `local`, for workers on this machine, or the address of a running cluster.
        workers: how many at a time; each takes one GPU where the job runs on GPUs. None: as many as
            there are GPUs or cores for, and on this machine memory.
        progress: called with how many samples are left.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: the cluster is not there or has no room, a worker died more than `RETRIES` times,
            or what a worker raised.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")
    check_device(job.device)
    import ray
    from ray.util import ActorPool

    with _cluster(cluster, workers):
        count = min(workers or _room(job, cluster), len(samples))
        if job.threads is None and cluster == LOCAL:
            job = replace(job, threads=max(1, cpu_threads().number // count))
        needs = {"num_cpus": job.threads or 1} if job.device == "cpu" else {"num_gpus": 1}
        needs |= {"max_restarts": RETRIES, "max_task_retries": RETRIES}
        actor: Any = ray.remote(SampleRecorder).options(**needs)
        # A worker started anew needs its arguments again, so they are small: texts go with the samples.
        arguments = (replace(job, texts=()), job.recording, storage.place)
        pool = ActorPool([actor.remote(*arguments) for _ in range(count)])
        recorded = pool.map_unordered(lambda a, sample: a.record.remote(sample, job.text(sample)), samples)
        try:
            for done, _ in enumerate(recorded, 1):
                progress(len(samples) - done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError | SessionError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise InputError(
                f"a worker died more than {RETRIES} times, or never started ({first_line(error)})",
                where="ray",
                expected="workers that keep running (they mostly die for want of memory)",
                hint="What was recorded is kept: run the same command again, with fewer --workers.",
            ) from error
    absent = sorted(set(samples) - set(storage.samples()))
    if absent:
        raise InputError(
            f"lacks {len(absent)} samples that workers recorded",
            where=storage.place,
            expected="a place that all workers share",
            hint="Give one with --stats, for example an s3:// URL.",
        )


def check_device(device: str) -> None:
    """Raise InputError for a device that no worker has: the GPU that Ray gives it is its first."""
    kind, _, number = device.partition(":")
    if kind == "mps" or number not in ("", "0"):
        raise InputError(
            f"is {device}, and workers take what Ray gives them",
            where="--device",
            expected="cpu, cuda or xpu with --ray",
        )


def _room(job: Job, cluster: str) -> int:
    """Workers that the cluster has GPUs or cores for, and this machine memory."""
    import ray

    kind = "CPU" if job.device == "cpu" else "GPU"
    room = int(ray.cluster_resources().get(kind, 0)) // (1 if kind == "GPU" else job.threads or 1)
    if room < 1:
        raise InputError(f"the cluster has no free {kind}", where="ray", expected=f"at least one {kind}")
    if cluster == LOCAL and kind == "CPU":
        room = min(room, workers_that_fit(job.plan(), job.dtype, job.length, job.passes))
    return room


@contextmanager
def _cluster(cluster: str, workers: int | None) -> Iterator[None]:
    """Ray, on this machine or at an address, for as long as the block runs."""
    import ray

    if ray.is_initialized():  # an embedding program's own cluster
        yield
        return
    # Ray's own future default; left unset, it warns.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cluster != LOCAL:
        _check_answers(cluster)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster == LOCAL:
        # More workers than cores may be asked for: torch's threads share the cores.
        options |= {"num_cpus": max(workers or 1, cpu_threads().number), "include_dashboard": False}
    try:
        ray.init(address=cluster, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(cluster, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise InputError where nobody listens at host:port: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if found is None:  # "auto" and the like, which Ray resolves
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(
        f"no cluster answers ({first_line(error)})",
        where=f"ray {address}",
        expected="the address of a running Ray cluster, or local",
    )
