"""What engines are built for, and what can be said of it before anything is made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.prune.launcher import check_candidates
from forcingkv.runtime.engines import device_sm
from forcingkv.runtime.flavour import FLAVOURS, Flavour, FlavourName, require
from forcingkv.runtime.plan import CachePlan
from forcingkv.runtime.spec import Dtype

FUSED_KEYS = 65_504
"""Keys past which fused attention in float16 may overflow: float16's largest number."""

MAX_WIDTH = 256
"""The widest head whose rows the plugin's kernels hold without spilling."""


@dataclass(frozen=True)
class EngineTarget:
    """For what to build."""

    flavour: Flavour
    sms: tuple[int, ...]
    aot: bool = False
    """Whether the plugin's kernels are compiled into the engines: a C++ program then runs them alone."""


def engine_target(name: FlavourName, sms: Sequence[int] = (), *, aot: bool = False) -> EngineTarget:
    """Check that engines can be built here for that flavour and those GPUs.

    Args:
        name: the flavour.
        sms: compute capabilities (89 for 8.9); none: that of this machine's GPU.
        aot: whether the plugin's kernels go into the engines.

    Raises:
        MissingExtraError: the flavour is not installed.
        InputError: a GPU that the flavour does not serve, or that has to be there and is not.
    """
    flavour, here = FLAVOURS[name], device_sm()
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
                f"{name} makes no engines for sm_{sm}",
                where="--sm",
                expected=f"one of {', '.join(map(str, flavour.sms))}",
                hint="For other GPUs build with --target tensorrt, on a machine that has one.",
            )
    require(name)
    if not flavour.sms and set(sms) - {here}:
        there = f"this machine's GPU is sm_{here}" if here else "no GPU was found"
        raise InputError(
            f"{name} builds for the GPU of the machine it runs on, and {there}",
            where=f"--sm {' '.join(map(str, sms))}",
            hint="Export on a machine with that GPU, or use --target tensorrt-rtx for GPUs it serves:"
            f" {', '.join(map(str, FLAVOURS['tensorrt-rtx'].sms))}.",
        )
    if not sms and here is None:
        hint = (
            "Name the GPU to build for, such as --sm 89." if flavour.sms else "Export on the GPU's machine."
        )
        raise InputError("no GPU was found to build for", where=f"--target {name}", hint=hint)
    return EngineTarget(flavour, tuple(dict.fromkeys(sms)) or (here or 0,), aot)


def check_plugin(plan: CachePlan) -> None:
    """Check that the plugin can serve a plan, and that its kernels can be compiled here.

    Raises:
        MissingExtraError: Triton is not installed.
        InputError: more segments to choose from, or wider heads, than the kernels take.
    """
    if plan.policy.retain is None or plan.score_layer is None:
        return
    if find_spec("triton") is None:
        raise MissingExtraError("triton", "engines")
    check_candidates(plan.policy.retain.segments * plan.spec.frames_per_chunk)
    if plan.spec.head_dim > MAX_WIDTH:
        raise InputError(
            f"has heads of width {plan.spec.head_dim}",
            where=plan.spec.name,
            expected=f"at most {MAX_WIDTH}: the registers of a GPU do not suffice for more",
            hint="Use a policy that retains no segments, such as window.",
        )


def warnings_of(plan: CachePlan, compute: Dtype) -> list[str]:
    """What may go wrong with engines of that plan, in words."""
    keys = most_keys(plan)
    if compute == "float16" and keys > FUSED_KEYS:
        return [
            f"attention sees up to {keys} keys, and in float16 fused kernels can overflow past {FUSED_KEYS}:"
            " use bfloat16 (the default)"
        ]
    return []


def most_keys(plan: CachePlan) -> int:
    """The most keys that a query attends to, in any layer and phase."""
    return max(
        plan.chunk_tokens + sum(plan.tokens(group, role, phase.first_chunk) for role in group.roles)
        for phase in plan.phases
        for groups in plan.layers
        for group in groups
    )


def check_disk(out: Path, weights: int, engines: int) -> None:
    """Raise InputError unless a bundle fits on the disk.

    Args:
        out: its folder.
        weights: bytes of its weights.
        engines: for how many GPUs; each engine holds the weights again.
    """
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    needed, free = int(weights * (1 + 1.1 * engines)) + 64_000_000, shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"the bundle needs about {needed / 1e9:.1f} GB (weights {weights / 1e9:.1f} GB, and as much"
            f" again in the engines for each of {engines} GPUs), and {free / 1e9:.1f} GB are free",
            where=str(place),
            hint="Choose another disk, or build for fewer GPUs at a time.",
        )
