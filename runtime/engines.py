"""TensorRT engines of a bundle: what is recorded of them, and which one a machine may load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.flavour import FlavourName


@dataclass(frozen=True)
class EngineRecord:
    """What a build reported of an engine."""

    graph: str
    flavour: FlavourName
    version: str
    """Of TensorRT; an engine runs in that version only."""
    sm: int
    """Compute capability it was built for: 89 for 8.9."""
    file: str
    layers: int
    """Of the network, as parsed."""
    plugin_layers: int
    needs_plugin: bool
    """Whether `runtime.prune_plugin` has to be registered before it is loaded."""
    phases: int
    """Optimization profiles, one for each phase of the cache."""
    weight_bytes: int
    activation_bytes: int
    """Device memory a context needs, in the phase that needs most."""
    scratch_bytes: int
    """The part of it that single layers use within themselves."""
    seconds: float
    peak_bytes: int
    """Host memory of the process that built it."""


def find_engine(
    engines: Sequence[EngineRecord], graph: str, flavour: FlavourName, version: str, sm: int, where: str
) -> EngineRecord:
    """The engine of a graph that this TensorRT can run on this GPU.

    Raises InputError where the bundle has none: for another flavour, version or GPU only, or at all.
    """
    built = [engine for engine in engines if engine.graph == graph]
    for engine in built:
        if (engine.flavour, engine.version, engine.sm) == (flavour, version, sm):
            return engine
    if not built:
        raise InputError(
            f"has no engine of the graph {graph}",
            where=where,
            hint=f"Build it with: forcingkv export ... --target {flavour}",
        )
    there = sorted({f"{engine.flavour} {engine.version} for sm_{engine.sm}" for engine in built})
    raise InputError(
        f"its engines of {graph} are made by {', '.join(there)}",
        where=where,
        expected=f"{flavour} {version} for sm_{sm}, which is what is here",
        hint="An engine runs with the version and on the GPU it was built for: export again for these.",
    )


def device_sm() -> int | None:
    """Compute capability of this machine's first GPU (89 for 8.9), or None where there is none."""
    try:
        from cuda.core import Device
    except ImportError:
        return None
    try:
        major, minor = Device(0).compute_capability
    except Exception:  # cuda-core raises whatever the missing driver raised
        return None
    return int(major) * 10 + int(minor)
