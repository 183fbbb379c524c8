"""Which backends run on which machine, why not, and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forcingkv.doctor import verdicts
from forcingkv.doctor.advice import faults
from forcingkv.doctor.asking import Asked
from forcingkv.doctor.packages import Inventory, Package
from forcingkv.doctor.verdicts import NEEDS, Gpu, Machine, Verdict, judge
from forcingkv.runtime.backends import BACKENDS

H200 = Gpu("NVIDIA H200", 90, 150 * 10**9, 149 * 10**9)
L4 = Gpu("NVIDIA L4", 89, 24 * 10**9, 23 * 10**9)
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def library(version: str | None = "1.0", **facts: Any) -> Asked:
    return Asked({"installed": True, "loads": None, "version": version} | facts)


ABSENT, BROKEN = Asked({"installed": False}), Asked({"installed": True}, ["it crashed"])
ORT = library("1.32.0", providers=[CPU], **{f"starts {CPU}": True})
ORT_CUDA = library("1.32.0", providers=[CUDA, CPU], **{f"starts {CUDA}": False, f"starts {CPU}": True})
ORT_GPU = library("1.32.0", providers=[CUDA, CPU], **{f"starts {CUDA}": True, f"starts {CPU}": True})


def machine(*gpus: Gpu, packages: Inventory | None = None, **asked: Asked) -> Machine:
    names = ("onnxruntime", "torch", "cuda", "tensorrt", "tensorrt-rtx")
    found = {name: asked.get(name.replace("-", "_"), ABSENT) for name in names}
    return Machine(found, gpus, "" if gpus else "there is no NVIDIA driver", packages)


def on(name: str, of: Machine) -> Verdict:
    return NEEDS[name](of)


def test_every_backend_is_judged() -> None:
    assert NEEDS.keys() == BACKENDS.keys()
    assert [verdict.name for verdict in judge(machine(onnxruntime=ORT))] == list(BACKENDS)
    assert all(NEEDS[name](machine()).name == name for name in NEEDS)


def test_onnxruntime_on_a_cpu() -> None:
    for name in ("onnxruntime", "onnxruntime-cpu"):
        assert on(name, machine(onnxruntime=ORT)) == Verdict(name, True, ("cpu",), "onnxruntime 1.32.0")


def test_onnxruntime_that_lists_cuda_without_a_gpu() -> None:
    there = machine(onnxruntime=ORT_CUDA)
    refused = on("onnxruntime", there)
    assert (refused.runs, refused.broken) == (False, True)
    assert refused.why == f"it lists {CUDA}, which does not start: there is no NVIDIA driver"
    assert refused.todo is not None
    assert refused.todo.startswith(
        "choose --backend onnxruntime-cpu; for good: pip uninstall onnxruntime-gpu"
    )
    assert on("onnxruntime-cpu", there).runs


def test_onnxruntime_with_a_gpu() -> None:
    assert on("onnxruntime", machine(L4, onnxruntime=ORT_GPU)).on == ("cuda:0",)
    assert on("onnxruntime-cpu", machine(L4, onnxruntime=ORT_GPU)).on == ("cpu",)
    idle = on("onnxruntime", machine(L4, onnxruntime=ORT))
    assert (idle.on, idle.why, idle.broken) == (("cpu",), "it is not built for the GPU", False)
    assert "CUDA and cuDNN" in str(on("onnxruntime", machine(L4, onnxruntime=ORT_CUDA)).todo)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-cpu", "torch"])
def test_what_is_not_there_and_what_is_broken(name: str) -> None:
    absent = on(name, machine())
    assert (absent.runs, absent.broken, str(absent.why)[-16:]) == (False, False, "is not installed")
    broken = on(name, machine(onnxruntime=BROKEN, torch=BROKEN))
    assert (broken.runs, broken.broken, str(broken.why)[-16:]) == (False, True, "cannot be loaded")
    assert "pip install" in str(absent.todo)
    assert "--force-reinstall" in str(broken.todo)


def test_versions_that_will_not_do() -> None:
    old = Inventory(
        "0.1.0", (Package("onnxruntime", ">=1.24.1", (("onnxruntime", "1.20.0"),), ("base",), False),), ()
    )
    refused = on("onnxruntime-cpu", machine(onnxruntime=ORT, packages=old))
    assert refused.why == "onnxruntime 1.20.0 is installed, and >=1.24.1 is needed"
    assert refused.todo == "pip install 'onnxruntime>=1.24.1'"


def test_tensorrt() -> None:
    both: dict[str, Asked] = {"tensorrt": library("10.15"), "tensorrt_rtx": library("1.7.1")}
    ready = machine(L4, cuda=library(sm=89), **both)
    for name, version in (("tensorrt", "10.15"), ("tensorrt-rtx", "1.7.1")):
        assert on(name, ready) == Verdict(name, True, ("cuda:0",), f"{name} {version}")
        assert on(name, machine(**both)).why == "there is no NVIDIA driver"
        no_core = on(name, machine(L4, **both))
        assert (no_core.why, no_core.todo) == (
            "cuda-core is not installed",
            f"pip install 'forcingkv[{name}]'",
        )
        assert on(name, machine(L4, cuda=BROKEN, **both)).why == "cuda-core cannot be loaded"
        assert on(name, machine(L4, cuda=library(sm=None), **both)).broken
        assert (
            on(name, machine(replace(L4, free_bytes=None), cuda=library(sm=89), **both)).why
            == "GPU 0 cannot be used"
        )
    large = machine(H200, cuda=library(sm=90), **both)
    assert on("tensorrt", large).runs
    assert on("tensorrt-rtx", large).why == "it does not serve sm_90"


def test_torch() -> None:
    cpu = library("2.13.0", devices=["cpu"], built_for=[], **{"computes cpu": True})
    assert on("torch", machine(torch=cpu)) == Verdict("torch", True, ("cpu",), "torch 2.13.0")
    idle = on("torch", machine(H200, torch=cpu))
    assert idle.why == "it does not see the GPU: this torch was built for the CPU alone"
    assert idle.todo == "install a torch that was built for CUDA, for NVIDIA H200"
    devices = {"devices": ["cpu", "cuda:0", "cuda:1"], "computes cpu": True, "computes cuda:0": True}
    partly = on("torch", machine(H200, torch=library("2.13.0", **devices)))
    assert (partly.on, partly.broken) == (("cpu", "cuda:0"), True)
    assert partly.why == "it sees cuda:1, and does not compute there"
    apple = library("2.13.0", devices=["cpu", "mps"], **{"computes cpu": True, "computes mps": True})
    assert on("torch", machine(torch=apple)).on == ("cpu", "mps")


def test_the_names_are_those_of_onnxruntime() -> None:
    import onnxruntime

    assert {verdicts.CPU, verdicts.CUDA} <= set(onnxruntime.get_all_providers())


def test_a_package_that_something_else_brought_may_be_old() -> None:
    def package(name: str, *by: str, version: str | None = None, fits: bool = False) -> dict[str, Any]:
        installed = [(name, version)] if version else []
        return {"name": name, "wanted": ">=9", "installed": installed, "needed_by": by, "fits": fits}

    def told(*packages: dict[str, Any]) -> list[str]:
        report = {"can_run": True, "bundle": None, "backends": [], "places": [], "packages": packages}
        return faults(report, [])

    old = package("setuptools", "dev", version="1")
    assert told(old, package("ruff", "dev")) == []
    wrong = ["setuptools 1 is installed, and >=9 is needed"]
    assert told(old, package("ruff", "dev", version="9", fits=True)) == wrong
    assert told(package("setuptools", "base", version="1"), package("ruff", "base")) == wrong
    (both,) = told(
        package("onnxruntime", "base", version="9", fits=True) | {"installed": [("a", "1"), ("b", "2")]}
    )
    assert both.startswith("a 1 and b 2 are installed together, and write the same files")
