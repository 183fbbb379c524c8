"""Before a session takes memory: what it will need, what there is, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import NamedTuple

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.headmap import HeadMap, ModelIdentity, uniform
from forcingkv.runtime.backends import BACKENDS, LaneOptions
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.decode_strips import choose_strips
from forcingkv.runtime.devices import cuda_number
from forcingkv.runtime.engines import EngineRecord, device_sm, find_engine
from forcingkv.runtime.flavour import FLAVOURS, choose, trt
from forcingkv.runtime.footprint import DEVICE_RESERVE, footprint, kv_parts, readable
from forcingkv.runtime.graph_records import STRIP
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy, policy_names
from forcingkv.runtime.kv.rebuild import encodings, most_encoded
from forcingkv.runtime.memory import available_bytes, device_free_bytes, what_limits
from forcingkv.runtime.spec import Geometry
from forcingkv.runtime.strip_decoder import StripRecords, block_bytes

SIZED_BY_TOKENS = ("activations", "decoder_caches", "encoder_caches", "frames", "latents")
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


def check_memory(bundle: Bundle, options: LaneOptions, *, weights: bool = True) -> str | None:
    """Refuse a bundle that a session with those options would have no memory for. Takes none itself.

    `weights` says whether they have to be loaded too.

    Returns what could not be checked, as a sentence; None: all was.

    Raises InputError with what is needed by part, what is available, and what would fit.
    """
    parts = needed_memory(bundle, options)
    if not weights:
        for part in ("weights", RESERVE):
            parts.pop(part, None)
    memories, unchecked = _memories(parts, options)
    for memory in memories:
        _require(bundle, parts, memory)
    return unchecked


class Memory(NamedTuple):
    """A memory that parts of a session come to lie in."""

    parts: frozenset[str]
    available: int
    where: str
    """Follows what is available in a sentence."""


def _memories(parts: Mapping[str, int], options: LaneOptions) -> tuple[list[Memory], str | None]:
    """The memories that the parts of a session will lie in, and what of it cannot be known."""
    everything = frozenset(parts)
    if options.backend in FLAVOURS:
        number = _number(options)
        if device_sm(number) is None:
            return [], None  # opening the backend says why there is no GPU
        return [Memory(everything, device_free_bytes(number), f" on the GPU cuda:{number}")], None
    if options.backend == "torch":
        on_device, free = _of_torch(options.device)
        return [Memory(everything, free, " on the GPU" if on_device else what_limits())], None
    host = Memory(everything, available_bytes(), what_limits())
    if BACKENDS.get(options.backend) != "onnxruntime":
        return [host], None
    from forcingkv.runtime.backends.ort_providers import choose_provider

    chosen = choose_provider(options)
    if not chosen.provider.apart:
        return [host], None
    device = f"GPU {chosen.number}" if chosen.provider.numbered else "the GPU"
    unchecked = f"whether the memory of {device} is enough was not checked"
    if chosen.provider.state == "cpu":
        held = host._replace(parts=everything - {"weights", "activations"})
        return [held], f"{unchecked}: nothing here can ask {chosen.provider.title} for it"
    host = host._replace(parts=everything & {"frames", "latents", "text"})
    try:
        free = device_free_bytes(chosen.number)
    except InputError as error:  # without the bindings ONNX Runtime runs all the same
        return [host], f"{unchecked}: {error.what}"
    return [Memory(everything, free, f" on {device}"), host], None


def _require(bundle: Bundle, parts: Mapping[str, int], memory: Memory) -> None:
    """Raise InputError unless the parts that lie in a memory fit there."""
    held = {name: size for name, size in parts.items() if name in memory.parts}
    needed, available = sum(held.values()), memory.available
    if needed <= available:
        return
    listed = ", ".join(f"{name} {readable(size)}" for name, size in held.items() if size)
    fits = what_fits(bundle.plan, available, lambda *other: bytes_of_other(bundle, held, *other))
    suggested = [f"{policy} at {size} ({readable(needs)})" for policy, size, needs in fits[:SUGGESTED]]
    size = bundle.plan.geometry.name
    raise InputError(
        f"a session of {bundle.plan.policy.name} at {size} needs about {readable(needed)} ({listed}),"
        f" and {readable(available)} are available{memory.where}",
        where=str(bundle.path),
        hint=f"What fits: {'; '.join(suggested)}. Export the model so."
        if fits
        else "No policy or resolution of this model fits: free memory, or use a larger machine.",
    )


def _of_torch(name: str | None) -> tuple[bool, int]:
    """Whether a device of torch's is no CPU, and the bytes that are free on it.

    Raises InputError where there is no such device.
    """
    if name in (None, "cpu"):
        return False, available_bytes()  # torch takes a second to load
    devices = import_module("forcingkv.runtime.backends.torch_device")
    device = devices.find_device(name)
    return True, int(devices.free_bytes(device))


def needed_memory(bundle: Bundle, options: LaneOptions) -> dict[str, int]:
    """Bytes that a session will hold, by part (`footprint.part_notes`).

    Raises what finding the engines raises, for backends that run engines.
    """
    flavour = next((name for name in FLAVOURS if name == options.backend), None)
    engines: list[EngineRecord] = []
    if flavour:
        choose(flavour)
        sm, where = device_sm(_number(options)), str(bundle.path)
        built, graphs = bundle.manifest.engines, bundle.manifest.engine_graphs
        if sm is not None:  # else opening the backend says so
            engines = [find_engine(built, graph, flavour, trt.__version__, sm, where) for graph in graphs]
    on_cpu = options.backend != "torch" or options.device in (None, "cpu")
    parts = footprint(bundle.manifest, bundle.plan, engines, on_cpu=on_cpu)
    if twice := _weights_twice(bundle, options):
        parts["weights"] = parts.get("weights", 0) + twice
    return parts | {RESERVE: DEVICE_RESERVE} if flavour else parts


def _as_a_whole(bundle: Bundle, sizes: Mapping[str, int], other: Geometry, ratio: float) -> dict[str, int]:
    """What decoding takes at another size, at which frames are decoded as a whole, though the bundle's are
    not; nothing where that is not so."""
    manifest, strips = bundle.manifest, bundle.manifest.strips
    if strips is None or choose_strips(other.width, other.height, strips.lag, strips.scale):
        return {}
    records, rows = StripRecords(manifest.graphs), bundle.plan.geometry.height / strips.pixel_rows
    caches = block_bytes(records.whole) + rows * block_bytes(records.state)
    engines = [engine.activation_bytes for engine in manifest.engines if engine.graph == STRIP]
    graph = manifest.graphs[STRIP]
    own = graph.activation_bytes if manifest.has_graphs else graph.torch_bytes
    strip = max([own or 0, *engines])
    made = {
        "decoder_caches": round(caches * ratio * (2 if manifest.has_graphs else 1)),
        "activations": max(sizes.get("activations", 0), round(strip * rows * ratio)),
    }
    return {name: size for name, size in made.items() if name in sizes}


def _weights_twice(bundle: Bundle, options: LaneOptions) -> int:
    """Bytes of the weights that a device of ONNX Runtime's holds once more for the graph `recache`; a CPU
    reads them where the file is."""
    record = bundle.manifest.graphs.get("recache")
    if record is None or BACKENDS.get(options.backend) != "onnxruntime":
        return 0
    from forcingkv.runtime.backends.ort_providers import choose_provider

    return (record.weight_bytes or 0) if choose_provider(options).provider.apart else 0


def _number(options: LaneOptions) -> int:
    return cuda_number(options.device, options.backend)


def bytes_of_other(bundle: Bundle, parts: Mapping[str, int], policy: Policy, resolution: str) -> int:
    """Bytes of a session with another policy and resolution, from those of a bundle's own by part.

    Keys and values are those of the other plan, if they are among the parts; what grows with the pixels is
    scaled by them. A policy whose head map the bundle does not have is counted with the map that takes most.

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
    sizes |= _as_a_whole(bundle, sizes, other.geometry, ratio)
    if "recache" in sizes:
        frames = most_encoded(other) if encodings(other) else 0
        sizes["recache"] = round(parts["recache"] * ratio * frames / most_encoded(bundle.plan))
    known = kv_parts(bundle.plan, bundle.manifest.compute, joined=not bundle.manifest.has_graphs)
    if parts.keys() & known:
        sizes |= kv_parts(other, bundle.manifest.compute, joined=not bundle.manifest.has_graphs)
    return sum(sizes.values())
