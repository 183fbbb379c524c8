"""What would fit, where a policy at a resolution does not fit on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.planner.gpus import Gpu, gpu_names, load_gpu
from forcingkv.measure.planner.heads import Given, plan_for
from forcingkv.measure.planner.memory import session_memory
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.plan import CachePlan
from forcingkv.runtime.policies import load_policy, policy_names
from forcingkv.runtime.spec import Dtype


@dataclass(frozen=True)
class Fit:
    """A policy, resolution and GPU for the same model, and the bytes that a session would take."""

    policy: str
    resolution: str
    gpu: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.policy} at {self.resolution} on {self.gpu} ({readable(self.bytes)})"


def what_fits(plan: CachePlan, gpu: Gpu, given: Given, dtype: Dtype) -> list[Fit]:
    """What fits instead, the nearest first.

    First other policies at the same resolution on the same GPU, then all policies at the model's lower
    resolutions, the highest first; each time that which keeps most comes first. Last the same policy and
    resolution on other GPUs, the smallest first.
    """
    found = []
    for tokens, resolution in _resolutions(plan):
        for name in policy_names():
            fit = _fit(plan, name, resolution, gpu, given, dtype)
            if fit and not (name == plan.policy.name and tokens == plan.frame_tokens):
                found.append((-tokens, -fit.bytes, fit))
    same_gpu = [fit for *_, fit in sorted(found, key=lambda one: one[:2])]
    needed = session_memory(plan, dtype)
    others = sorted((load_gpu(key) for key in gpu_names()), key=lambda one: one.memory_bytes)
    own = _name(plan)
    return same_gpu + [
        Fit(plan.policy.name, own, other.key, needed.total)
        for other in others
        if not needed.missing(other.memory_bytes)
    ]


def _fit(plan: CachePlan, policy: str, resolution: str, gpu: Gpu, given: Given, dtype: Dtype) -> Fit | None:
    try:
        other, _ = plan_for(plan.spec, plan.spec.geometry(resolution), load_policy(policy), given)
    except InputError:
        return None  # its segments do not divide these frames, say
    memory = session_memory(other, dtype)
    return None if memory.missing(gpu.memory_bytes) else Fit(policy, resolution, gpu.key, memory.total)


def _resolutions(plan: CachePlan) -> Iterator[tuple[int, str]]:
    """(tokens a frame, name) of the plan's own resolution and of those of the model that are lower."""
    yield plan.frame_tokens, _name(plan)
    for name in plan.spec.resolutions:
        tokens = plan.spec.geometry(name).frame_tokens
        if tokens < plan.frame_tokens:
            yield tokens, name


def _name(plan: CachePlan) -> str:
    size = plan.geometry.width, plan.geometry.height
    named = {tuple(pixels): name for name, pixels in plan.spec.resolutions.items()}
    return named.get(size, f"{size[0]}x{size[1]}")
