"""Graphs that were traced already: tests export the same model often, of other weights, stored otherwise.

Tracing takes most of an export and looks at no contents of weights, so what comes of it is known by what the
graph is made of. Each is traced once for all workers (`exported.made_once`); what the exporter does with it
it does each time. Traced anew are what a test asks for with `traced_anew`, and all where something of the
product that takes part is replaced, or a class of the plan, the decoder or the encoder is a test's own.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import FunctionType

import onnx
import onnx_ir as ir
import pytest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from forcingkv.export import bundle_parts, onnx_writer
from forcingkv.export.graphs import Graph
from forcingkv.export.precision import Precision
from forcingkv.runtime.spec import ModelSpec
from tests.exported import digest_of, made_once

PACKAGES = ("forcingkv.export.graphs", "forcingkv.prune", "forcingkv.models", "forcingkv.runtime.kv")
"""Of the product, what graphs are made with."""
TRACERS = ("forcingkv.export.onnx_writer", "forcingkv.export.bundle_parts")
"""What traces them, with its own functions; other things that these import work on what was traced."""
PATCHED = {(TRACERS[0], "_traced"), (TRACERS[1], "PartsWriter", "_trace")}
"""Here."""
MAKES_MODULES = {("forcingkv.models.decoders.wan_vae", "AutoencoderKLWan")}
"""What modules are made by that are not given: a graph depends on the modules."""
LAYERS = ("forcingkv.", "torch.", "diffusers.")
"""Where classes of modules are from."""
ANYWHERE = frozenset({"name", "fps", "decoder", "text", "source", "resolutions", "dtype"})
"""Fields of a spec that no graph of the transformer depends on."""
IN_PROMPTS = frozenset(
    {"width", "height", "frames_per_chunk", "attended_frames", "ar_start", "sink_frames", "schedule"}
)
"""Further ones that the graph `prompt` does not depend on."""

Make = Callable[[], Graph]
Pieces = dict[tuple[str, ...], object]

_origin: list[object] = []
"""What the graph that is being written is made of, if it may be kept."""
_here: dict[str, bytes] = {}
"""What this process asked for before, as a system that lacks locks of files can have it too."""
_trace = onnx_writer._traced


@contextmanager
def traced_anew() -> Iterator[None]:
    """Every graph is traced, as the product does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_writer, "_traced", _trace)
        yield


@contextmanager
def traces_are_kept() -> Iterator[None]:
    """`export_bundle` takes graphs that were traced already."""
    write = bundle_parts.PartsWriter._trace
    product = _pieces()

    def written(
        writer: bundle_parts.PartsWriter, name: str, path: Path, precision: Precision
    ) -> onnx.ModelProto:
        now, origin = _pieces(), (name, precision.compute, _seen_by(name, writer))
        replaced = any(now.get(key) is not piece for key, piece in product.items())
        keeps = not replaced and _is_the_products(origin)
        _origin[:] = [origin] if keeps else []
        try:
            return write(writer, name, path, precision)
        finally:
            _origin.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_parts.PartsWriter, "_trace", written)
        patch.setattr(onnx_writer, "_traced", _kept)
        yield


def _kept(make: Make) -> tuple[Graph, ir.Model]:
    """`onnx_writer._traced`."""
    if not _origin:
        return _trace(make)

    def traced(out: Path) -> None:
        model = _trace(make)[1]
        names = vars(model.graph._name_authority)  # those that nodes of later passes get are numbered on
        out.write_bytes(pickle.dumps((ir.to_proto(model).SerializeToString(), names)))

    known = digest_of(*_origin)
    if known not in _here:
        _here[known] = made_once(traced, *_origin).read_bytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make()
    content, names = pickle.loads(_here[known])
    model = ir.from_proto(onnx.load_model_from_string(content))
    vars(model.graph._name_authority).update(names)
    return graph, model


def _seen_by(name: str, writer: bundle_parts.PartsWriter) -> object:
    """What a graph is made of."""
    plan = writer.plan
    if name == "prompt":
        return _fields(plan.spec, ANYWHERE | IN_PROMPTS)
    if name in ("step", "recache"):
        return _fields(plan.spec, ANYWHERE), plan.geometry, plan.policy, plan.layers
    if name == "encode":
        assert writer.encoder is not None
        return plan.geometry, *_layers(writer.encoder)
    if writer.decoder is not None:
        return plan.geometry, writer.strips, *_layers(writer.decoder)
    return plan.spec.frames_per_chunk, plan.spec.latent_channels, plan.geometry


def _layers(module: nn.Module) -> tuple[object, ...]:
    """What a module is made of but for contents; with a test's own class among it that class, which
    `_is_the_products` does not know."""
    kinds = {type(part) for part in module.modules()}
    if foreign := [kind for kind in kinds if not kind.__module__.startswith(LAYERS)]:
        return (Foreign(foreign[0]),)
    parts = [
        (name, type(part).__module__, repr(part), {k: v for k, v in vars(part).items() if _is_plain(v)})
        for name, part in module.named_modules()
    ]
    tensors = {name: (str(t.dtype), tuple(t.shape)) for name, t in module.state_dict().items()}
    return parts, tensors


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


@dataclass(frozen=True)
class Foreign:
    """A class that is not the product's."""

    kind: type


def _fields(spec: ModelSpec, but: frozenset[str]) -> dict[str, object]:
    return {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in but}


def _pieces() -> Pieces:
    """Every function, method and number that takes part, by its place. To import the exporter imports all."""
    found: Pieces = {}
    for module in [m for name, m in sys.modules.items() if name.startswith((*PACKAGES, *TRACERS))]:
        place = module.__name__
        for name, value in vars(module).items():
            home = str(getattr(value, "__module__", None))
            if place in TRACERS and not home.startswith((place, *PACKAGES)):
                continue
            if isinstance(value, FunctionType | type | int | float | str | tuple | frozenset):
                found[place, name] = value
            if isinstance(value, type) and home == place:
                methods = {k: v for k, v in vars(value).items() if isinstance(v, FunctionType | property)}
                found |= {(place, name, key): method for key, method in methods.items()}
    return {place: value for place, value in found.items() if place not in PATCHED | MAKES_MODULES}


def _is_the_products(value: object) -> bool:
    """Whether all dataclasses in a value are of the product, whose sources `made_once` knows."""
    if is_dataclass(value):
        inside = [getattr(value, field.name) for field in fields(value)]
        return type(value).__module__.startswith("forcingkv.") and all(map(_is_the_products, inside))
    if isinstance(value, Mapping):
        return all(map(_is_the_products, value.values()))
    return not isinstance(value, tuple | list) or all(map(_is_the_products, value))
