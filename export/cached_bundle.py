"""Bundles for torch in the cache: baked once, and found again by all that decides what they are.

The name of a folder is of a digest of that, `origin_of`, which its manifest repeats. A folder is used only if
the bundle in it is whole, to the last digest, and is of that origin.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import forcingkv
from forcingkv.export.bake import baked_bytes
from forcingkv.export.bundle_parts import decoder_sizes, encoder_record, record_without_graph
from forcingkv.export.bundle_writer import check_out, export_bundle
from forcingkv.export.live_memory import streaming_bytes
from forcingkv.export.precision import precision_of
from forcingkv.export.space import check_disk
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.headmaps.locks import BusyError, held
from forcingkv.headmaps.reading import read_json
from forcingkv.headmaps.writing import lock_of, new_token, unwritable_where
from forcingkv.models.checkpoint import Weights
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import strips_of
from forcingkv.models.encoders import StreamingEncoder
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.bundle import GRAPHS, SCHEMA, Bundle, Manifest, PlanRecord
from forcingkv.runtime.bundle_files import MANIFEST
from forcingkv.runtime.cache_folder import VARIABLE, cache_folder
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.graph_records import STRIP
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.statistics import required_statistics
from forcingkv.runtime.preflight import check_memory
from forcingkv.runtime.spec import Dtype

FOLDER = "bundles"
"""Where they lie in the project's folder of caches."""
PACKAGES = ("headmaps", "runtime", "models", "export")
"""Whose code decides what is baked: no version has been released, so the number alone says little."""
DIGITS = 16
"""Of the origin, in the name of a folder."""
WAIT_SECONDS = 0.2
"""From one look at whether another process is done to the next."""


@dataclass(frozen=True)
class Recipe:
    """What is to be baked, but for the weights."""

    plan: CachePlan
    headmap: HeadMap | None
    """None for policies that treat all heads alike."""
    decoder: StreamingDecoder | None
    stored: Dtype
    """What the weights are stored as, and torch computes in."""
    encoder: StreamingEncoder | None = None
    """None: the bundle makes no latents of pictures and videos."""


@dataclass(frozen=True)
class CachedBundle:
    """A bundle in the cache, opened."""

    bundle: Bundle
    digesting: float
    """Seconds for the digests of what it is baked of."""
    baking: float | None
    """Seconds to bake it; None: it was there."""


def cache_of_bundles() -> Path:
    """The folder that they lie in; it need not be there. Raises InputError as `cache_folder` does."""
    return cache_folder() / FOLDER


def cached_bundle(
    recipe: Recipe,
    weights: Weights,
    *,
    progress: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
) -> CachedBundle:
    """The bundle in the cache that is of that origin, baked now where there is none.

    One process bakes it; others that want it meanwhile wait, and use it. What is damaged in its place is
    replaced, and what is none of ours set aside.

    Args:
        recipe, weights: what it is made of.
        progress: called with a line on what is done next.
        note: called with a sentence that people should see: on what is wrong with a folder, and on waiting.

    Raises InputError where the cache cannot be written or its disk has no room, and as `export_bundle` does.
    """
    began = time.perf_counter()
    progress(f"computing the digest of the weights ({readable(weights.bytes)})")
    origin = origin_of(recipe, weights)
    place = cache_of_bundles() / f"{_plain(recipe.plan.spec.name)}-{origin[:DIGITS]}"
    digested, seconds = time.perf_counter() - began, None
    progress(f"reading {place}")
    bundle, _ = _found(place, origin)
    if bundle is None:
        with _alone(place, note):
            bundle, fault = _found(place, origin)  # again: another process may have baked it
            if bundle is None:
                begun = time.perf_counter()
                if fault:
                    note(f"{place} is baked anew: {fault}")
                _set_aside(place, origin, note)
                bundle = _baked(recipe, weights, place, origin, progress)
                seconds = time.perf_counter() - begun
    return CachedBundle(bundle, digested, seconds)


def check_memory_to_run(recipe: Recipe, device: str | None) -> None:
    """Raise InputError, with what is needed by part, where a session of the bundle would have no memory on
    that device: before it is baked, and before the weights are fetched or read."""
    plan, decoder, compute = recipe.plan, recipe.decoder, recipe.stored
    held = {"step": baked_bytes(plan.spec, precision_of(compute, "torch"))}
    held["decode"] = sum(tensor.nbytes for tensor in decoder.state_dict().values()) if decoder else 0
    strips = strips_of(decoder, plan.geometry)
    sizes = decoder_sizes(plan, decoder, compute, strips)
    graphs = {
        name: record_without_graph(name, plan, sizes, compute, None, held.get(name, 0))
        for name in (*GRAPHS, *([STRIP] if strips else []))
    }
    if encoder := recipe.encoder:
        size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
        graphs["encode"] = encoder_record(plan, encoder, compute, None, size)
    for name, needed in streaming_bytes(plan.geometry, decoder, recipe.encoder, strips).items():
        graphs[name] = replace(graphs[name], torch_bytes=needed)
    manifest = Manifest(
        schema="forcingkv.bundle/1",
        model=plan.spec,
        resolution=(plan.geometry.width, plan.geometry.height),
        policy=plan.policy,
        plan=PlanRecord.of(plan, compute),
        graphs=graphs,
        files={},
        versions={},
        compute=compute,
        crop=plan.geometry.crop,
        strips=strips,
    )
    bundle = Bundle(Path(plan.spec.name), manifest, recipe.headmap, plan.statistics)
    check_memory(bundle, LaneOptions("torch", device=device))


def origin_of(recipe: Recipe, weights: Weights) -> str:
    """SHA-256 of all that decides what the bundle is. Reads the files of the weights through."""
    plan = recipe.plan
    decided: dict[str, Any] = {
        "schema": SCHEMA,
        "forcingkv": forcingkv.__version__,
        "code": _code(),
        "torch": torch.__version__,  # it draws random weights, and adds up LoRAs
        "model": to_data(plan.spec),
        "geometry": (plan.geometry.width, plan.geometry.height, plan.geometry.crop),
        "policy": to_data(plan.policy),
        "headmap": recipe.headmap.digest if recipe.headmap else None,
        "weights": _identity(weights),
        "taken": weights.taken,  # which of the models in a file
        "loras": [to_data(record) for record in weights.loras],
        "decoder": _digest_of(recipe.decoder),
        **({"statistics": used.digest} if (used := required_statistics(plan)) else {}),
        **({"encoder": _digest_of(recipe.encoder)} if recipe.encoder else {}),
        "stored": recipe.stored,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def sizes_in_cache() -> dict[str, int]:
    """Name of each folder in the cache of bundles -> its bytes. Other processes may be changing it."""
    folder, sizes = cache_of_bundles(), dict[str, int]()
    for place, _, names in os.walk(folder):
        top = Path(place).relative_to(folder).parts[:1]
        for name in names if top else ():
            with suppress(OSError):
                sizes[top[0]] = sizes.get(top[0], 0) + os.path.getsize(Path(place, name))
    return sizes


def _identity(weights: Weights) -> str:
    if weights.seed is not None:
        return f"random, seed {weights.seed}"
    if digest := weights.digest:
        return digest
    raise ValueError("nothing says what these weights are: they have neither a digest nor a seed")


def _digest_of(decoder: StreamingDecoder | StreamingEncoder | None) -> str | None:
    """SHA-256 of the tensors of a decoder or an encoder, whatever file they are from."""
    if decoder is None:
        return None
    found = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@cache
def _code() -> str:
    """SHA-256 of the code that bakes."""
    found = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(f"forcingkv.{package}")
        assert spec is not None
        for root in map(Path, spec.submodule_search_locations or ()):
            for file in sorted(root.rglob("*.py")):
                found.update(
                    f"\0{package}/{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes()
                )
    return found.hexdigest()


def _plain(name: str) -> str:
    """A model's name as part of a folder's."""
    return re.sub("[^A-Za-z0-9._-]", "_", name)[:40].lstrip(".") or "model"


def _found(place: Path, origin: str) -> tuple[Bundle | None, str]:
    """The bundle of that origin, if it is there and whole; and else what is wrong with what is there."""
    if not os.path.lexists(place):
        return None, ""
    try:
        bundle = Bundle.open(place)
    except (InputError, OSError) as error:
        return None, str(error)
    if bundle.manifest.origin != origin:
        return None, "it holds another bundle"
    return bundle, ""


@contextmanager
def _alone(place: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a place in the cache, once every other process has let go of it."""
    told = False
    with unwritable_where(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                with unwritable_where(place):
                    stack.enter_context(held(lock_of(place.parent, f"{place.name}-baking"), place))
                break
            except BusyError:
                if not told:
                    note(f"another process bakes {place}: waiting for it")
                told = True
                time.sleep(WAIT_SECONDS)
        yield


def _set_aside(place: Path, origin: str, note: Callable[[str], None]) -> None:
    """Give what is in the place another name, unless it is what was baked there, which may be replaced."""
    if not os.path.lexists(place):
        return
    with suppress(InputError, OSError):
        if not place.is_symlink() and _origin_said(place) == origin:
            check_out(place)
            return
    aside = place.with_name(f"{place.name}.set-aside-{new_token()}")
    with unwritable_where(place):
        os.rename(place, aside)
    note(f"what was there is now {aside}")


def _origin_said(place: Path) -> str | None:
    """The origin that the manifest in a folder says, however damaged the folder is otherwise."""
    data = read_json(place / MANIFEST)
    said = data.get("origin") if isinstance(data, dict) else None
    return said if isinstance(said, str) else None


def _baked(
    recipe: Recipe, weights: Weights, place: Path, origin: str, progress: Callable[[str], None]
) -> Bundle:
    plan = recipe.plan

    def unchanged() -> str:
        """The origin still, now that everything was read; else nothing is written."""
        if origin_of(recipe, weights) != origin:
            what = "the files of the weights were changed while they were read"
            raise InputError(what, where=f"baking {plan.spec.name}", hint="Run the same command again.")
        return origin

    try:
        check_disk(place, baked_bytes(plan.spec, precision_of(recipe.stored, "torch")), 0)
    except InputError as error:
        hint = f"Make room there, or set {VARIABLE} to a folder on another disk."
        raise InputError(error.what, where=error.where, hint=hint) from error
    export_bundle(
        plan.spec,
        weights,
        plan.policy,
        place,
        headmap=recipe.headmap,
        statistics=required_statistics(plan),
        resolution=plan.geometry.name,
        decoder=recipe.decoder,
        encoder=recipe.encoder,
        dtype=recipe.stored,
        target="torch",
        origin=unchanged,
        progress=progress,
    )
    bundle, fault = _found(place, origin)
    if bundle is None:
        raise InputError(f"was baked, and cannot be used: {fault}", where=str(place))
    return bundle
