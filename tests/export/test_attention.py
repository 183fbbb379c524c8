"""Attention without a fused kernel: TensorRT decomposes it; an engine that is too large by it is refused."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from forcingkv.export import EngineError, engine_builder
from forcingkv.export.attention import Attention, attentions_of
from forcingkv.export.engine_builder import EngineTarget, build_engine, decomposed
from forcingkv.export.tensorrt_passes import DECOMPOSABLE
from forcingkv.runtime.flavour import FLAVOURS
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import small_spec

RTX = EngineTarget(FLAVOURS["tensorrt-rtx"], (89,))
LONE = Attention(1, 1, 1560, 1, 4680, 128, TensorProto.BFLOAT16)
"""What TensorRT-RTX 1.7 has no fused kernel for on sm_89."""


@pytest.fixture(scope="module")
def plan() -> CachePlan:
    """Any plan: graphs other than `step` take nothing of it."""
    spec = small_spec(heads=4)
    return build_plan(spec, spec.geometry(), load_policy("window"))


def alone(path: Path, attention: Attention) -> Path:
    """A graph of one node that may be decomposed, as export writes it."""
    attention.write(path)
    model = onnx.load(path)
    model.graph.node[0].name = "self_attention"
    model.graph.node[0].attribute.append(helper.make_attribute(DECOMPOSABLE, 1))
    onnx.save(model, path)
    return path


def test_bytes_of_an_attention() -> None:
    grouped = Attention(2, 4, 10, 1, 30, 8, TensorProto.FLOAT)
    assert grouped.scores_bytes == 2 * 4 * 10 * 30 * 4
    assert grouped.tensor_bytes == 2 * (2 * 4 * 10 + 2 * 30) * 8 * 4
    assert str(LONE) == "attention of 1 head of width 128 in bfloat16, 1,560 queries and 4,680 keys"
    assert str(grouped) == "attention of 4 heads of width 8 in float32, 10 queries and 30 keys"


def test_attentions_are_found_in_the_phase_in_which_they_see_most() -> None:
    """Two alike, one of a phase that varies; the largest tensor is none of theirs."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 23]>
    g (bfloat16[1, 2, 600, 8] q, bfloat16[1, 1, cached, 8] k, bfloat16[1, 1, 600, 8] new)
      => (bfloat16[1, 2, 600, 8] a, bfloat16[1, 2, 600, 8] b, bfloat16[1, 2, 600, 8] c,
          bfloat16[9, 2, 600, 8] d)
      <bfloat16[9, 1, 1, 1] nine = {1, 1, 1, 1, 1, 1, 1, 1, 1}> {
        keys = Concat <axis = 2> (k, new)
        [varies] a = Attention <scale = 1.0> (q, keys, keys)
        [first] b = Attention <scale = 1.0> (q, new, new)
        [second] c = Attention <scale = 1.0> (q, new, new)
        d = Mul(q, nine)
    }""")
    found = attentions_of(model, [{"k": (1, 1, tokens, 8)} for tokens in (0, 900, 300)])
    kind = TensorProto.BFLOAT16
    assert dict(found.nodes) == {
        Attention(1, 2, 600, 1, 1500, 8, kind): ["varies"],
        Attention(1, 2, 600, 1, 600, 8, kind): ["first", "second"],
    }
    assert found.largest == 9 * 2 * 600 * 8 * 2
    assert found.activation_bound == 16 << 20, "the workspace that small graphs have too"
    large = onnx.ModelProto()
    large.CopyFrom(model)
    found = attentions_of(large, [{"k": (1, 1, 2_000_000, 8)}])
    rows = 2 * 2 * 600 + 2 * 2_000_600
    assert found.activation_bound == 4 * (rows * 8 * 2 + 2_000_600 * 8 * 2)


def test_what_a_fused_engine_may_take_is_less_than_scores_take(tmp_path: Path) -> None:
    """Seen, TensorRT-RTX 1.7: 30.4 MB of activations without a fused kernel, 2.4 MB with one (of 2 heads)."""
    for heads in (1, 2):
        attention = replace(LONE, heads=heads, key_heads=heads)
        found = attentions_of(onnx.load(alone(tmp_path / "one.onnx", attention)), [])
        assert list(found.nodes) == [attention]
        assert 2_396_160 < found.activation_bound < 30_401_536


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx: forcingkv[tensorrt-rtx]")
def test_an_engine_that_writes_out_large_scores_is_refused(tmp_path: Path, plan: CachePlan) -> None:
    with pytest.raises(EngineError) as raised:
        build_engine(alone(tmp_path / "one.onnx", LONE), "prompt", plan, RTX, 89, tmp_path / "an.engine")
    words = " ".join(str(raised.value).split())
    assert words.startswith(
        "tensorrt-rtx has no fused kernel on sm_89 for attention of 1 head of width 128 in bfloat16,"
        " 1,560 queries and 4,680 keys (layer self_attention), and would write the scores of queries and keys"
        " to memory, up to 0.015 GB at once: the engine of one.onnx needs 0.030 GB of activations, where"
        " fused attention needs at most 0.017 GB. No bundle was written."
    )


class Child:
    """Stands in for the child: an engine that decomposes, of so many bytes, and which graphs are refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, activation_bytes: int, refused: list[int]) -> None:
        self.bytes, self.refused, self.asked = activation_bytes, refused, []  # type: ignore[var-annotated]
        monkeypatch.setattr(engine_builder, "run_child", self)

    def __call__(self, graph: Path, flavour: object, **request: Any) -> dict[str, Any]:
        self.asked.append(request)
        if "probes" in request:
            for path in request["probes"]:
                (node,) = onnx.load(path).graph.node
                assert DECOMPOSABLE not in {attribute.name for attribute in node.attribute}
            return {"refused": self.refused}
        sizes = dict.fromkeys(("weight_bytes", "scratch_bytes", "peak_bytes", "layers", "plugin_layers"), 1)
        return sizes | {
            "activation_bytes": self.bytes,
            "seconds": 1.0,
            "version": "11",
            "decomposed": self.bytes > 0,
        }


def test_one_that_stays_small_is_built_and_told(
    tmp_path: Path, plan: CachePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = alone(tmp_path / "one.onnx", LONE)
    Child(monkeypatch, 9_000_000, [0])
    engine = build_engine(graph, "prompt", plan, RTX, 89, tmp_path / "an.engine")
    assert engine.decomposed == (f"{LONE} (layer self_attention)",)
    (warning,) = decomposed([engine])
    assert "no fused kernel on sm_89 for some attention in prompt, which is slower" in warning
    Child(monkeypatch, 9_000_000, [])
    engine = build_engine(graph, "prompt", plan, RTX, 89, tmp_path / "an.engine")
    assert engine.decomposed == ("an attention that has one when it is alone",)


def test_where_all_is_fused_nothing_is_asked_nor_told(
    tmp_path: Path, plan: CachePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(monkeypatch, 0, [])
    engine = build_engine(tmp_path / "none.onnx", "prompt", plan, RTX, 89, tmp_path / "an.engine")
    assert engine.decomposed is None
    assert decomposed([engine]) == []
    assert len(child.asked) == 1
