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
AFTER_TORCH = "pip install torch, in the build for your device; then "
"""Plain `torch` brings CUDA's libraries with it, or has none: it is to be chosen first."""


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
    by: str | None = None
    """What runs it, with its version: `onnxruntime 1.32.0`."""
    why: str | None = None
    """Why it cannot run, or not on all that is there."""
    todo: str | None = None
    """What to install, or to choose."""
    broken: bool = False
    """Whether something is installed for it that does not work."""


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


def _unusable(machine: Machine, name: str, probe: str, subject: str, install: str, of: str) -> Verdict | None:
    """The verdict on a backend where what it runs with is not there, or does not load; None where it does.

    `of` is the package, whose version has to be one that will do.
    """
    asked = machine.asked[probe]
    if not asked.loads and asked.facts.get("installed") is False:
        return Verdict(name, False, why=f"{subject} is not installed", todo=install)
    if not asked.loads:
        again = install.replace("pip install", "pip install --force-reinstall")
        return Verdict(name, False, why=f"{subject} cannot be loaded", todo=again, broken=True)
    package = machine.packages.package(of) if machine.packages else None
    if package and package.installed and not package.fits:
        why = f"{package.told} is installed, and {package.wanted} is needed"
        return Verdict(name, False, why=why, todo=f"pip install '{of}{package.wanted}'", broken=True)
    return None


def _on_onnxruntime(name: str, machine: Machine) -> Verdict:
    facts = machine.asked["onnxruntime"].facts
    install = "pip install onnxruntime"
    refused = _unusable(machine, name, "onnxruntime", "ONNX Runtime", install, "onnxruntime")
    if refused:
        return refused
    by, listed = f"onnxruntime {facts.get('version')}", facts.get("providers") or ()
    chosen = CUDA if name != ON_THE_CPU and CUDA in listed else CPU
    if facts.get(f"starts {chosen}"):
        if chosen == CPU and machine.gpus and name != ON_THE_CPU:
            why, gpu = (
                "it is not built for the GPU",
                "pip uninstall onnxruntime, then pip install onnxruntime-gpu",
            )
            return Verdict(name, True, ("cpu",), by, why, gpu)
        return Verdict(name, True, ("cuda:0" if chosen == CUDA else "cpu",), by)
    if chosen == CPU:
        why, again = "it does not compute here", "pip install --force-reinstall onnxruntime"
        return Verdict(name, False, (), by, why, again, broken=True)
    why = f"it lists {CUDA}, which does not start" + (f": {machine.no_gpu}" if machine.no_gpu else "")
    todo = f"choose --backend {ON_THE_CPU}"
    todo += (
        "; for good: pip uninstall onnxruntime-gpu, then pip install onnxruntime"
        if machine.no_gpu
        else ", or install the versions of CUDA and cuDNN that this onnxruntime-gpu was built for"
    )
    return Verdict(name, False, (), by, why, todo, broken=True)


def _on_tensorrt(name: FlavourName, machine: Machine) -> Verdict:
    install = f"pip install 'forcingkv[{name}]'"
    gpu = machine.gpus[0] if machine.gpus else None
    if gpu is None:
        return Verdict(name, False, why=machine.no_gpu, todo="it needs an NVIDIA GPU with its driver")
    served = FLAVOURS[name].sms
    if served and gpu.sm not in served:
        why = f"it does not serve sm_{gpu.sm}"
        return Verdict(name, False, why=why, todo="pip install 'forcingkv[tensorrt]', for --backend tensorrt")
    for probe, subject in ((name, name), ("cuda", "cuda-core")):
        refused = _unusable(machine, name, probe, subject, install, subject)
        if refused:
            return refused
    by, sm = f"{name} {machine.asked[name].facts.get('version')}", machine.asked["cuda"].facts.get("sm")
    if sm is None:
        why, todo = (
            "cuda-core finds no GPU, though the driver has one",
            "pip install --upgrade 'cuda-core[cu13]'",
        )
        return Verdict(name, False, (), by, why, f"{todo}, or install a newer driver", broken=True)
    if gpu.free_bytes is None:
        why, todo = "GPU 0 cannot be used", "see whether nvidia-smi works"
        return Verdict(name, False, (), by, why, todo, broken=True)
    return Verdict(name, True, ("cuda:0",), by)


def _on_torch(name: str, machine: Machine) -> Verdict:
    refused = _unusable(
        machine, name, "torch", "torch", AFTER_TORCH + "pip install 'forcingkv[models]'", "torch"
    )
    if refused:
        return refused
    facts = machine.asked["torch"].facts
    by, devices = f"torch {facts.get('version')}", facts.get("devices") or ()
    on = tuple(device for device in devices if facts.get(f"computes {device}"))
    idle = [device for device in devices if device not in on]
    if idle:
        why = f"it sees {', '.join(idle)}, and does not compute there"
        todo = "install a torch that was built for this device and its driver"
        return Verdict(name, bool(on), on, by, why, todo, broken=True)
    if machine.gpus and not any(device.startswith("cuda") for device in on):
        built = ", ".join(facts.get("built_for") or ()) or "the CPU alone"
        why = f"it does not see the GPU: this torch was built for {built}"
        todo = f"install a torch that was built for CUDA, for {machine.gpus[0].name}"
        return Verdict(name, True, on, by, why, todo)
    return Verdict(name, bool(on), on, by)


NEEDS: dict[str, Callable[[Machine], Verdict]] = {
    "onnxruntime": partial(_on_onnxruntime, "onnxruntime"),
    ON_THE_CPU: partial(_on_onnxruntime, ON_THE_CPU),
    "tensorrt": partial(_on_tensorrt, "tensorrt"),
    "tensorrt-rtx": partial(_on_tensorrt, "tensorrt-rtx"),
    "torch": partial(_on_torch, "torch"),
}
"""Backend -> what it needs, as a verdict on a machine; more than `BACKENDS` has does no harm."""
