"""How many threads: the least of cores, affinity, quotas and what the environment says; and which it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from forcingkv.runtime import threads
from forcingkv.runtime.threads import chosen_threads, cpu_threads
from tests.runtime.groups import Groups


@pytest.fixture(autouse=True)
def _a_machine_of_64(groups: Groups, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """64 cores of two threads each, all of which may be used; CPU n and n + 64 are of one core."""
    for name in threads.GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 128 if logical else 64)
    may_use(monkeypatch, list(range(128)))
    monkeypatch.setattr(threads, "TOPOLOGY", tmp_path / "cpus")
    for cpu in range(128):
        folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 64},{cpu % 64 + 64}\n")


def may_use(monkeypatch: pytest.MonkeyPatch, cpus: list[int] | None) -> None:
    class Process:
        pass

    if cpus is not None:
        Process.cpu_affinity = lambda self: cpus  # type: ignore[attr-defined]
    monkeypatch.setattr(psutil, "Process", Process)


def test_it_is_a_thread_a_core() -> None:
    assert cpu_threads() == (64, "cores of the machine")
    assert chosen_threads(None) == cpu_threads()
    assert chosen_threads(100) == (100, "as asked for")


def test_where_the_system_has_no_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    may_use(monkeypatch, None)
    assert cpu_threads() == (64, "cores of the machine")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert cpu_threads().number == 1


@pytest.mark.parametrize(("cpus", "cores"), [([5], 1), ([0, 1, 2], 3), ([0, 64], 1), ([0, 64, 1], 2)])
def test_cpus_that_may_be_used_count_once_a_core(
    monkeypatch: pytest.MonkeyPatch, cpus: list[int], cores: int
) -> None:
    may_use(monkeypatch, cpus)
    assert cpu_threads() == (cores, "the CPUs that this process may run on (affinity)")
    monkeypatch.setattr(threads, "TOPOLOGY", Path("/nowhere"))
    assert cpu_threads().number == len(cpus)


@pytest.mark.parametrize(("quota", "count"), [("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1)])
@pytest.mark.parametrize("limited", ["pod/container", "pod", ""])
def test_a_quota_of_any_group_above_counts(groups: Groups, quota: str, count: int, limited: str) -> None:
    groups.mine("0::/pod/container")
    for name in ("pod/container", "pod", ""):
        groups.group(name, cpu__max="max 100000")
    assert cpu_threads().number == 64
    groups.group(limited, cpu__max=quota)
    found = cpu_threads()
    assert found.number == count
    assert found.because == f"the quota of the control group: {groups.mounted / limited / 'cpu.max'}"


def test_a_quota_of_version_1_counts(groups: Groups) -> None:
    groups.mine("3:cpu,cpuacct:/docker/1")
    groups.mount(groups.mounted / "cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
    groups.group("cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    groups.group("cpu,cpuacct/docker", cpu__cfs_quota_us=350_000, cpu__cfs_period_us=100_000)
    groups.group("cpu,cpuacct/docker/1", cpu__cfs_quota_us=800_000, cpu__cfs_period_us=100_000)
    assert cpu_threads().number == 4


@pytest.mark.parametrize("text", ["", "max", "100000", "x y", "100000 0", "-1 100000"])
def test_a_quota_that_says_nothing_is_none(groups: Groups, text: str) -> None:
    groups.group("", cpu__max=text)
    assert cpu_threads().number == 64


@pytest.mark.parametrize("name", threads.GIVEN)
@pytest.mark.parametrize(
    ("text", "number"),
    [("3", 3), (" 3 ", 3), ("3,2", 3), ("200", 64), ("0", 64), ("-2", 64), ("x", 64), ("", 64)],
)
def test_the_environment_may_say_fewer(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, number: int
) -> None:
    monkeypatch.setenv(name, text)
    assert cpu_threads() == (number, name if number == 3 else "cores of the machine")


def test_a_process_of_one_cpu_has_one_thread() -> None:
    """As the system says it: without the machine of 64."""
    code = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))});"
    code += "from forcingkv.runtime.threads import cpu_threads; print(*cpu_threads())"
    environment = {name: text for name, text in os.environ.items() if name not in threads.GIVEN}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.startswith("1 ")
