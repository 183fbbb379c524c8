"""What `forcingkv plan` reports: policies of a model at a resolution, on GPUs, and what fits instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.planner.gpus import Gpu, gpu_names, load_gpu
from forcingkv.measure.planner.known_heads import KnownHeads, plan_for, spread
from forcingkv.measure.planner.prediction import VideoWork, predict, video_work
from forcingkv.measure.planner.published import basis, efficiencies
from forcingkv.measure.planner.session_memory import RESERVE_BYTES, SessionMemory, session_memory
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.preflight import Fit, resolution_name, what_fits
from forcingkv.runtime.spec import Dtype, ModelSpec


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned."""

    spec: ModelSpec
    policies: Sequence[Policy]
    gpus: Sequence[Gpu]
    resolution: str | None = None
    seconds: float = 30.0
    dtype: Dtype = "bfloat16"
    known: KnownHeads = field(default_factory=KnownHeads)
    strict: bool = True
    """Whether a policy that cannot be planned is an error; otherwise it is left out and reported as such."""


def plan_report(request: PlanRequest) -> dict[str, Any]:
    """Memory, speed and what fits, for each policy on each GPU: plain data, bytes and seconds.

    Raises InputError where the heads that are given fit no policy, or a policy does not fit the model.
    """
    spec, known = request.spec, request.known
    _check(request)
    geometry = spec.geometry(request.resolution)
    chunks = spec.chunks_for(request.seconds)
    baseline, _ = plan_for(spec, geometry, load_policy("full"))
    full = video_work(baseline, chunks, request.dtype)
    planned, left_out = [], {}
    for policy in request.policies:
        try:
            plan, heads = plan_for(spec, geometry, policy, known)
        except InputError as error:
            if request.strict:
                raise
            left_out[policy.name] = str(error)
            continue
        planned.append(_policy(request, plan, heads, video_work(plan, chunks, request.dtype), full))
    families = {gpu.family for gpu in request.gpus}
    return {
        "model": spec.name,
        "width": geometry.width,
        "height": geometry.height,
        "frame_tokens": geometry.frame_tokens,
        "dtype": request.dtype,
        "decoder": spec.decoder.kind,
        "seconds": request.seconds,
        "chunks": chunks,
        "passes": full.passes,
        "reserve_bytes": RESERVE_BYTES,
        "efficiency": {name: asdict(one) for name, one in efficiencies().items() if name in families},
        "policies": planned,
        "left_out": left_out,
    }


def _check(request: PlanRequest) -> None:
    """Raise InputError for heads that are not this model's, or that no policy has groups for."""
    spec, known = request.spec, request.known
    if not known.labels:
        return
    if not any(known.labels <= set(policy.groups) for policy in request.policies):
        raise InputError(
            f"its labels are {', '.join(sorted(known.labels))}",
            where="head map" if known.headmap else "--heads",
            expected="labels that one of the policies has groups for",
        )
    headmap = known.headmap or spread(spec, known.counts or {})
    headmap.check_model(spec.layers, spec.heads, known.labels)


def _policy(
    request: PlanRequest, plan: CachePlan, heads: str, video: VideoWork, full: VideoWork
) -> dict[str, Any]:
    memory = session_memory(plan, request.dtype)
    return {
        "policy": plan.policy.name,
        "heads": heads,
        "kv_attended_bytes": plan.kv_bytes(request.dtype),
        "memory": {"parts": memory.parts, "total": memory.total, "not_counted": list(memory.unknown)},
        "pass": {kind: asdict(work) for kind, work in video.steady.items()},
        "gpus": [_on(request, gpu, plan, memory, video, full) for gpu in request.gpus],
    }


def _on(
    request: PlanRequest, gpu: Gpu, plan: CachePlan, memory: SessionMemory, video: VideoWork, full: VideoWork
) -> dict[str, Any]:
    constant = efficiencies()[gpu.family]
    found = predict(video, gpu, constant.value)
    missing = memory.missing(gpu.memory_bytes)
    return {
        "gpu": gpu.key,
        "name": gpu.name,
        "memory_bytes": gpu.memory_bytes,
        "efficiency": constant.value,
        "efficiency_basis": basis(gpu),
        "fits": not missing,
        "missing_bytes": missing,
        "what_fits": _instead(plan, gpu, request.known, request.dtype) if missing else [],
        "pass_seconds": found.steady_pass,
        "pass_seconds_by_kind": found.kinds,
        "chunk_seconds": found.steady_chunk,
        "mean_chunk_seconds": found.mean_chunk,
        "fps": found.fps,
        "fps_range": [predict(video, gpu, one).fps for one in (constant.lowest, constant.highest)],
        "speedup": found.fps / predict(full, gpu, constant.value).fps,
        "attention_time_share": found.attention_time,
        "attention_flop_share": found.attention_operations,
    }


def _instead(plan: CachePlan, gpu: Gpu, known: KnownHeads, dtype: Dtype) -> list[dict[str, Any]]:
    """What fits where a policy at a resolution does not, the nearest first.

    First what fits on the same GPU (`preflight.what_fits`), then the same policy and resolution on other
    GPUs, the smallest first.
    """

    def bytes_of(policy: Policy, resolution: str) -> int:
        other, _ = plan_for(plan.spec, plan.spec.geometry(resolution), policy, known)
        return session_memory(other, dtype).total

    needed = session_memory(plan, dtype)
    larger = sorted((load_gpu(key) for key in gpu_names()), key=lambda one: one.memory_bytes)
    found = [(gpu, fit) for fit in what_fits(plan, gpu.memory_bytes - RESERVE_BYTES, bytes_of)]
    same = Fit(plan.policy.name, resolution_name(plan), needed.total)
    found += [(other, same) for other in larger if not needed.missing(other.memory_bytes)]
    return [
        {"policy": fit.policy, "resolution": fit.resolution, "gpu": on.key, "bytes": fit.bytes}
        for on, fit in found
    ]
