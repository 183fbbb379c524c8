"""What is wrong on a machine, worst first, and what to install next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forcingkv.doctor.packages import BASE, RIVALS
from forcingkv.doctor.verdicts import AFTER_TORCH
from forcingkv.runtime.backends import BACKENDS
from forcingkv.runtime.flavour import FLAVOURS
from forcingkv.runtime.footprint import readable

SCARCE = 1 << 30
"""Bytes of a disk below which its state is said to be wrong: the smallest model's weights are more."""


def faults(report: Mapping[str, Any], said: Sequence[str]) -> list[str]:
    """What is wrong, in sentences, worst first. `said` is what probes said."""
    return list(dict.fromkeys(_faults(report, said)))


def _faults(report: Mapping[str, Any], said: Sequence[str]) -> Iterator[str]:
    if not report["can_run"]:
        yield "no backend can run here"
    bundle = report["bundle"]
    if bundle:
        yield from ([bundle["refused"]] if bundle["refused"] else []) + bundle["faults"]
    yield from said
    for backend in report["backends"]:
        if backend["broken"]:
            can = f"runs on {', '.join(backend['on'])} alone" if backend["runs"] else "cannot run"
            yield f"the backend {backend['name']} {can}: {backend['why']}"
    for package in report["packages"] or ():
        together = [f"{name} {version}" for name, version in package["installed"]]
        if package["name"] in RIVALS and len(together) > 1:
            yield (
                f"{' and '.join(together)} are installed together, and write the same files: which of them"
                " is used is chance. Uninstall all of them, and install one"
            )
        elif together and not package["fits"] and _meant(package, report["packages"]):
            yield f"{', '.join(together)} is installed, and {package['wanted']} is needed"
    for place in report["places"]:
        if place["free_bytes"] is not None and place["free_bytes"] < SCARCE:
            yield f"{place['folder']} ({place['holds']}) has {readable(place['free_bytes'])} left"


def _meant(package: Mapping[str, Any], packages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a package is there for the project: of the base, or of an extra of which all else is there.

    What other programs brought (setuptools) may be of any version.
    """
    for by in package["needed_by"]:
        asked = [other for other in packages if by in other["needed_by"]]
        if by == BASE or all(other["installed"] for other in asked):
            return True
    return False


def next_steps(report: Mapping[str, Any]) -> list[str]:
    """What to install next, the most useful first; empty where nothing is missing."""
    return list(dict.fromkeys(_next_steps(report)))


def _next_steps(report: Mapping[str, Any]) -> Iterator[str]:
    missing = {extra["name"]: extra for extra in report["extras"] or () if extra["missing"]}
    if not report["can_run"]:
        for backend in report["backends"]:
            if backend["name"] in ("onnxruntime", "torch") and backend["todo"]:
                yield f"to run anything: {backend['todo']}"
    gpu = report["gpus"][0] if report["gpus"] else None
    if gpu:
        yield from _for_a_gpu(report, gpu)
    if report["extras"] is None:
        yield "pip install -e . in the folder of forcingkv: it is not installed, so its extras are not known"
    uses = {
        "video": "to write videos as .mp4",
        "hub": "to fetch weights by name",
        "analyze": "to measure heads",
        "export": "to export bundles",
        "text": "to encode prompts for models other than demo",
        "evaluate": "to measure fidelity",
    }
    for name, use in uses.items():
        if name in missing:
            torch = any(requirement.startswith("torch>") for requirement in missing[name]["missing"])
            yield f"{use}: {AFTER_TORCH if torch else ''}{missing[name]['install']}"


def _for_a_gpu(report: Mapping[str, Any], gpu: Mapping[str, Any]) -> Iterator[str]:
    """What makes use of an NVIDIA GPU that is there."""
    verdicts = {backend["name"]: backend for backend in report["backends"]}
    torch = verdicts.get("torch")
    if torch and not any(device.startswith("cuda") for device in torch["on"]):
        yield f"to generate on {gpu['name']} without engines: {torch['todo']}"
    flavours = [name for name in FLAVOURS if name in BACKENDS]
    if not any(verdicts[name]["runs"] for name in flavours):
        served = [name for name in flavours if not FLAVOURS[name].sms or gpu["sm"] in FLAVOURS[name].sms]
        # TensorRT-RTX first: it builds engines on any machine.
        for name in sorted(served, key=lambda name: not FLAVOURS[name].sms)[:1]:
            yield f"to run engines on {gpu['name']}: {verdicts[name]['todo']}"
