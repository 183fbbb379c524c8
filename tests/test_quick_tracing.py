"""Graphs that tests trace in less time (`tests/quick_tracing.py`) are those that torch traces."""

from __future__ import annotations

import re

import onnx_ir as ir
import pytest
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

from forcingkv.export import onnx_writer
from forcingkv.export.graphs import Graph, decode_graph, recache_graph, step_graph
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from tests import kept_traces, quick_tracing
from tests.conftest import mixed_map, random_model, small_spec
from tests.export.test_decode import spec_with
from tests.models.test_decoders import small_vae
from tests.runtime.test_context import spec_of

LONG = pytest.mark.long


def graph_of(name: str, policy: str) -> Graph:
    spec = {"decode": spec_with("wan-vae"), "recache": spec_of("kept")}.get(name, small_spec(layers=1))
    model = random_model(spec)
    plan = build_plan(spec, spec.geometry(), load_policy(policy), mixed_map(spec))
    if name == "decode":
        from forcingkv.models.decoders.wan_vae import WanVaeDecoder

        return decode_graph(plan, WanVaeDecoder(small_vae()))
    return {"step": step_graph, "recache": recache_graph}[name](model, plan)


def written(graph: Graph) -> str:
    """Numbers in names are those of the order of the names."""
    model = ir.to_proto(kept_traces._trace(lambda: graph)[1])
    onnx_writer._strip(model)
    known: dict[str, str] = {}
    return re.sub(
        r"\b(val_|node_\w*_|u)\d+\b",
        lambda found: known.setdefault(found[0], f"{found[1]}{len(known)}"),
        str(model),
    )


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("step", "forcing-kv"),
        pytest.param("step", "full", marks=LONG),
        pytest.param("step", "window", marks=LONG),
        pytest.param("recache", "full", marks=LONG),
        pytest.param("decode", "window", marks=LONG),
    ],
)
def test_they_are_those_of_torch(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(name, policy)
    assert _fx_passes.decompose_with_registry is quick_tracing.decomposed
    found = written(graph)
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", quick_tracing.DECOMPOSED)
    monkeypatch.setattr(_TypePromotionInterpreter, "run_node", quick_tracing.RUN_NODE)
    assert written(graph) == found
    assert found.count("node {") > 20
