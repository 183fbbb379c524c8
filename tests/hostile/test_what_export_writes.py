"""What is allowed in a graph is what export writes: no less, or bundles would not open, and no more.

Export looks through each graph that it has written as the runtime will (`check_graph`), so every test that
exports anything compares too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from forcingkv.export import bundle_parts
from forcingkv.export.precision import precision_of
from forcingkv.export.tensorrt_passes import DECOMPOSABLE
from forcingkv.headmaps import InputError
from forcingkv.prune.onnx_operators import OPSET
from forcingkv.runtime import Bundle, graph_check
from forcingkv.runtime.graph_check import BODIES, OPERATORS, OPSETS
from forcingkv.runtime.graph_file import Node, read_graph
from forcingkv.runtime.graph_rules import RULES
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import random_model
from tests.export.test_decode import CASES, spec_with
from tests.export.test_encode import CONFIGS, encoding_bundle
from tests.export.test_fp8_bundles import prompts, small
from tests.export.test_int8 import int8_bundle
from tests.exported import demo_bundle, shared_bundle
from tests.runtime.conftest import small_bundle
from tests.runtime.test_bank import banking_bundle
from tests.runtime.test_remembered import remembering_bundle
from tests.runtime.test_tokens import budget_bundle


def bundles() -> Iterator[Path]:
    """Those of other tests, which are made once: every policy, decoder and dtype for ONNX Runtime."""
    yield demo_bundle()
    for name in ("full", "window", "forcing-kv", "dummy-forcing", "taehv", "large", "longlive", "switching"):
        yield small_bundle(name)
    for kind in CASES:
        spec = spec_with(kind)
        weights, policy = random_model(spec).state_dict(), load_policy("window")
        yield shared_bundle(spec, weights, policy, decoder=CASES[kind][0]())
    for kind in CONFIGS:
        yield encoding_bundle(kind)
    spec, quantized, headmap = small()
    policy, texts = load_policy("forcing-kv"), prompts(spec, "a b", "b a d")
    yield shared_bundle(spec, quantized, policy, headmap=headmap, dtype="fp8", calibration=texts)
    yield int8_bundle()
    yield remembering_bundle()
    yield banking_bundle("relative")
    yield budget_bundle("absolute")


def nodes_of(bundle: Path) -> Iterator[Node]:
    for file in bundle.glob("*.onnx"):
        yield from read_graph(file.read_bytes(), file.name).graph.all_nodes()


ELSEWHERE = {("", "Split"), ("", "Tile"), ("", "Identity")}
"""Of graphs for TensorRT alone (tests/export/test_engine_builds.py), and of outputs that every pass needs
beside those of clean passes (tests/export/test_branch_on_clean.py)."""


def test_operators_and_attributes_are_those_that_export_writes() -> None:
    written: dict[tuple[str, str], set[str]] = {}
    for bundle in bundles():
        assert Bundle.open(bundle).digest
        for node in nodes_of(bundle):
            written.setdefault((node.domain, node.op_type), set()).update(node.attributes)
    assert {
        kind: names - set(OPERATORS[kind]) for kind, names in written.items() if names - set(OPERATORS[kind])
    } == {}
    standard = {kind for kind in OPERATORS if kind[0] != "forcingkv"}
    assert standard - set(written) - ELSEWHERE == set(), "allowed, and written by nothing"
    written["", "DequantizeLinear"].add("axis")  # of scales a column, which graphs for TensorRT have
    written["", "Attention"].add(DECOMPOSABLE)  # which no graph for ONNX Runtime has
    unused = {kind: set(OPERATORS[kind]) - written[kind] for kind in standard & set(written)}
    assert {kind: names for kind, names in unused.items() if names} == {}


def test_the_tables_go_together() -> None:
    assert set(OPERATORS) - set(RULES) == {("", "If")}, "whose branches are followed instead"
    assert set(RULES) <= set(OPERATORS)
    assert {name for domain, name in OPERATORS if domain == "forcingkv"} == set(BODIES)
    assert OPSETS[""] == OPSET


def test_export_refuses_what_would_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(small_bundle("full"))
    precision = precision_of("float32", "onnx")
    writer = bundle_parts.PartsWriter(bundle.path, bundle.plan, None, precision, None, False, True, print)
    given = "prompt", bundle.graph("prompt"), bundle.manifest.graphs["prompt"]
    writer._check(*given)
    monkeypatch.delitem(graph_check.OPERATORS, ("", "Gelu"))
    with pytest.raises(InputError, match="the operator 'Gelu'"):
        writer._check(*given)
