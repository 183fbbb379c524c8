"""Graphs that tests take from one another (`tests/kept_traces.py`): the right ones, and no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from forcingkv.export import bundle_parts, graphs, onnx_writer
from forcingkv.export.precision import Precision, precision_of
from forcingkv.models import wan
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.taehv import TaehvDecoder
from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from forcingkv.models.encoders.wan_vae import WanVaeEncoder
from forcingkv.models.wan import WanModel
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.roles import Recent
from forcingkv.runtime.spec import ModelSpec, Schedule
from tests import exported, kept_traces
from tests.conftest import small_spec
from tests.models.test_decoders import SMALL, SMALL22, small_lighttae, small_taehv, small_vae

FLOAT = precision_of("float32", "onnx")
Writer = Callable[..., str]


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """Has a graph traced; says which one it is: each that is traced anew has another name, and no nodes."""
    monkeypatch.setattr(exported, "CACHE", tmp_path / "made")
    monkeypatch.setattr(kept_traces, "_here", {})
    traced: list[object] = []

    def tracing(make: object) -> tuple[object, ir.Model]:
        traced.append(make)
        return "a graph", ir.Model(ir.Graph((), (), nodes=(), name=str(len(traced))), ir_version=10)

    def write_onnx(make: kept_traces.Make, path: Path, *_: object, **__: object) -> str | None:
        return onnx_writer._traced(make)[1].graph.name

    monkeypatch.setattr(kept_traces, "_trace", tracing)
    monkeypatch.setattr(bundle_parts, "write_onnx", write_onnx)

    def asked(
        name: str,
        spec: ModelSpec,
        policy: Policy,
        precision: Precision = FLOAT,
        resolution: str | None = None,
        decoder: StreamingDecoder | None = None,
        **more: Any,
    ) -> str:
        plan = build_plan(spec, spec.geometry(resolution), policy)
        writer = bundle_parts.PartsWriter(
            tmp_path, plan, decoder, precision, None, False, True, print, **more
        )
        return str(writer._trace(name, tmp_path / f"{name}.onnx", precision))

    return asked


def test_the_same_graph_is_traced_once(trace: Writer) -> None:
    spec, full, window = small_spec(), load_policy("full"), load_policy("window")
    other = replace(spec, name="other", fps=1.0)
    wide, stored = replace(spec, width=16), Precision("float32", "bfloat16")
    assert trace("step", spec, window) == trace("step", other, window, stored) == "1"
    assert trace("prompt", spec, full) == trace("prompt", wide, window) == "2"
    assert trace("decode", spec, full) == trace("decode", replace(spec, layers=2), full) == "3"


def test_another_graph_is_traced(trace: Writer) -> None:
    spec, window = small_spec(), load_policy("window")
    half = Precision("bfloat16", "bfloat16")
    asked: list[tuple[object, ...]] = [
        ("step", spec, window),
        ("step", spec, load_policy("full")),
        ("step", replace(spec, layers=2), window),
        ("step", replace(spec, width=16), window),
        ("step", replace(spec, epsilon=1e-5), window),
        ("step", replace(spec, schedule=Schedule((1000.0,))), window),
        ("step", spec, window, half),
        ("step", spec, window, FLOAT, "10x8"),
        ("prompt", spec, window),
        ("prompt", spec, window, half),
        ("prompt", replace(spec, text_length=4), window),
        ("decode", spec, window),
        ("decode", replace(spec, width=16), window),
        ("decode", spec, window, FLOAT, "10x8"),
    ]
    names = [trace(*words) for words in asked]
    assert len(set(names)) == len(asked), "each by itself"
    assert [trace(*words) for words in asked] == names, "and all are kept"


@pytest.mark.long
def test_decoders_and_encoders_are_known_by_their_layers(trace: Writer) -> None:
    words, strips = (small_spec(), load_policy("window"), FLOAT, None), Strips(2, 4, 1, 8)
    first, same, other = (WanVaeDecoder(small_vae(config)) for config in (SMALL, SMALL, SMALL22))
    encoder, of_another = (WanVaeEncoder(small_vae(config)) for config in (SMALL, SMALL22))
    with torch.no_grad():
        for tensor in (same.decoder.conv_in.weight, same.mean):
            tensor.add_(1)
    known = trace("step", *words)
    assert {trace("step", *words, one, encoder=encoder, strips=strips) for one in (first, other)} == {known}
    decode = trace("decode", *words, first)
    assert trace("decode", *words, same, encoder=encoder) == decode
    asked: list[tuple[str, StreamingDecoder, dict[str, object]]] = [
        ("decode", first, {}),
        ("decode", other, {}),
        ("decode", small_taehv(), {}),
        ("decode", TaehvDecoder((8, 6, 4, 4), 4), {}),
        ("decode", small_lighttae(), {}),
        ("decode", first, {"strips": strips}),
        ("decode", first, {"strips": replace(strips, count=3)}),
        ("decode_strip", first, {"strips": strips}),
        ("encode", first, {"encoder": encoder}),
        ("encode", first, {"encoder": of_another}),
    ]
    names = [trace(name, *words, decoder, **more) for name, decoder, more in asked]
    assert len(set(names)) == len(asked), "each by itself"
    assert trace("encode", *words, encoder=WanVaeEncoder(small_vae(SMALL))) == names[-2]
    first.patch = 2
    assert trace("decode", *words, first) != decode


def test_layers_of_tests_are_not_known(trace: Writer) -> None:
    class Mine(nn.ReLU):
        """As a test may define a layer, with any code."""

    words, decoder = (small_spec(), load_policy("window"), FLOAT, None), small_taehv()
    decoder.decoder[2] = Mine()
    assert trace("decode", *words, decoder) != trace("decode", *words, decoder)
    assert trace("step", *words, decoder) == trace("step", *words, decoder)


def test_where_something_else_takes_part_nothing_is_kept(
    trace: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what was kept before taken."""
    words = "step", small_spec(), load_policy("window")
    known = trace(*words)
    replaced: list[tuple[object, str, object]] = [
        (graphs, "step_graph", print),
        (wan, "rotate", None),
        (WanModel, "flow", lambda *_: None),
        (onnx_writer, "_initializers_to_inputs", print),
    ]
    for place, name, value in replaced:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert len({trace(*words), trace(*words), known}) == 3, name
        assert trace(*words) == known


def test_classes_of_tests_are_not_known(trace: Writer) -> None:
    class Mine(Recent):
        """As a test may define a role, with any code."""

    policy = Policy("mine", "", {"all": (Mine(3),)})
    assert trace("step", small_spec(), policy) != trace("step", small_spec(), policy)
    assert trace("prompt", small_spec(), policy) == trace("prompt", small_spec(), policy)


def test_a_test_may_ask_for_its_own(trace: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "step", small_spec(), load_policy("window")
    known = trace(*words)
    with kept_traces.traced_anew():
        assert onnx_writer._traced is not kept_traces._kept
    assert trace(*words) == known
