"""The report for people: aligned, at most 100 columns, worst first."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forcingkv.doctor.packages import BASE
from forcingkv.headmaps.plain import plain
from forcingkv.runtime.footprint import readable

WIDTH = 100
LEFT = 18
"""Columns of what a line is about."""
TOGETHER = "\u00a0"
"""Stands for a space at which no line ends."""
NO_BFLOAT16 = (
    "bfloat16: no instructions for it (avx512_bf16, amx): products are slower than in float32 (measured on"
    " such a CPU: 21 against 150 GFLOP/s)"
)
BFLOAT16 = {
    True: "bfloat16: has instructions for it",
    False: NO_BFLOAT16,
    None: "bfloat16: not known without torch",
}


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """All lines of a report."""
    for number, (title, section) in enumerate(_sections(report)):
        yield from ([""] if number else []) + [title]
        yield from section


def _sections(report: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    python = report["python"]
    where = f"Python {python['version']}, {python['system']} {python['architecture']}"
    if report["faults"]:
        yield "wrong", [line for fault in report["faults"] for line in _beside("  - ", fault)]
    if report["bundle"]:
        yield f"bundle {plain(report['bundle']['path'])}", list(_bundle(report["bundle"]))
    yield f"backends of forcingkv {report['forcingkv']} ({where})", list(_backends(report["backends"]))
    yield "GPUs of NVIDIA", list(_gpus(report))
    yield "processor and memory", list(_machine(report))
    yield "libraries", list(_libraries(report["libraries"]))
    if report["extras"] is not None:
        yield "extras, and what is installed of them", list(_extras(report["extras"], report["packages"]))
    yield "folders", list(_places(report["places"]))
    steps = report["next"] or ["nothing: all that this machine can use is installed"]
    yield (
        "to install next",
        [line for number, step in enumerate(steps, 1) for line in _beside(f"  {number}. ", step)],
    )


def _backends(backends: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for backend in sorted(backends, key=lambda one: not one["runs"]):
        told = f"on {', '.join(backend['on'])}, by {backend['by']}" if backend["runs"] else ""
        told += "; " if told and backend["why"] else ""
        told += backend["why"] or ""
        yield from _row(backend["name"], f"{'yes' if backend['runs'] else 'no':<5}{told}", 5)
        if backend["todo"]:
            yield from _row("", f"{'':<5}-> {backend['todo']}", 8)


def _bundle(bundle: Mapping[str, Any]) -> Iterator[str]:
    if bundle["refused"] or "model" not in bundle:
        yield from _beside("  ", "cannot be opened: see above")
        return
    made = f"{bundle['model']} at {bundle['resolution']}, {bundle['policy']}, computes in {bundle['compute']}"
    yield from _row("holds", made)
    yield from _row("engines", "; ".join(bundle["engines"]) or "none")
    for one in sorted(bundle["backends"], key=lambda one: not one["fits"]):
        told = one["why"] or (
            f"a session needs about {readable(one['needed_bytes'])}"
            + (f" of {readable(one['available_bytes'])} available" if one["available_bytes"] else "")
        )
        device = f" {one['device']}" if one["name"] == "torch" else ""
        yield from _row(one["name"] + device, f"{'fits' if one['fits'] else 'no':<5}{told}", 5)


def _gpus(report: Mapping[str, Any]) -> Iterator[str]:
    driver = report["driver"]
    if driver["no_gpu"]:
        yield from _row("none", driver["no_gpu"])
    if driver["version"] or driver["cuda"]:
        yield from _row(
            "driver", f"{driver['version'] or 'version not known'}, for CUDA {driver['cuda'] or 'not known'}"
        )
    for gpu in report["gpus"]:
        free = "free: not known" if gpu["free_bytes"] is None else f"{readable(gpu['free_bytes'])} free"
        told = f"{gpu['name']}, sm_{gpu['sm']}, {readable(gpu['total_bytes'])} of memory, {free}"
        yield from _row(f"GPU {gpu['index']}", told)


def _machine(report: Mapping[str, Any]) -> Iterator[str]:
    processor, threads, memory = report["processor"], report["threads"], report["memory"]
    yield from _row("processor", processor["name"] or "not known")
    yield from _row("", BFLOAT16[processor["bfloat16"]])
    if threads:
        because = f"{threads['because']}; the machine has {threads['cpus_of_machine']} CPUs"
        yield from _row("threads", f"{threads['number']} ({because})")
    if memory:
        limit = f", by {memory['limit']}" if memory["limit"] else ""
        told = f"{readable(memory['available_bytes'])} of {readable(memory['total_bytes'])} available{limit}"
        yield from _row("memory", told)
    groups = report["control_groups"] or {"memory": [], "cpus": []}
    for limit in groups["memory"]:
        yield from _row("control group", f"{readable(limit['left_bytes'])} left: {limit['file']}")
    for limit in groups["cpus"]:
        yield from _row("control group", f"{limit['cpus']} CPUs: {limit['file']}")


def _libraries(libraries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, facts in libraries.items():
        if not facts["loads"]:
            told = "not installed" if facts["installed"] is False else "cannot be loaded"
        else:
            told = f"{facts.get('version') or 'version not known'}{_more(facts)}"
        yield from _row({"hub": "huggingface_hub", "cuda": "cuda-core"}.get(name, name), told)


def _more(facts: Mapping[str, Any]) -> str:
    """What a library told beyond its version."""
    more = []
    if "providers" in facts:
        more.append(f"providers: {', '.join(facts['providers'])}")
    if "built_for" in facts:
        more.append(f"built for {', '.join(facts['built_for']) or 'the CPU alone'}")
    if "devices" in facts:
        gpus = {device: facts.get(f"gpu {device}") for device in facts["devices"]}
        told = [
            f"{device} ({gpu['name']}, {readable(gpu['total_bytes'])})" if gpu else device
            for device, gpu in gpus.items()
        ]
        more.append(f"devices: {', '.join(told)}")
    if facts.get("bindings"):
        more.append(f"cuda-bindings {facts['bindings']}")
    return "".join(f"; {one}" for one in more)


def _extras(extras: Sequence[Mapping[str, Any]], packages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    lacking = {extra["name"] for extra in extras if extra["missing"]}
    base = {"name": BASE, "serves": "running bundles on a CPU", "missing": _missing_of_base(packages)}
    for extra in (base, *sorted(extras, key=lambda one: bool(one["missing"]))):
        yield from _row(extra["name"], f"{'no' if extra['missing'] else 'yes':<5}{extra['serves']}", 5)
        there = [one for one in packages if extra["name"] in one["needed_by"] and one["installed"]]
        if there:
            yield from _row("", f"{'':<5}{', '.join(map(_installed, there))}", 5)
        if extra["missing"]:
            own = [one for one in extra["missing"] if not _of_another(one, extra, packages)]
            others = [f"what {name} lacks" for name in extra.get("consists_of", ()) if name in lacking]
            yield from _row("", f"{'':<5}missing: {', '.join([*own, *others])}", 14)


def _of_another(requirement: str, extra: Mapping[str, Any], packages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a requirement is that of an extra that this one consists of."""
    name = re.split(r"[^\w.-]", requirement)[0]
    return not any(p["name"] == name and extra["name"] in p["needed_by"] for p in packages)


def _missing_of_base(packages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [p["name"] + p["wanted"] for p in packages if BASE in p["needed_by"] and not p["fits"]]


def _installed(package: Mapping[str, Any]) -> str:
    """Name and version of what is installed of a package, its own before another in its place."""
    own = [pair for pair in package["installed"] if pair[0] == package["name"]]
    return TOGETHER.join((own or package["installed"])[0])


def _places(places: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for place in places:
        room = "room not known" if place["free_bytes"] is None else f"{readable(place['free_bytes'])} free"
        can = "can be written" if place["writes"] else "CANNOT be written"
        yield from _row(place["holds"], f"{place['folder']}: {room}, {can}", left=22)


def _row(name: str, told: str, inner: int = 0, left: int = LEFT) -> list[str]:
    """A line that begins with a name; those that follow begin `inner` columns after the text."""
    first = f"  {name:<{left}}"
    return _wrapped(first, told, " " * (left + 2 + inner))


def _beside(first: str, told: str) -> list[str]:
    return _wrapped(first, told, " " * len(first))


def _wrapped(first: str, told: str, rest: str) -> list[str]:
    options: dict[str, Any] = {"break_on_hyphens": False, "replace_whitespace": False}
    found = textwrap.wrap(plain(told), WIDTH, initial_indent=first, subsequent_indent=rest, **options)
    return [line.replace(TOGETHER, " ") for line in found]
