"""Samples on Ray workers: the same bytes as in one process, also when a worker is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forcingkv.analyze import Job, analyze_heads, record_samples
from forcingkv.analyze.storage import Storage
from forcingkv.headmaps import InputError, MissingExtraError
from forcingkv.models.checkpoint import random_weights
from forcingkv.runtime.ray_cluster import check_device
from forcingkv.runtime.text import encode_words
from tests.conftest import small_spec
from tests.ray_workers import HAS_PROC, all_gone, ray_workers

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'forcingkv[ray]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("white_pictures"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # pipes of Ray's own processes
]

# Large enough that recording a sample takes about a second: a worker can be killed in the middle.
SPEC = small_spec(width=36, height=24)
TEXTS = [encode_words(SPEC, prompt) for prompt in ("a b", "c d", "e")]
JOB = Job(SPEC, random_weights(SPEC), TEXTS, seed=5, chunks=4, threads=1)
SAMPLES = 3


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Workers find what this process finds."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def alone(white_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone")
    analyze_heads(JOB, out, samples=SAMPLES)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kill_one_at_work(stats: Path, killed: list[int], over: threading.Event) -> None:
    """Kill a worker that is recording, once the first sample is there."""
    while not over.is_set():
        busy = [number for number, title in ray_workers("SampleRecorder").items() if ".record" in title]
        if any(stats.glob("sample-*.parquet")) and busy:
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])
            return
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.skipif(not HAS_PROC, reason="finds workers in /proc")
def test_two_workers_of_which_one_is_killed_write_the_same_bytes_as_one_process(
    alone: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    told: list[int] = []
    over = threading.Event()
    killer = threading.Thread(target=kill_one_at_work, args=(tmp_path / "stats", killed, over))
    killer.start()
    try:
        analyze_heads(
            JOB,
            tmp_path,
            samples=SAMPLES,
            cluster="local",
            workers=2,
            progress=lambda done, _: told.append(done),
        )
    finally:
        over.set()
        killer.join()
    assert told == list(range(SAMPLES + 1))
    assert len(killed) == 1, "no worker was found at work"
    assert all_gone("SampleRecorder"), "workers are gone when the run is over"
    leftover = {name for name in contents(tmp_path) if name.endswith(".forcingkv")}
    assert leftover == set()
    assert contents(tmp_path) == contents(alone)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A running Ray, which every run of a test uses."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_finds_wrong_is_said_as_in_one_process(tmp_path: Path) -> None:
    weights = random_weights(SPEC)
    with pytest.raises(TypeError, match="nothing says how to open them"):
        record_samples(
            replace(JOB, weights=type(weights)(weights.shapes, weights.__getitem__)),
            tmp_path,
            samples=1,
            cluster="local",
            workers=1,
        )
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be listed"):
        record_samples(JOB, blocked / "stats", samples=1, cluster="local", workers=1)
    assert Storage(tmp_path).samples() == []


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ray 127\.0\.0\.1:1: no cluster answers"):
        record_samples(JOB, tmp_path, samples=1, cluster="127.0.0.1:1", workers=1)


def test_ray_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'forcingkv\[ray\]'"):
        record_samples(JOB, tmp_path, samples=1, cluster="local")


@pytest.mark.parametrize("device", ["cuda:1", "mps", "xpu:2"])
def test_a_device_that_workers_do_not_have_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=f"--device is {device}, and workers take what Ray gives them"):
        check_device(device)
    for known in ("cpu", "cuda", "cuda:0", "xpu"):
        check_device(known)
