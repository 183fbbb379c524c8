"""Before a session takes memory: what it will need, what there is, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap, ModelIdentity, uniform
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.bundle import GRAPHS, Bundle
from forcingkv.runtime.devices import cuda_number
from forcingkv.runtime.engines import EngineRecord, device_sm, find_engine
from forcingkv.runtime.flavour import FLAVOURS, choose, trt
from forcingkv.runtime.footprint import DEVICE_RESERVE, footprint, kv_parts, readable
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy, policy_names
from forcingkv.runtime.memory import available_bytes, device_free_bytes, what_limits

SIZED_BY_TOKENS = ("activations", "decoder_caches", "frames", "latents")
"""Parts that grow with the pixels of a frame."""
RESERVE = "cuda"
"""The part that stands for `DEVICE_RESERVE`."""
SUGGESTED = 3
"""Suggestions in a message."""


class Fit(NamedTuple):
    """A policy and a resolution of a model, and the bytes that a session would take."""

    policy: str
    resolution: str
    bytes: int


def what_fits(plan: CachePlan, capacity: int, bytes_of: Callable[[Policy, str], int]) -> list[Fit]:
    """Policies and resolutions of a plan's model that fit, those nearest to the plan first.

    First all policies at the plan's own resolution, then at the model's lower ones, the highest first; each
    time the policy that takes most comes first.

    Args:
        plan: what does not fit.
        capacity: bytes that there are.
        bytes_of: the bytes of a policy at a resolution. Raises InputError where the policy cannot be used at
            that resolution: it asks more segments of a frame than there are tokens.
    """
    spec, own = plan.spec, plan.frame_tokens
    named = {name: spec.geometry(name).frame_tokens for name in spec.resolutions}
    tokens = {resolution_name(plan): own} | {name: n for name, n in named.items() if n < own}
    fits = []
    for resolution in tokens:
        for policy in policy_names():
            with suppress(InputError):
                fits.append(Fit(policy, resolution, bytes_of(load_policy(policy), resolution)))
    fits = [fit for fit in fits if fit.bytes <= capacity]
    return sorted(fits, key=lambda fit: (-tokens[fit.resolution], -fit.bytes))


def resolution_name(plan: CachePlan) -> str:
    """The model's name for a plan's resolution, or WIDTHxHEIGHT."""
    named = {tuple(pixels): name for name, pixels in plan.spec.resolutions.items()}
    return named.get(plan.geometry.shown, plan.geometry.name)


def check_memory(bundle: Bundle, options: LaneOptions, *, weights: bool = True) -> None:
    """Refuse a bundle that a session with those options would have no memory for. Takes none itself.

    `weights` says whether they have to be loaded too. Raises InputError with what is needed by part, what is
    available, and what would fit.
    """
    parts = needed_memory(bundle, options)
    if not weights:
        for part in ("weights", RESERVE):
            parts.pop(part, None)
    needed = sum(parts.values())
    on_device = options.backend in FLAVOURS
    if on_device and device_sm(_number(options)) is None:
        return  # opening the backend says why there is none
    available = device_free_bytes(_number(options)) if on_device else available_bytes()
    if needed <= available:
        return
    listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
    fits = what_fits(bundle.plan, available, lambda *other: bytes_of_other(bundle, parts, *other))
    suggested = [f"{policy} at {size} ({readable(needs)})" for policy, size, needs in fits[:SUGGESTED]]
    size = bundle.plan.geometry.name
    raise InputError(
        f"a session of {bundle.plan.policy.name} at {size} needs about {readable(needed)} ({listed}),"
        f" and {readable(available)} are available"
        + (f" on the GPU cuda:{_number(options)}" if on_device else what_limits()),
        where=str(bundle.path),
        hint=f"What fits: {'; '.join(suggested)}. Export the model so."
        if fits
        else "No policy or resolution of this model fits: free memory, or use a larger machine.",
    )


def needed_memory(bundle: Bundle, options: LaneOptions) -> dict[str, int]:
    """Bytes that a session will hold, by part (`footprint.part_notes`).

    Raises what finding the engines raises, for backends that run engines.
    """
    flavour = next((name for name in FLAVOURS if name == options.backend), None)
    engines: list[EngineRecord] = []
    if flavour:
        choose(flavour)
        sm, built, where = device_sm(_number(options)), bundle.manifest.engines, str(bundle.path)
        if sm is not None:  # else opening the backend says so
            engines = [find_engine(built, graph, flavour, trt.__version__, sm, where) for graph in GRAPHS]
    parts = footprint(bundle.manifest, bundle.plan, engines)
    return parts | {RESERVE: DEVICE_RESERVE} if flavour else parts


def _number(options: LaneOptions) -> int:
    return cuda_number(options.device, options.backend)


def bytes_of_other(bundle: Bundle, parts: Mapping[str, int], policy: Policy, resolution: str) -> int:
    """Bytes of a session with another policy and resolution, from those of a bundle's own by part.

    Keys and values are those of the other plan; what grows with the pixels is scaled by them. A policy whose
    head map the bundle does not have is counted with the map that takes most.

    Raises InputError where the policy cannot be used at that resolution.
    """
    spec = bundle.plan.spec
    maps: list[HeadMap | None] = [None]
    if policy.needs_headmap:
        same = bundle.headmap is not None and set(bundle.headmap.counts()) <= set(policy.groups)
        identity = ModelIdentity(spec.name, spec.layers, spec.heads)
        maps = [bundle.headmap] if same else [uniform(identity, label) for label in policy.groups]
    plans = [build_plan(spec, spec.geometry(resolution), policy, headmap) for headmap in maps]
    other = max(plans, key=CachePlan.kv_bytes)
    ratio = other.frame_tokens / bundle.plan.frame_tokens
    sizes = {name: round(size * ratio) if name in SIZED_BY_TOKENS else size for name, size in parts.items()}
    return sum((sizes | kv_parts(other, bundle.manifest.compute)).values())
