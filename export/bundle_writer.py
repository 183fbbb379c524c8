"""Export: from weights and a head map to a bundle that the runtime opens."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor

import forcingkv
from forcingkv.export.graphs import Graph, decode_graph, prompt_graph, step_graph
from forcingkv.export.onnx_writer import to_onnx, write_onnx
from forcingkv.export.verify import graph_difference
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.models.checkpoint import build_model
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.runtime.bundle import HEADMAP, MANIFEST, GraphRecord, Manifest, PlanRecord, TensorRecord
from forcingkv.runtime.files import FileRecord, new_folder, record_file
from forcingkv.runtime.plan import build_plan
from forcingkv.runtime.policies import Policy
from forcingkv.runtime.spec import ModelSpec

__all__ = ["TOLERANCE", "VerificationError", "export_bundle"]

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
    say: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Bake the head map into the weights, trace the graphs, verify them, and write the bundle.

    Args:
        spec: the model.
        weights: its state dict, heads in their original order.
        policy: what each head group sees.
        out: the bundle's folder; written whole or not at all.
        headmap: needed where the policy tells heads apart.
        resolution: "WxH" or a name; None for the model's default.
        say: told what is being done.

    Raises:
        InputError: something does not fit; see `build_plan`.
        VerificationError: a graph differs from torch by more than `TOLERANCE`.
    """
    headmap = headmap if policy.needs_headmap else None
    plan = build_plan(spec, spec.geometry(resolution), policy, headmap)
    baked = permute_heads(weights, spec, head_orders(spec, policy, headmap))
    model = build_model(spec, baked)
    graphs = [prompt_graph(model), step_graph(model, plan), decode_graph(plan)]
    records: dict[str, GraphRecord] = {}
    differences: dict[str, float] = {}
    with new_folder(out, MANIFEST) as folder:
        written: list[Path] = []
        for graph in graphs:
            say(f"tracing {graph.name}")
            traced = to_onnx(graph)
            files = write_onnx(traced, folder / f"{graph.name}.onnx")
            records[graph.name] = _record(graph, traced, files)
            say(f"verifying {graph.name}")
            difference = graph_difference(graph, files[0], plan)
            if difference > TOLERANCE:
                raise VerificationError(
                    f"graph {graph.name} differs from torch by {difference:.1e};"
                    f" expected at most {TOLERANCE:.0e}. Nothing was written to {out}."
                )
            differences[graph.name] = difference
            written += files
        if headmap:
            headmap.write(folder / HEADMAP)
            written.append(folder / HEADMAP)
        manifest = Manifest(
            schema="forcingkv.bundle/1",
            model=spec,
            resolution=(plan.geometry.width, plan.geometry.height),
            policy=policy,
            plan=PlanRecord.of(plan),
            graphs=records,
            files=_files(written),
            versions=_versions(),
            headmap=headmap.digest if headmap else None,
            verification=differences,
        )
        (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return manifest


def _record(graph: Graph, traced: onnx.ModelProto, files: list[Path]) -> GraphRecord:
    return GraphRecord(
        file=files[0].name,
        weights=files[1].name if len(files) > 1 else None,
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
