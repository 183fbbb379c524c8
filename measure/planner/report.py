"""What `forcingkv plan` reports: policies of a model at a resolution, on GPUs, and what fits instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.nominal import Heads, check_map, plan_for
from forcingkv.measure.planner.decoding import decoder_costs
from forcingkv.measure.planner.gpus import Gpu, gpu_names, load_gpu
from forcingkv.measure.planner.published import basis, efficiencies
from forcingkv.measure.planner.session_memory import RESERVE_BYTES, session_memory
from forcingkv.measure.planner.speed import VideoWork, predict, video_work
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.preflight import Fit, resolution_name, what_fits
from forcingkv.runtime.spec import Dtype, ModelSpec


def plan_report(
    spec: ModelSpec,
    policies: Sequence[Policy],
    gpus: Sequence[Gpu],
    *,
    resolution: str | None = None,
    seconds: float = 30.0,
    dtype: Dtype = "bfloat16",
    known: Heads | None = None,
    strict: bool = True,
    decode_strips: int | None = None,
) -> dict[str, Any]:
    """Memory, speed and what fits, for each policy on each GPU: plain data, bytes and seconds.

    Args:
        spec, policies, gpus: what to plan.
        resolution: "WxH" or a name; None: the model's.
        seconds: of video.
        dtype: of weights, activations, keys and values.
        known: heads for policies that have their labels; for others, or None, see `plan_for`.
        strict: whether a policy that cannot be planned is an error; otherwise it is left out and reported.
        decode_strips: in how many strips frames are decoded; None: as export chooses it.

    Raises InputError where the heads that are given fit no policy, a policy does not fit the model, or there
    cannot be so many strips.
    """
    if known:
        check_map(spec, policies, known[0])
    geometry = spec.geometry(resolution)
    chunks = spec.chunks_for(seconds)
    strips = decoder_costs(spec.decoder.kind, spec.latent_channels).strips_of(geometry, decode_strips)
    full = video_work(plan_for(spec, geometry, load_policy("full"))[0], chunks, dtype)
    planned, left_out = [], {}
    for policy in policies:
        try:
            plan, heads = plan_for(spec, geometry, policy, known)
        except InputError as error:
            if strict:
                raise
            left_out[policy.name] = str(error)
            continue
        memory = session_memory(plan, dtype, decode_strips)
        video = video_work(plan, chunks, dtype)
        on = []
        for gpu in gpus:
            missing = memory.missing(gpu.memory_bytes)
            on.append(
                {
                    "gpu": gpu.key,
                    "name": gpu.name,
                    "memory_bytes": gpu.memory_bytes,
                    "efficiency": efficiencies()[gpu.family]["value"],
                    "efficiency_basis": basis(gpu),
                    "fits": not missing,
                    "missing_bytes": missing,
                    "what_fits": _instead(plan, gpu, known, dtype, decode_strips) if missing else [],
                    **_speed(gpu, plan, video, full, strips),
                }
            )
        planned.append(
            {
                "policy": policy.name,
                "heads": heads,
                "positions": "relative" if plan.relative else "absolute",
                "window_frames": plan.window_frames,
                "kv_attended_bytes": plan.kv_bytes(dtype),
                "memory": {"parts": memory.parts, "total": memory.total, "not_counted": memory.unknown},
                "pass": {kind: vars(work) for kind, work in video.steady.items()},
                "gpus": on,
            }
        )
    families = {gpu.family for gpu in gpus}
    decoding = decoder_costs(spec.decoder.kind, spec.latent_channels).published
    return {
        "model": spec.name,
        "width": geometry.width,
        "height": geometry.height,
        "size": geometry.described,
        "frame_tokens": geometry.frame_tokens,
        "dtype": dtype,
        "decoder": spec.decoder.kind,
        "decode_strips": vars(strips) if strips else None,
        "decode_basis": f"scaled by pixels and {decoding.bound} from {decoding.source}" if decoding else None,
        "seconds": seconds,
        "chunks": chunks,
        "passes": full.passes,
        "opening_passes": [len(spec.schedule.of_chunk(n)) + 1 for n in range(spec.schedule.opening_chunks)],
        "reserve_bytes": RESERVE_BYTES,
        "efficiency": {name: one for name, one in efficiencies().items() if name in families},
        "policies": planned,
        "left_out": left_out,
        "schedule": spec.passes_described,
    }


def _speed(
    gpu: Gpu, plan: CachePlan, video: VideoWork, full: VideoWork, strips: Strips | None
) -> dict[str, Any]:
    constant = efficiencies()[gpu.family]
    found, unpruned = (predict(one, gpu, constant["value"]) for one in (video, full))
    least, most = (predict(video, gpu, constant[end]) for end in ("lowest", "highest"))
    decoding = decoder_costs(plan.spec.decoder.kind, plan.spec.latent_channels).published
    decode = decoding.seconds_on(gpu, plan.geometry, video.frames, strips) if decoding else None

    def with_decode(predicted: dict[str, Any]) -> float | None:
        # One after the other: beside each other on one GPU they would share what bounds them.
        return None if decode is None else video.frames / (predicted["mean_chunk_seconds"] + decode)

    return found | {
        "fps_range": [least["fps"], most["fps"]],
        "decode_chunk_seconds": decode,
        "fps_with_decode": with_decode(found),
        "fps_with_decode_range": [with_decode(least), with_decode(most)],
        "speedup": found["fps"] / unpruned["fps"],
    }


def _instead(
    plan: CachePlan, gpu: Gpu, known: Heads | None, dtype: Dtype, decode_strips: int | None
) -> list[dict[str, Any]]:
    """What fits where a policy at a resolution does not, the nearest first.

    First what fits on the same GPU (`preflight.what_fits`), then the same policy and resolution on other
    GPUs, the smallest first.
    """

    def bytes_of(policy: Policy, resolution: str) -> int:
        other, _ = plan_for(plan.spec, plan.spec.geometry(resolution), policy, known)
        return session_memory(other, dtype).total

    needed = session_memory(plan, dtype, decode_strips)
    larger = sorted((load_gpu(key) for key in gpu_names()), key=lambda one: one.memory_bytes)
    found = [(gpu, fit) for fit in what_fits(plan, gpu.memory_bytes - RESERVE_BYTES, bytes_of)]
    same = Fit(plan.policy.name, resolution_name(plan), needed.total)
    found += [(other, same) for other in larger if not needed.missing(other.memory_bytes)]
    return [fit._asdict() | {"gpu": on.key} for on, fit in found]
