"""Before a session takes memory: what it will need, what there is, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap, ModelIdentity, uniform
from forcingkv.runtime.bundle import GRAPHS, Bundle
from forcingkv.runtime.engines import EngineRecord, device_sm, find_engine
from forcingkv.runtime.flavour import FLAVOURS, choose, trt
from forcingkv.runtime.footprint import footprint, kv_parts, readable
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy, policy_names
from forcingkv.runtime.memory import available_bytes, device_free_bytes

SIZED_BY_TOKENS = ("activations", "decoder_caches", "frames", "latents")
"""Parts that grow with the pixels of a frame."""
TOLD = 3
"""Suggestions in a message."""


@dataclass(frozen=True)
class Fit:
    """A policy and resolution of the same model, and the memory that a session would take."""

    policy: str
    resolution: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.policy} at {self.resolution} ({readable(self.bytes)})"


def check_memory(bundle: Bundle, backend: str, *, weights: bool = True) -> None:
    """Refuse a bundle that a session would have no memory for. Takes none itself.

    Args:
        bundle: an opened bundle.
        backend: what will run it.
        weights: whether they have to be loaded too.

    Raises InputError with what is needed by part, what is available, and what would fit.
    """
    parts = needed_memory(bundle, backend)
    if not weights:
        parts.pop("weights", None)
    needed = sum(parts.values())
    on_device = backend in FLAVOURS
    available = device_free_bytes() if on_device else available_bytes()
    if needed <= available:
        return
    told = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
    fits = [str(fit) for fit in what_fits(bundle, parts, available)][:TOLD]
    width, height = bundle.manifest.resolution
    raise InputError(
        f"a session of {bundle.plan.policy.name} at {width}x{height} needs {readable(needed)} ({told}),"
        f" and {readable(available)} are available" + (" on the GPU" if on_device else ""),
        where=str(bundle.path),
        hint=f"What fits: {'; '.join(fits)}. Export the model so."
        if fits
        else "No policy or resolution of this model fits: free memory, or use a larger machine.",
    )


def needed_memory(bundle: Bundle, backend: str) -> dict[str, int]:
    """Bytes that a session will hold, by part (`footprint.PARTS`).

    Raises what finding the engines raises, for backends that run engines.
    """
    return footprint(bundle.manifest, bundle.plan, _engines(bundle, backend))


def what_fits(bundle: Bundle, parts: Mapping[str, int], available: int) -> list[Fit]:
    """Policies and resolutions that fit, those nearest to the bundle's own first.

    Keys and values are those of each plan; what grows with the pixels is scaled by them. A policy whose
    head map the bundle does not have is counted with the map that takes most.
    """
    plan, spec = bundle.plan, bundle.plan.spec
    fits = []
    for name, resolution in _resolutions(bundle):
        geometry = spec.geometry(resolution)
        ratio = geometry.frame_tokens / plan.geometry.frame_tokens
        if ratio > 1:
            continue
        for policy in (load_policy(known) for known in policy_names()):
            try:
                other = _largest_plan(bundle, policy, resolution)
            except InputError:
                continue  # its segments do not divide these frames, say
            sizes = {n: round(size * ratio) if n in SIZED_BY_TOKENS else size for n, size in parts.items()}
            needed = sum((sizes | kv_parts(other, bundle.manifest.compute)).values())
            if needed <= available:
                fits.append((-ratio, needed, Fit(policy.name, name, needed)))
    return [fit for *_, fit in sorted(fits, key=lambda found: (found[0], -found[1]))]


def _engines(bundle: Bundle, backend: str) -> list[EngineRecord]:
    for flavour in FLAVOURS:
        if backend == flavour:
            choose(flavour)
            sm, engines = device_sm(), bundle.manifest.engines
            if sm is None:
                return []  # opening the backend says so
            return [
                find_engine(engines, graph, flavour, trt.__version__, sm, str(bundle.path))
                for graph in GRAPHS
            ]
    return []


def _resolutions(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """(name to tell, WIDTHxHEIGHT) of the bundle's own resolution, and of those of its model."""
    own = "x".join(map(str, bundle.manifest.resolution))
    named = {f"{width}x{height}": name for name, (width, height) in bundle.plan.spec.resolutions.items()}
    for size in dict.fromkeys([own, *named]):
        yield named.get(size, size), size


def _largest_plan(bundle: Bundle, policy: Policy, resolution: str) -> CachePlan:
    """The plan of a policy; with the bundle's map if it fits, else with the costliest uniform one."""
    spec = bundle.plan.spec
    maps: list[HeadMap | None] = [None]
    if policy.needs_headmap:
        same = bundle.headmap is not None and set(bundle.headmap.counts()) <= set(policy.groups)
        identity = ModelIdentity(spec.name, spec.layers, spec.heads)
        maps = [bundle.headmap] if same else [uniform(identity, label) for label in policy.groups]
    plans = [build_plan(spec, spec.geometry(resolution), policy, headmap) for headmap in maps]
    return max(plans, key=CachePlan.kv_bytes)
