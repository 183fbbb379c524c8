"""Export: from weights and a head map to a bundle that the runtime opens."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

import forcingkv
from forcingkv.export.bake import bake_weights, store_tensors
from forcingkv.export.graphs import Graph, decode_graph, prompt_graph, step_graph
from forcingkv.export.onnx_writer import write_onnx
from forcingkv.export.verify import check_memory, graph_difference
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.models.checkpoint import build_model
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.heads import head_orders
from forcingkv.models.tensor_files import open_tensors
from forcingkv.models.wan import WanModel
from forcingkv.runtime.bundle import (
    GRAPHS,
    HEADMAP,
    MANIFEST,
    GraphRecord,
    Manifest,
    PlanRecord,
    TensorRecord,
)
from forcingkv.runtime.files import FileRecord, new_folder, record_file
from forcingkv.runtime.plan import CachePlan, build_plan
from forcingkv.runtime.policies import Policy
from forcingkv.runtime.spec import Dtype, ModelSpec
from forcingkv.runtime.tensors import StoredTensor

__all__ = ["TOLERANCE", "VerificationError", "export_bundle"]

WEIGHTS, DECODER = "weights.safetensors", "decoder.safetensors"
"""Files that the graphs point into."""

TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and torch, in float32, that an export passes with."""


class VerificationError(Exception):
    """The exported graphs do not compute what the model computes."""


def export_bundle(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    policy: Policy,
    out: Path,
    *,
    headmap: HeadMap | None = None,
    resolution: str | None = None,
    decoder: StreamingDecoder | None = None,
    dtype: Dtype | None = None,
    verify: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Bake the head map into the weights, trace the graphs, verify them, and write the bundle.

    Args:
        spec: the model.
        weights: its tensors by Wan name, heads in their original order; read one at a time.
        policy: what each head group sees.
        out: the bundle's folder; written whole or not at all.
        headmap: needed where the policy tells heads apart.
        resolution: "WxH" or a name; None for the model's default.
        decoder: what makes pixels of latents; needed unless the latents are pixels.
        dtype: what the weights are stored as; None for the model's default.
        verify: whether to run every graph and compare it with torch; needs the memory of the model.
        say: told what is being done.

    Raises:
        InputError: something does not fit; see `build_plan` and `verify.check_memory`.
        VerificationError: a graph differs from torch by more than `TOLERANCE`.
    """
    headmap = headmap if policy.needs_headmap else None
    plan = build_plan(spec, spec.geometry(resolution), policy, headmap)
    if (decoder is None) != (spec.decoder.kind == "pixels"):
        raise ValueError(f"the decoder of {spec.name} is {spec.decoder.kind}, and {decoder!r} was given")
    if verify:
        check_memory(plan, decoder)
    with new_folder(out, MANIFEST) as folder:
        bundle = _Writer(folder, plan, decoder, verify, say)
        bundle.write_weights(weights, head_orders(spec, policy, headmap), dtype or spec.dtype)
        for name in GRAPHS:
            bundle.write_graph(name)
        written = bundle.written
        if headmap:
            headmap.write(folder / HEADMAP)
            written.append(folder / HEADMAP)
        say("computing digests")
        manifest = Manifest(
            schema="forcingkv.bundle/1",
            model=spec,
            resolution=(plan.geometry.width, plan.geometry.height),
            policy=policy,
            plan=PlanRecord.of(plan),
            graphs=bundle.records,
            files=_files(written),
            versions=_versions(),
            headmap=headmap.digest if headmap else None,
            verification=bundle.differences,
        )
        (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return manifest


class _Writer:
    """Writes weights and graphs into the folder of a bundle that is being made."""

    def __init__(
        self,
        folder: Path,
        plan: CachePlan,
        decoder: StreamingDecoder | None,
        verify: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.plan, self.decoder, self.verify, self.say = folder, plan, decoder, verify, say
        self.written: list[Path] = []
        self.records: dict[str, GraphRecord] = {}
        self.differences: dict[str, float] = {}
        self._stored: dict[str, dict[str, StoredTensor]] = {}
        self._model: WanModel | None = None

    def write_weights(
        self, weights: Mapping[str, Tensor], orders: Sequence[Sequence[int]], dtype: Dtype
    ) -> None:
        """Write the baked weights and those of the decoder."""
        spec = self.plan.spec
        self._stored[WEIGHTS] = bake_weights(weights, spec, orders, self.folder / WEIGHTS, dtype, self.say)
        self.written.append(self.folder / WEIGHTS)
        if self.decoder:
            # Decoders are small, and bfloat16 shows in pixels.
            state = self.decoder.state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            path = self.folder / DECODER
            self._stored[DECODER] = store_tensors(shapes, state.__getitem__, path, "float32")
            self.written.append(path)

    def write_graph(self, name: str) -> None:
        """Trace, write and verify a graph."""
        self.say(f"tracing {name}")
        file = DECODER if name == "decode" else WEIGHTS
        stored = self._stored.get(file, {})
        path = self.folder / f"{name}.onnx"
        traced = write_onnx(lambda: self._graph(name, fake=True), path, stored, file)
        self.written.append(path)
        self.records[name] = _record(path, traced, file if stored else None)
        if self.verify:
            self.say(f"verifying {name}")
            self._verify(name, path)

    def _verify(self, name: str, path: Path) -> None:
        difference = graph_difference(self._graph(name, fake=False), path, self.plan)
        if difference > TOLERANCE:
            raise VerificationError(
                f"graph {name} differs from torch by {difference:.1e}; expected at most {TOLERANCE:.0e}."
                " No bundle was written."
            )
        self.differences[name] = difference

    def _graph(self, name: str, *, fake: bool) -> Graph:
        if name == "decode":
            decoder = self.decoder
            return decode_graph(self.plan, _emptied(decoder) if fake and decoder else decoder)
        model = WanModel(self.plan.spec).eval().requires_grad_(False) if fake else self._baked()
        return prompt_graph(model) if name == "prompt" else step_graph(model, self.plan)

    def _baked(self) -> WanModel:
        """The model as the bundle has it: what verification compares with."""
        if self._model is None:
            baked = open_tensors(self.folder / WEIGHTS)
            self._model = build_model(self.plan.spec, {name: baked.read(name) for name in baked.shapes})
        return self._model


def _emptied(decoder: StreamingDecoder) -> StreamingDecoder:
    """The same decoder with parameters of the same shapes and no contents (fake tensors are on)."""
    with unset_fake_temporarily():  # real tensors cannot be copied while fake ones are on
        empty = copy.deepcopy(decoder)
    state = {name: torch.empty(tensor.shape) for name, tensor in decoder.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    return empty.requires_grad_(False)


def _record(path: Path, traced: onnx.ModelProto, weights: str | None) -> GraphRecord:
    return GraphRecord(
        file=path.name,
        weights=weights,
        inputs={value.name: _tensor(value) for value in traced.graph.input},
        outputs={value.name: _tensor(value) for value in traced.graph.output},
    )


def _tensor(value: onnx.ValueInfoProto) -> TensorRecord:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return TensorRecord(str(dtype), tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))


def _files(paths: list[Path]) -> dict[str, FileRecord]:
    return {path.name: record_file(path) for path in sorted(paths)}


def _versions() -> dict[str, str]:
    return {
        "forcingkv": forcingkv.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }
