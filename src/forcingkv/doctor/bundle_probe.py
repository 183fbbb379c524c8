"""What of a bundle this machine can run: opened and looked through in a process of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

from forcingkv.doctor.child import Telling

TAKEN_BY_TORCH = ("F32", "BF16", "F16")
"""Dtypes of weights in a bundle that the backend torch reads, as safetensors calls them."""


def bundle(telling: Telling, path: str, sm: str, free: str, *more: str) -> None:
    """Steps: `about` the bundle, or `refused` (why it cannot be opened), and for each backend and device that
    it may run on `runs NAME on DEVICE`.

    Args:
        telling: takes the steps.
        path: of the bundle.
        sm: of the first GPU, 89 for 8.9; empty: there is none.
        free: bytes of its memory that are free; empty: not known.
        more: versions of each TensorRT that could be loaded, "tensorrt-rtx=1.7.1", and devices on which torch
            computes, "torch=cuda:0".
    """
    opened = telling.must("opened", "to open", lambda: _opened(telling, path))
    if opened is None:
        return
    telling.must("about", "what it is", lambda: _about(opened))
    from forcingkv.runtime.backends import BACKENDS
    from forcingkv.runtime.flavour import FLAVOURS

    pairs = [one.split("=", 1) for one in more]
    for name in BACKENDS:
        given = [value for of, value in pairs if of == name]
        if name in FLAVOURS:
            version = given[0] if given else None
            judged = [("cuda:0", partial(_on_engines, opened, name, version, sm, free))]
        elif name == "torch":
            judged = [(device, partial(_on_torch, opened, device)) for device in given or ["cpu"]]
        else:
            judged = [("its own choice", partial(_on_graphs, opened, name))]
        for device, work in judged:
            telling.may(f"runs {name} on {device}", f"for {name}", work)


def _opened(telling: Telling, path: str) -> Any:
    from pathlib import Path

    from forcingkv.headmaps.errors import InputError
    from forcingkv.runtime.bundle import Bundle

    try:
        return Bundle.open(Path(path))
    except InputError as error:
        reason = str(error)
        telling.must("refused", "to open", lambda: reason)
        return None


def _about(opened: Any) -> dict[str, Any]:
    from forcingkv.runtime.footprint import engine_sets, named

    manifest, plan = opened.manifest, opened.plan
    return {
        "digest": opened.digest,
        "model": manifest.model.name,
        "resolution": plan.geometry.described,
        "policy": manifest.policy.name,
        "compute": manifest.compute,
        "engines": [named([one]) for one in engine_sets(manifest)],
    }


def _on_engines(opened: Any, flavour: Any, version: str | None, sm: str, free: str) -> dict[str, Any]:
    """Whether there are engines of that flavour for this machine, and memory for a session with them."""
    from forcingkv.headmaps.errors import InputError
    from forcingkv.runtime.engines import find_engine
    from forcingkv.runtime.footprint import footprint

    built, where = opened.manifest.engines, str(opened.path)
    if not any(engine.flavour == flavour for engine in built):
        return _verdict(f"it has no engines of {flavour}")
    if version is None or not sm:
        lacking = "no GPU was found" if not sm else f"{flavour} could not be loaded"
        return _verdict(f"{lacking}, so no engine can be chosen")
    try:
        graphs = opened.manifest.engine_graphs
        engines = [find_engine(built, graph, flavour, version, int(sm), where) for graph in graphs]
    except InputError as error:
        return _verdict(str(error))
    needed = sum(footprint(opened.manifest, opened.plan, engines).values())
    why = None
    if free and needed > int(free):
        why = _too_little(needed, int(free), " on the GPU")
    return _verdict(why, needed, int(free) if free else None)


def _on_graphs(opened: Any, backend: str) -> dict[str, Any]:
    """Whether ONNX Runtime takes the graphs, and there is memory for a session."""
    from forcingkv.runtime.backends import LaneOptions

    if not opened.manifest.has_graphs:
        return _verdict("it has no graphs: it was exported for torch")
    if opened.manifest.compute != "float32":
        return _verdict(f"its graphs compute in {opened.manifest.compute}, for TensorRT")
    return _in_memory(opened, LaneOptions(backend))


def _on_torch(opened: Any, device: str) -> dict[str, Any]:
    """Whether torch takes the weights, and there is memory for a session in the dtype of the export."""
    from forcingkv.headmaps.errors import InputError
    from forcingkv.runtime.backends import LaneOptions
    from forcingkv.runtime.tensors import read_header

    try:
        weights, _ = read_header(opened.weights("step"))
    except InputError as error:
        return _verdict(str(error))
    others = sorted({one.dtype for one in weights.values()} - set(TAKEN_BY_TORCH))
    if others:
        return _verdict(f"its weights are stored in {', '.join(others)}, which torch does not take here")
    return _in_memory(opened.computing_in(None), LaneOptions("torch", device=device))


def _in_memory(opened: Any, options: Any) -> dict[str, Any]:
    """Whether a session with those options has the memory that it needs, as opening one would find."""
    from forcingkv.headmaps.errors import InputError
    from forcingkv.runtime.memory import available_bytes
    from forcingkv.runtime.preflight import check_memory, needed_memory

    try:
        needed = sum(needed_memory(opened, options).values())
        check_memory(opened, options)
    except InputError as error:
        return _verdict(str(error))
    return _verdict(None, needed, available_bytes() if options.device in (None, "cpu") else None)


def _too_little(needed: int, there: int, where: str) -> str:
    from forcingkv.runtime.footprint import readable

    return f"a session needs about {readable(needed)}, and {readable(there)} are free{where}"


def _verdict(why: str | None, needed: int | None = None, there: int | None = None) -> dict[str, Any]:
    return {"fits": why is None, "why": why, "needed_bytes": needed, "available_bytes": there}
