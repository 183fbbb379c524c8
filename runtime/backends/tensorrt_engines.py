"""Loading the engines of a bundle, and what TensorRT reported."""

from __future__ import annotations

import atexit
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.prune.launcher import KernelLauncher
from forcingkv.prune.plugin import register_plugins
from forcingkv.runtime.backends.tensorrt_cache import RuntimeCache
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.engines import (
    EngineRecord,
    device_model,
    device_sm,
    find_engine,
    tuned_elsewhere,
    why_no_gpu,
)
from forcingkv.runtime.flavour import FlavourName, Told, choose, make_log, trt

_runtimes: list[Any] = []
"""The process's TensorRT runtime, which engines need as long as they live."""
_making_it = threading.Lock()
_said: Told[str] = Told()
"""What it has reported as errors and was not asked for yet."""


@dataclass(frozen=True)
class Loaded:
    """What the lanes on the same weights share; it goes with the last of them."""

    engines: Mapping[str, trt.ICudaEngine]
    """Graph -> its engine."""
    launcher: KernelLauncher | None
    """The kernels of the plugins in them."""
    caches: Mapping[str, RuntimeCache]
    """Graph -> what was compiled of its engine."""
    records: Mapping[str, EngineRecord]
    """Graph -> what the build of its engine reported: which profile a phase runs in."""


def find_record(
    bundle: Bundle, graph: str, flavour: FlavourName, device: int = 0
) -> tuple[EngineRecord, int]:
    """The engine of a graph for this TensorRT and a GPU, and the GPU's compute capability (89 for 8.9).

    Raises as `load_engine`.
    """
    choose(flavour)
    sm = device_sm(device)
    if sm is None:
        raise InputError(
            f"needs a GPU to run engines on, and no GPU was found ({why_no_gpu(device)})",
            where=flavour,
            hint="On a CPU use a bundle exported with --target onnx. If there is a GPU, see whether"
            " nvidia-smi works, whether the container was given it (--gpus all), and whether cuda-core is"
            f" installed: pip install 'forcingkv[{flavour}]'",
        )
    return find_engine(bundle.manifest.engines, graph, flavour, trt.__version__, sm, str(bundle.path)), sm


def load_kernels(bundle: Bundle, flavour: FlavourName, device: int = 0) -> KernelLauncher | None:
    """The kernels of the plugins in the bundle's engines, which are registered; None where they have none.

    Raises as `load_engine`.
    """
    graphs = bundle.manifest.engine_graphs
    found = [find_record(bundle, graph, flavour, device) for graph in graphs]
    sm = next((sm for record, sm in found if record.needs_plugin), None)
    if sm is None:
        return None
    return register_plugins(KernelLauncher(bundle.path, bundle.manifest.kernels, sm, bundle.content))


def load_engine(bundle: Bundle, graph: str, flavour: FlavourName, device: int = 0) -> trt.ICudaEngine:
    """The engine of a graph of an opened bundle, ready for execution contexts. `load_kernels` comes first.

    Raises MissingExtraError where the flavour, or cuda-core for the plugin, is not installed; InputError
    where there is no GPU, no engine for it and for this TensorRT, or TensorRT does not load the file.
    """
    record, sm = find_record(bundle, graph, flavour, device)
    if record.needs_plugin:
        register_plugins(None)
    elsewhere = tuned_elsewhere(record, device_model(device)) if record.device else None
    if elsewhere:
        warnings.warn(elsewhere, RuntimeWarning, stacklevel=2)
    with _making_it:
        if not _runtimes:
            _runtimes.append(trt.Runtime(make_log(_hear)))
            atexit.register(_runtimes.clear)  # before the plugins go, which were registered before it
    last_words()  # of something else
    with bundle.mapped(record.file) as content:
        engine: trt.ICudaEngine | None = _runtimes[0].deserialize_cuda_engine(content)
    if engine is None:
        why = last_words()
        raise InputError(
            f"cannot be loaded with {flavour} {trt.__version__} on sm_{sm}"
            + (f": TensorRT says {why!r}" if why else ", and TensorRT gives no reason"),
            where=str(bundle.path / record.file),
            hint="Export the bundle again with this version.",
        )
    return engine


def load_all(bundle: Bundle, flavour: FlavourName, device: int) -> Loaded:
    """All engines, their kernels, and what was compiled of them before. Raises as `load_engine`."""
    launcher = load_kernels(bundle, flavour, device)
    graphs = bundle.manifest.engine_graphs
    engines = {graph: load_engine(bundle, graph, flavour, device) for graph in graphs}
    records = {graph: find_record(bundle, graph, flavour, device)[0] for graph in graphs}
    check_profiles(bundle, records["step"], engines["step"])
    sm = device_sm(device)
    caches = {
        graph: RuntimeCache(bundle.digest, graph, f"{flavour} {trt.__version__}", sm) for graph in graphs
    }
    return Loaded(engines, launcher, caches, records)


def check_profiles(bundle: Bundle, record: EngineRecord, engine: trt.ICudaEngine) -> None:
    """Raise InputError unless the engine of `step` has the profiles of its record, which are for the phases
    that the bundle's plan has: in another profile a phase would run with shapes that are not its own."""
    phases, found = len(bundle.plan.phases), engine.num_optimization_profiles
    where, again = str(bundle.path / record.file), "The bundle was put together of parts: export it again."
    if record.phases != phases:
        raise InputError(
            f"was built for {record.phases} phases of the cache",
            where=where,
            expected=f"{phases}, which follow from its model and policy",
            hint=again,
        )
    if found != len(record.starts):
        raise InputError(
            f"has {found} optimization profiles",
            where=where,
            expected=f"{len(record.starts)}, as the manifest says",
            hint=again,
        )


def last_words() -> str:
    """The errors that TensorRT reported in this thread since the last call."""
    return "; ".join(_said.take())


def _hear(severity: str, message: str) -> None:
    if severity in ("ERROR", "INTERNAL_ERROR"):
        _said.add(message.strip())
