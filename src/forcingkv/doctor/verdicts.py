"""Which backends can run here and, of one that cannot, why and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from forcingkv.doctor.asking import Asked
from forcingkv.doctor.packages import Inventory
from forcingkv.doctor.probes import CPU
from forcingkv.runtime.backends import BACKENDS
from forcingkv.runtime.flavour import FLAVOURS, FlavourName

CUDA = "CUDAExecutionProvider"
ON_THE_CPU = "onnxruntime-cpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVIDIA's driver tells of it."""

    name: str
    sm: int
    """Compute capability: 89 for 8.9."""
    total_bytes: int
    free_bytes: int | None
    """None: it could not be asked, so nothing can run on it."""


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a backend."""

    name: str
    runs: bool
    on: tuple[str, ...] = ()
    """What it runs on: `cpu`, `cuda:0`, ..."""
    with_version: str | None = None
    why: str | None = None
    """Why it cannot run, or not on all that is there."""
    todo: str | None = None
    """What to install, or to choose."""


@dataclass(frozen=True)
class Machine:
    """What was asked, as far as backends depend on it."""

    asked: Mapping[str, Asked]
    gpus: tuple[Gpu, ...]
    no_gpu: str
    """Why there is none, in words; empty where there is one."""
    packages: Inventory | None


def judge(machine: Machine) -> list[Verdict]:
    """A verdict on each backend, in the order of `BACKENDS`."""
    return [NEEDS[name](machine) for name in BACKENDS if name in NEEDS]


def _unusable(
    machine: Machine, probe: str, subject: str, install: str, of: str | None = None
) -> Verdict | None:
    """The verdict where what a backend runs with is not there, or does not load; None where it does.

    `of` is the package, whose version has to be one that will do.
    """
    asked = machine.asked[probe]
    if not asked.loads:
        absent = f"{subject} is not installed"
        why = (
            absent
            if asked.facts.get("installed") is False
            else f"{subject} is installed, and cannot be loaded"
        )
        again = install.replace("pip install", "pip install --force-reinstall")
        return Verdict("", False, why=why, todo=install if why == absent else again)
    package = machine.packages.package(of) if machine.packages and of else None
    if package and package.installed and not package.fits:
        why = f"{subject} {package.told} is installed, and {package.wanted} is needed"
        return Verdict("", False, why=why, todo=f"pip install '{of}{package.wanted}'")
    return None


def _named(name: str, verdict: Verdict) -> Verdict:
    return Verdict(**(vars(verdict) | {"name": name}))


def _on_onnxruntime(name: str, machine: Machine) -> Verdict:
    facts = machine.asked["onnxruntime"].facts
    refused = _unusable(machine, "onnxruntime", "ONNX Runtime", "pip install onnxruntime", "onnxruntime")
    if refused:
        return _named(name, refused)
    version, listed = facts.get("version"), facts.get("providers") or ()
    provider = CUDA if name != ON_THE_CPU and CUDA in listed else CPU
    if facts.get(f"starts {provider}"):
        return Verdict(name, True, ("cuda:0" if provider == CUDA else "cpu",), version)
    if provider == CPU:
        return Verdict(
            name, False, (), version, "it does not compute x + x", "pip install --force-reinstall onnxruntime"
        )
    why = f"it lists {CUDA}, which does not start" + (f": {machine.no_gpu}" if machine.no_gpu else "")
    todo = f"choose --backend {ON_THE_CPU}"
    todo += (
        "; without a GPU: pip uninstall onnxruntime-gpu, then pip install onnxruntime"
        if machine.no_gpu
        else ", or install the versions of CUDA and cuDNN that this onnxruntime-gpu was built for"
    )
    return Verdict(name, False, (), version, why, todo)


def _on_tensorrt(name: FlavourName, machine: Machine) -> Verdict:
    install = f"pip install 'forcingkv[{name}]'"
    gpu = machine.gpus[0] if machine.gpus else None
    if gpu is None:
        return Verdict(
            name, False, why=machine.no_gpu, todo="a machine with an NVIDIA GPU, or another backend"
        )
    served = FLAVOURS[name].sms
    if served and gpu.sm not in served:
        why = f"it does not serve sm_{gpu.sm}"
        return Verdict(name, False, why=why, todo="pip install 'forcingkv[tensorrt]', for --backend tensorrt")
    for probe, subject, of in ((name, name, name), ("cuda", "cuda-core", "cuda-core")):
        refused = _unusable(machine, probe, subject, install, of)
        if refused:
            return _named(name, refused)
    version, sm = machine.asked[name].facts.get("version"), machine.asked["cuda"].facts.get("sm")
    if sm is None:
        why = "cuda-core finds no GPU, though the driver has one"
        return Verdict(
            name, False, (), version, why, "pip install --upgrade 'cuda-core[cu13]', or a newer driver"
        )
    if gpu.free_bytes is None:
        return Verdict(name, False, (), version, "GPU 0 cannot be used", "see whether nvidia-smi works")
    return Verdict(name, True, ("cuda:0",), version)


def _on_torch(name: str, machine: Machine) -> Verdict:
    asked = machine.asked["torch"]
    install = "pip install torch, in the build for your device; then pip install 'forcingkv[models]'"
    refused = _unusable(machine, "torch", "torch", install, "torch")
    if refused:
        return _named(name, refused)
    facts = asked.facts
    version, devices = facts.get("version"), facts.get("devices") or ()
    on = tuple(device for device in devices if facts.get(f"computes {device}"))
    idle = [device for device in devices if device not in on]
    why = todo = None
    if idle:
        why = f"it sees {', '.join(idle)}, and does not compute there"
        todo = "install a torch that was built for this device and its driver"
    elif machine.gpus and not any(device.startswith("cuda") for device in on):
        built = ", ".join(facts.get("built_for") or ()) or "the CPU alone"
        why = f"it does not see the GPU: this torch was built for {built}"
        todo = f"install a torch that was built for CUDA, for {machine.gpus[0].name}"
    return Verdict(name, bool(on), on, version, why, todo)


NEEDS: dict[str, Callable[[Machine], Verdict]] = {
    "onnxruntime": partial(_on_onnxruntime, "onnxruntime"),
    ON_THE_CPU: partial(_on_onnxruntime, ON_THE_CPU),
    "tensorrt": partial(_on_tensorrt, "tensorrt"),
    "tensorrt-rtx": partial(_on_tensorrt, "tensorrt-rtx"),
    "torch": partial(_on_torch, "torch"),
}
"""Backend -> what it needs, as a verdict on a machine; more than `BACKENDS` has does no harm."""
