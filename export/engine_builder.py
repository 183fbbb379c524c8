"""TensorRT engines: for which GPUs they can be built, what is refused beforehand, and building them.

Each is built in a process of its own (`engine_child`), with static shapes from the cache plan. That process
has the library path that plugins need, contains aborts, gives all its memory back, and its memory is bounded
by the kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from forcingkv.export.attention import Attention, attentions_of
from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.reading import parse_json
from forcingkv.prune.launcher import check_candidates, kernel_sms
from forcingkv.runtime.engines import EngineRecord, KernelRecord, device_sm
from forcingkv.runtime.flavour import FLAVOURS, Flavour, FlavourName, require
from forcingkv.runtime.graph_tensors import Shape
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.profiles import MOST_PROFILES, of_unlike_phases, profiles_of
from forcingkv.runtime.memory import available_bytes
from forcingkv.runtime.spec import Dtype

CHILD = Path(__file__).with_name("engine_child.py")
MEMORY_SHARE = 0.9
"""Of the memory that is available, what a build may take."""

AMPERE = 80
"""The first compute capability with bfloat16."""

FUSED_KEYS = 65_504
"""Keys past which fused attention in float16 may overflow: float16's largest number."""

MAX_WIDTH = 256
"""The widest head whose rows the plugin's kernels hold without spilling."""


class EngineError(Exception):
    """TensorRT did not build an engine."""


@dataclass(frozen=True)
class EngineTarget:
    """What engines are to be built for."""

    flavour: Flavour
    sms: tuple[int, ...]
    aot: bool = False
    """Whether the plugin's kernels are compiled into the engines: a C++ program then runs them alone."""


def engine_target(name: FlavourName, sms: Sequence[int] = (), *, aot: bool = False) -> EngineTarget:
    """Check that engines can be built here for that flavour and those GPUs.

    `sms` are compute capabilities (89 for 8.9); none: that of this machine's GPU. Raises MissingExtraError
    where the flavour is not installed, InputError for a GPU that it does not build for, or that has to be
    there and is not.
    """
    flavour = FLAVOURS[name]
    if aot and flavour.sms:
        raise InputError(
            f"{name} has no plugins that are compiled into engines",
            where="--aot",
            expected="--target tensorrt",
            hint="Leave --aot out: its engines take the plugin from forcingkv when they are loaded.",
        )
    for sm in sms:
        if flavour.sms and sm not in flavour.sms:
            raise InputError(
                f"{name} builds no engines for sm_{sm}",
                where="--sm",
                expected=f"one of {', '.join(map(str, flavour.sms))}",
                hint="For other GPUs build with --target tensorrt, on a machine with that GPU.",
            )
    require(name)
    if sms and flavour.sms:
        return EngineTarget(flavour, tuple(dict.fromkeys(sms)), aot)
    here = device_sm()
    if not sms and here is None:
        hint = "Name the GPU to build for, such as --sm 89." if flavour.sms else "Export where the GPU is."
        raise InputError("no GPU was found to build for", where=f"--target {name}", hint=hint)
    if set(sms) - {here}:
        there = f"this machine's GPU is sm_{here}" if here else "no GPU was found"
        raise InputError(
            f"{name} builds for the GPU of the machine it runs on, and {there}",
            where=f"--sm {' '.join(map(str, sms))}",
            hint="Export on a machine with that GPU, or use --target tensorrt-rtx for the GPUs it builds for:"
            f" {', '.join(map(str, FLAVOURS['tensorrt-rtx'].sms))}.",
        )
    assert here is not None
    return EngineTarget(flavour, (here,), aot)


def check_dtype(target: EngineTarget, compute: Dtype) -> None:
    """Raises InputError for a GPU that does not know the dtype that the engines compute in."""
    old = [sm for sm in target.sms if sm < AMPERE]
    if old and compute == "bfloat16":
        raise InputError(
            f"does not know bfloat16, which came with sm_{AMPERE}",
            where=f"sm_{old[0]}",
            expected="--dtype float16 for it",
            hint="With a policy that retains no segments: the kernels that choose them need newer GPUs too.",
        )


def check_profiles(plan: CachePlan, target: EngineTarget) -> None:
    """Raise InputError for a plan whose phases TensorRT-RTX builds no profiles of (docs/decisions/0039)."""
    unlike = of_unlike_phases(plan) if target.flavour.name == "tensorrt-rtx" else None
    if unlike:
        raise InputError(
            f"lets phases {unlike[0]} to {unlike[-1]} of the cache share an optimization profile, of which an"
            f" engine has {MOST_PROFILES}, and TensorRT-RTX builds none for phases so unlike",
            where=f"the policy {plan.policy.name} with {plan.spec.name}",
            expected="a sink that is full after five chunks, or earlier",
            hint="Choose a policy with fewer sink frames, or --target onnx or torch.",
        )


def check_plugin(plan: CachePlan, target: EngineTarget) -> None:
    """Check that the plugin can serve a plan on the target's GPUs, and that its kernels can be compiled here.

    Raises MissingExtraError where Triton is not installed, InputError for more segments to choose from, or
    wider heads, than the kernels take, and for a GPU that they are not compiled for.
    """
    if plan.choice is None:
        return
    kernel_sms(target.sms)
    if find_spec("triton") is None:
        raise MissingExtraError("triton", "engines")
    check_candidates(plan.choice.candidates)
    if plan.spec.head_dim > MAX_WIDTH:
        raise InputError(
            f"has heads of width {plan.spec.head_dim}",
            where=plan.spec.name,
            expected=f"at most {MAX_WIDTH}, as a GPU has too few registers for more",
            hint="Use a policy that retains no segments, such as window.",
        )


def warnings_of(plan: CachePlan, compute: Dtype) -> list[str]:
    """Warnings about what may go wrong with engines of that plan."""
    keys = max(
        plan.chunk_tokens + sum(plan.tokens(group, role, phase.first_chunk) for role in group.roles)
        for phase in plan.phases
        for groups in plan.layers
        for group in groups
    )
    if compute == "float16" and keys > FUSED_KEYS:
        return [
            f"attention sees up to {keys} keys, and in float16 fused kernels can overflow past {FUSED_KEYS}:"
            " use bfloat16 (the default)"
        ]
    return []


def decomposed(engines: Sequence[EngineRecord]) -> list[str]:
    """Warnings about attention that no fused kernel serves."""
    return [
        f"{engine.flavour} has no fused kernel on sm_{engine.sm} for some attention in {engine.graph}, which"
        f" is slower and writes its scores to memory: {'; '.join(engine.decomposed)}"
        for engine in engines
        if engine.decomposed
    ]


def build_engine(
    graph: Path,
    name: str,
    plan: CachePlan,
    target: EngineTarget,
    sm: int,
    engine: Path,
    *,
    kernels: Sequence[KernelRecord] = (),
) -> EngineRecord:
    """Build the engine of a graph (an ONNX file) for the GPU `sm`, and write it to the file `engine`.

    The graph called `step` gets the profiles that the plan's phases have (`profiles_of`). `kernels` are those
    of the bundle that `graph` lies in: a builder that has a GPU may run the plugin. Raises EngineError where
    TensorRT refuses the graph, aborts, needs more memory than there is, or writes the scores of attention to
    memory that is too much. Nothing is left of the file then.
    """
    phases = [plan.phase_shapes(phase) for phase in plan.phases] if name == "step" else []
    profiles = profiles_of(plan) if name == "step" else ()
    prunes = name == "step" and plan.choice is not None
    plugins = ("compiled" if target.aot else "python") if prunes else None
    request: dict[str, Any] = {"plugins": plugins, "sm": sm, "engine": str(engine)}
    request["profiles"] = [profile.shapes for profile in profiles]
    if plugins == "python" and not target.flavour.sms:
        request["kernels"] = {"folder": str(graph.parent), "records": to_data(kernels)}
    try:
        report = run_child(graph, target.flavour, **request)
        if report.pop("decomposed"):
            report["decomposed"] = _judged(graph, phases, target.flavour, sm, report["activation_bytes"])
    except BaseException:
        engine.unlink(missing_ok=True)  # it is written as it is built
        raise
    return EngineRecord(
        graph=name,
        flavour=target.flavour.name,
        sm=sm,
        file=f"{engine.parent.name}/{engine.name}",
        phases=len(phases) or 1,
        profiles=tuple(profile.phases.start for profile in profiles) if len(profiles) < len(phases) else None,
        needs_plugin=prunes and not target.aot,
        **report,
    )


def _judged(
    graph: Path, phases: Sequence[Mapping[str, Shape]], flavour: Flavour, sm: int, activation_bytes: int
) -> tuple[str, ...]:
    """Which attention of a graph has no fused kernel, of which TensorRT said that there is some.

    Raises EngineError if the engine's activations are more than fused attention would need.
    """
    found = attentions_of(onnx.load(graph, load_external_data=False), phases)
    with tempfile.TemporaryDirectory() as place:
        alone = [Path(place, f"attention-{number}.onnx") for number in range(len(found.nodes))]
        for attention, path in zip(found.nodes, alone, strict=True):
            attention.write(path)
        report = run_child(graph, flavour, sm=sm, probes=list(map(str, alone)))
    every = list(found.nodes)
    refused: list[Attention] = [every[place] for place in report["refused"]]
    named = tuple(f"{attention} (layer {found.nodes[attention][0]})" for attention in refused)
    named = named or ("an attention that has one when it is alone",)
    if activation_bytes <= found.activation_bound:
        return named
    more = f", and {len(named) - 3} more" if len(named) > 3 else ""
    largest = max((attention.scores_bytes for attention in refused), default=0)
    raise EngineError(
        f"{flavour.name} has no fused kernel on sm_{sm} for {'; '.join(named[:3])}{more}, and would write the"
        f" scores of queries and keys to memory, up to {largest / 1e9:.3f} GB at once: the engine of"
        f" {graph.name} needs {activation_bytes / 1e9:.3f} GB of activations, where fused attention needs at"
        f" most {found.activation_bound / 1e9:.3f} GB. No bundle was written.\n"
        "  Another --resolution, --policy or --dtype gives other shapes; a newer TensorRT may have kernels"
        " for these."
    )


def run_child(graph: Path, flavour: Flavour, **more: Any) -> dict[str, Any]:
    """Run `engine_child` on a graph and return its report; `more` of its request, see `engine_child.build`.

    Raises EngineError where it fails, OSError where the engine cannot be written.
    """
    request = {"memory_limit": int(available_bytes() * MEMORY_SHARE), "graph": str(graph)}
    request |= {"flavour": flavour.name} | more
    with tempfile.TemporaryDirectory() as links:
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=_environment(flavour, Path(links)),
            check=False,
        )
    if done.returncode:
        raise EngineError(_fault(done, request))
    report: dict[str, Any] = parse_json(done.stdout, "the report of the build")
    if "errno" in report:
        raise OSError(report["errno"], report["strerror"], request["engine"])
    return report


def _environment(flavour: Flavour, links: Path) -> dict[str, str]:
    """The child's environment: it finds forcingkv as this process does, and TensorRT's library by the
    name under which the parser opens it for plugins, which the wheel lacks."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    place = find_spec(flavour.libraries)
    if place is None:  # installed by other means than pip: they lie where the system looks for libraries
        return environment
    for folder in place.submodule_search_locations or ():
        # The shortest first: of libx.so.1 and libx.so.1.2 it is the name that programs are linked with.
        for library in sorted(Path(folder).glob("lib*.so.*"), key=lambda path: (len(path.name), path.name)):
            link = links / f"{library.name.split('.so')[0]}.so"
            if not link.is_symlink():
                link.symlink_to(library)
    paths = [str(links), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _fault(done: subprocess.CompletedProcess[str], request: dict[str, Any]) -> str:
    """What went wrong, as the log has it."""
    errors = [line[4:] for line in done.stderr.splitlines() if line.startswith("[E] ")]
    if not errors:
        errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("[I]")]
    how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
    lines = "\n  ".join(line[:500] for line in errors[-5:]) or "it reported nothing"
    return (
        f"{request['flavour']} {how} on {Path(request['graph']).name}"
        f" (memory bound {request['memory_limit'] / 1e9:.1f} GB):\n  {lines}"
    )
