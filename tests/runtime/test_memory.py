"""How much memory may be taken: the least of all limits, and which one it is."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import memory
from tests.runtime.groups import Groups

V1 = {"memory__usage_in_bytes": 700_000, "memory__stat": "total_rss 1\ntotal_inactive_file 150000"}
V2 = {"memory__current": 700_000, "memory__stat": "anon 500000\ninactive_file 150000"}
UNLIMITED = 2**63 - 4096
"""What version 1 says where there is no limit."""


def test_a_container_has_what_its_limit_leaves(groups: Groups) -> None:
    groups.group("", memory__max=1_000_000, **V2)
    assert memory.available_bytes() == 450_000
    with pytest.raises(InputError, match=r"needs about 0.0 GB \(all 0.0 GB\)") as raised:
        memory.require_memory("it", {"all": 450_001}, "Take less.")
    file = groups.mounted / "memory.max"
    assert f"0.0 GB are available (a limit of the control group: {file})" in str(raised.value)
    groups.group("", memory__current=2_000_000)
    assert memory.available_bytes() == 0


@pytest.mark.parametrize("limit", [None, "max"])
def test_without_a_limit_it_is_the_machines(groups: Groups, limit: str | None) -> None:
    if limit:
        groups.group("", memory__max=limit, memory__current=1, memory__stat="inactive_file 0")
    assert 10**8 < memory.available_bytes() < 10**14
    assert memory.what_limits() == ""


@pytest.mark.parametrize("limited", ["a.slice/job.scope/step", "a.slice/job.scope", "a.slice", ""])
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_limit_of_any_group_above_counts(groups: Groups, limited: str, hybrid: bool) -> None:
    """Version 2, alone or beside version 1: `systemd-run`, SLURM, Kubernetes."""
    top = "unified/" if hybrid else ""
    groups.mine("4:cpu,memory:/other", "0::/a.slice/job.scope/step")
    groups.mount(groups.mounted / top, "cgroup2", "rw,nsdelegate")
    for name in ("a.slice/job.scope/step", "a.slice/job.scope", "a.slice", ""):
        groups.group(top + name, memory__max="max", **V2)
    groups.group(top + "a.slice/another", memory__max=1, memory__current=0)  # not above this process
    groups.group(top + limited, memory__max=900_000)
    assert memory.available_bytes() == 350_000
    assert f"{limited}/memory.max)".lstrip("/") in memory.what_limits()


@pytest.mark.parametrize("limited", ["job/42", "job", ""])
def test_a_limit_of_version_1_counts(groups: Groups, limited: str) -> None:
    groups.mine("9:name=systemd:/", "4:memory:/job/42", "0::/")
    groups.mount(groups.mounted / "memory", "cgroup", "rw,memory")
    for name in ("job/42", "job", ""):
        groups.group(f"memory/{name}", memory__limit_in_bytes=UNLIMITED, **V1)
    assert memory.what_limits() == ""
    groups.group(f"memory/{limited}", memory__limit_in_bytes=1_000_000)
    assert memory.available_bytes() == 450_000
    assert "memory.limit_in_bytes" in memory.what_limits()


def test_the_least_of_several_limits_counts(groups: Groups) -> None:
    groups.mine("0::/a/b")
    groups.group("a/b", memory__max=900_000, memory__high="max", memory__current=0)
    groups.group("a", memory__max=800_000, memory__high=500_000, memory__current=100_000)
    assert memory.available_bytes() == 400_000
    assert memory.what_limits().endswith("/a/memory.high)")


def test_a_container_of_version_1_sees_its_own_group_as_the_root(groups: Groups) -> None:
    """The mount says which group lies there; groups that are hidden above it are in memory.stat."""
    place = groups.group("memory", memory__limit_in_bytes=UNLIMITED, **V1)
    (place / "memory.stat").write_text("hierarchical_memory_limit 1200000\ntotal_inactive_file 0\n")
    groups.mine("4:memory:/docker/0123")
    groups.mount(place, "cgroup", "rw,memory", root="/docker/0123")
    assert memory.available_bytes() == 500_000


def test_groups_are_found_where_they_are_mounted(groups: Groups, tmp_path: Any) -> None:
    elsewhere = tmp_path / "my groups"
    groups.mine("0::/job")
    groups.mount(elsewhere, "cgroup2", "rw")
    (elsewhere / "job").mkdir(parents=True)
    (elsewhere / "job" / "memory.max").write_text("12345\n")
    assert memory.available_bytes() == 12345, "nothing says how much is taken"


@pytest.mark.parametrize(
    "line",
    [
        "0::/../../elsewhere",
        "0::",
        "4:memory",
        "nonsense",
        "0::/gone/since",
    ],
)
def test_a_group_that_cannot_be_found_is_looked_for_at_the_root(groups: Groups, line: str) -> None:
    groups.mine(line)
    groups.group("", memory__max=77_000, memory__current=0)
    assert memory.available_bytes() == 77_000


def test_files_that_say_nothing_are_no_limit(groups: Groups) -> None:
    groups.group("", memory__max="a lot", memory__current="?", memory__stat="inactive_file")
    assert memory.what_limits() == ""


@pytest.mark.parametrize(("name", "bound"), [("ulimit -v", "RLIMIT_AS"), ("ulimit -d", "RLIMIT_DATA")])
def test_a_bound_of_the_process_counts(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, name: str, bound: str
) -> None:
    info = namedtuple("Info", "rss vms data")
    bounds = {getattr(psutil, bound): (9_000_000, psutil.RLIM_INFINITY)}
    process = SimpleNamespace(
        memory_info=lambda: info(1, 4_000_000, 4_000_000),
        rlimit=lambda which: bounds.get(which, (psutil.RLIM_INFINITY,) * 2),
    )
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert memory.available_bytes() == 5_000_000
    assert memory.what_limits() == f" (a limit of this process: {name})"


def test_a_bound_that_the_system_keeps_is_the_one_that_is_seen() -> None:
    bound = 3 << 30
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2);"
    code += "from forcingkv.runtime.memory import available_bytes as a; print(a())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bound)], capture_output=True, text=True, check=True
    )
    assert 0.5 * bound < int(done.stdout) < bound
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "or the test says nothing"


@pytest.mark.parametrize(
    ("given", "megabytes"),
    [
        ({"SLURM_MEM_PER_NODE": "9000"}, 9000),
        ({"SLURM_MEM_PER_CPU": "1500", "SLURM_CPUS_ON_NODE": "4"}, 6000),
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "2"}, 1000),
        ({"SLURM_MEM_PER_CPU": "1500"}, None),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "much"}, None),
    ],
)
def test_what_slurm_gave_a_job_counts(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], megabytes: int | None
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    if megabytes is None:
        assert memory.available() == (10**12, None)
        return
    taken = megabytes * 2**20 - memory.available_bytes()
    assert 0.5 < taken / psutil.Process().memory_info().rss < 2
    assert "a limit of the SLURM job: SLURM_MEM_PER_" in memory.what_limits()


@pytest.mark.parametrize("library", [TypeError("Windows"), OSError("none"), SimpleNamespace()])
def test_a_system_without_malloc_trim_keeps_what_it_keeps(
    monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    def load(name: None) -> Any:
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    memory.give_back()
