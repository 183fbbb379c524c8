"""All that is asked of a machine, put together: the report of `forcingkv doctor --json` (docs/doctor.md)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

import forcingkv
from forcingkv.doctor.advice import faults, next_steps
from forcingkv.doctor.asking import Asked, Probe, ask
from forcingkv.doctor.child import in_words
from forcingkv.doctor.packages import Inventory, inventory
from forcingkv.doctor.verdicts import Gpu, Machine, judge
from forcingkv.runtime.cache_folder import cache_folder
from forcingkv.runtime.control_groups import cpu_limits, memory_limits
from forcingkv.runtime.flavour import FLAVOURS
from forcingkv.runtime.memory import available
from forcingkv.runtime.processor import processor_name
from forcingkv.runtime.threads import cpu_threads

T = TypeVar("T")

SCHEMA = "forcingkv.doctor/1"
QUICK = 30.0
"""Seconds for what loads nothing large: the driver, a folder."""
SLOW = 600.0
"""Seconds for a bundle, of which every file is read."""
LIBRARIES: dict[str, Probe] = {
    "onnxruntime": Probe("onnxruntime", "ONNX Runtime"),
    "torch": Probe("torch", "torch"),
    "cuda": Probe("cuda", "cuda-core"),
    **{str(name): Probe("module", name, (flavour.module,)) for name, flavour in FLAVOURS.items()},
    "hub": Probe("hub", "huggingface_hub"),
}


@dataclass
class _Looking:
    """Looks at one thing after another: what cannot be looked at is a sentence, and the rest goes on."""

    faults: list[str] = field(default_factory=list)

    def at(self, subject: str, work: Callable[[], T]) -> T | None:
        """What `work` gives; None if it fails, which is then told."""
        try:
            return work()
        except Exception as error:  # a system without /proc, metadata that is half there
            self.faults.append(f"{subject} could not be looked at: {in_words(error)}")
            return None


def examine(bundle: Path | None = None) -> dict[str, Any]:
    """The report on this machine and, if one is given, on a bundle here (docs/doctor.md has its fields).

    Takes as long as the slowest library takes to load; at most some minutes, if one does not answer.
    """
    looking = _Looking()
    # The driver by itself: others take memory of the GPU while they are asked.
    asked = ask({"driver": Probe("driver", "the NVIDIA driver", seconds=QUICK)})
    own_cache = looking.at("the folder for caches", cache_folder)
    places = {"cache": Probe("place", "the cache", (str(own_cache),), QUICK)} if own_cache else {}
    asked |= ask(LIBRARIES | places)
    gpus, no_gpu = _gpus(asked["driver"])
    packages = looking.at("the list of packages", _inventory)
    machine = Machine(asked, gpus, no_gpu, packages)
    verdicts = judge(machine)
    of_bundle = _bundle(bundle, machine) if bundle else None
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "forcingkv": forcingkv.__version__,
        "can_run": any(verdict.runs for verdict in verdicts),
        "faults": [],
        "backends": [asdict(verdict) for verdict in verdicts],
        "gpus": [{"index": index, **asdict(gpu)} for index, gpu in enumerate(gpus)],
        "driver": {
            "version": asked["driver"].facts.get("driver"),
            "cuda": asked["driver"].facts.get("cuda"),
            "no_gpu": no_gpu or None,
        },
        "libraries": {name: _library(asked[name]) for name in LIBRARIES},
        "processor": {
            "name": looking.at("the processor", processor_name),
            "bfloat16": asked["torch"].facts.get("bfloat16"),
        },
        "threads": looking.at("the number of threads", _threads),
        "memory": looking.at("the memory", _memory),
        "control_groups": looking.at("control groups", _control_groups),
        "python": _python(),
        "packages": [asdict(package) for package in packages.packages] if packages else None,
        "extras": [asdict(e) | {"install": e.install} for e in packages.extras] if packages else None,
        "places": _places(asked, own_cache),
        "bundle": of_bundle,
    }
    said = [fault for one in asked.values() for fault in one.faults] + looking.faults
    report["faults"] = faults(report, said)
    report["next"] = next_steps(report)
    return report


def _gpus(driver: Asked) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs of NVIDIA's, and why there is none."""
    facts, found = driver.facts, []
    for index in range(facts.get("gpus") or 0):
        told = facts.get(f"gpu {index}")
        if not told:
            break  # those that follow would be taken for it
        found.append(Gpu(told["name"], told["sm"], told["total_bytes"], facts.get(f"free {index}")))
    if found:
        return tuple(found), ""
    if driver.faults:
        return (), "the NVIDIA driver does not answer"
    if not facts.get("library"):
        return (), "there is no NVIDIA driver"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (), "the driver shows no GPU" + (
        f" (CUDA_VISIBLE_DEVICES is {hidden!r})" if hidden is not None else ""
    )


def _library(asked: Asked) -> dict[str, Any]:
    """What a library told: `installed`, `loads`, and all else by its name."""
    return {"installed": asked.facts.get("installed"), "loads": asked.loads} | {
        name: value for name, value in asked.facts.items() if name not in ("installed", "loads")
    }


def _inventory() -> Inventory | None:
    try:
        return inventory()
    except importlib.metadata.PackageNotFoundError:
        return None  # run from its folder: there are no extras to be listed


def _threads() -> dict[str, Any]:
    chosen = cpu_threads()
    cpus = psutil.cpu_count()
    return {"number": chosen.number, "because": chosen.because, "cpus_of_machine": cpus}


def _memory() -> dict[str, Any]:
    least = available()
    total = int(psutil.virtual_memory().total)
    return {"total_bytes": total, "available_bytes": least.bytes, "limit": least.limit}


def _control_groups() -> dict[str, Any]:
    """Limits below what the machine has; where there is none, version 1 names a number all the same."""
    most, cpus = int(psutil.virtual_memory().total), psutil.cpu_count() or 1
    memory = [{"left_bytes": left, "file": str(file)} for left, file in memory_limits() if left < most]
    quotas = [{"cpus": number, "file": str(file)} for number, file in cpu_limits() if number < cpus]
    return {"memory": memory, "cpus": quotas}


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "virtual_environment": sys.prefix if sys.prefix != sys.base_prefix else None,
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
    }


def _places(asked: Mapping[str, Asked], own: Path | None) -> list[dict[str, Any]]:
    """The folders that hold what was fetched or made and can be had again."""
    found = [("caches of forcingkv", str(own), asked["cache"])] if own else []
    hub = asked["hub"]
    if hub.facts.get("folder"):
        found.append(("files from the hub", hub.facts["folder"], hub))
    return [
        {
            "holds": what,
            "folder": folder,
            "nearest": one.facts.get("nearest"),
            "free_bytes": one.facts.get("free_bytes"),
            "writes": bool(one.facts.get("writes")),
        }
        for what, folder, one in found
    ]


def _bundle(path: Path, machine: Machine) -> dict[str, Any]:
    """What of a bundle can run here."""
    gpu = machine.gpus[0] if machine.gpus else None
    torch = machine.asked["torch"].facts
    versions = {name: machine.asked[name].facts.get("version") for name in FLAVOURS}
    arguments = (
        os.path.abspath(path),
        str(gpu.sm) if gpu else "",
        str(gpu.free_bytes) if gpu and gpu.free_bytes is not None else "",
        *(f"{name}={version}" for name, version in versions.items() if version),
        *(f"torch={device}" for device in torch.get("devices") or () if torch.get(f"computes {device}")),
    )
    probe = Probe("bundle", f"the bundle {path}", arguments, SLOW)
    asked = ask({"bundle": probe})["bundle"]
    facts = asked.facts
    judged = [
        {"name": name.split()[1], "device": name.partition(" on ")[2], **value}
        for name, value in facts.items()
        if name.startswith("runs ") and value
    ]
    return {
        "path": str(path),
        "refused": facts.get("refused"),
        "faults": asked.faults,
        **(facts.get("about") or {}),
        "backends": judged,
    }
