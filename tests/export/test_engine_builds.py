"""Engines: real TensorRT-RTX builds without a GPU, and what is refused before and during one."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest

from forcingkv.export import EngineError, bundle_parts, bundle_writer, engine_builder, export_bundle
from forcingkv.export.engine_builder import EngineTarget, build_engine, run_child
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.headmaps.errors import InputError
from forcingkv.models.checkpoint import random_weights
from forcingkv.models.presets import load_spec
from forcingkv.prune import kernel_compiler
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.bundle import Manifest
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.flavour import FLAVOURS, Flavour
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Decoder
from tests.conftest import headmap_of, mixed_map, random_model, small_spec
from tests.exported import shared_bundle

RTX = FLAVOURS["tensorrt-rtx"]
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None or find_spec("triton") is None,
    reason="needs tensorrt-rtx and triton: pip install 'forcingkv[tensorrt-rtx,engines]'",
)

STATIC = [[0, 1], [2], []]


@pytest.fixture(scope="module")
def built() -> Path:
    """A bundle with engines: a layer of two groups, and two that prune."""
    spec = small_spec(layers=3, heads=4, head_dim=16)
    return shared_bundle(
        spec,
        random_model(spec).state_dict(),
        load_policy("forcing-kv"),
        headmap=headmap_of(spec, STATIC),
        target="tensorrt-rtx",
        sms=(89,),
    )


def parse_report(graph: Path, flavour: Flavour, *, plugins: bool) -> dict[str, Any]:
    """What the parser makes of a graph, where the plugins are registered or not. Builds nothing."""
    return run_child(graph, flavour, plugins="python" if plugins else None)


def rebuilt(bundle: Path, graph: str, sm: int, out: Path, *, plugins: bool = True) -> str:
    """The digest of an engine built again."""
    opened = Bundle.open(bundle)
    plan = opened.plan
    if not plugins:
        assert plan.phases  # known from here on, though the builder is told that nothing is pruned
        vars(plan)["choice"] = None
    out.mkdir(exist_ok=True)
    target = EngineTarget(RTX, (sm,))
    build_engine(opened.graph(graph), graph, plan, target, sm, out / "again.engine")
    return hashlib.sha256((out / "again.engine").read_bytes()).hexdigest()


@needs_rtx
@pytest.mark.long
@pytest.mark.parametrize("policy", ["dummy-forcing", "dummy-forcing-6", "forcing-kv-krea"])
def test_what_heads_see_before_the_split_is_built(policy: str) -> None:
    """A profile for each phase: of the opening chunk, of those before the split, of those after it."""
    spec, chosen = small_spec(layers=1, heads=4, head_dim=16), load_policy(policy)
    row = tuple(list(chosen.groups)[head % len(chosen.groups)] for head in range(spec.heads))
    headmap = HeadMap(ModelIdentity(spec.name, 1, spec.heads), (row,), Rule("given"))
    weights = random_model(spec).state_dict()
    bundle = shared_bundle(spec, weights, chosen, headmap=headmap, target="tensorrt-rtx", sms=(89,))
    manifest = Bundle.open(bundle).manifest
    step = next(engine for engine in manifest.engines if engine.graph == "step")
    assert step.phases == len(manifest.plan.phases) == (4 if policy.endswith("6") else 3)
    assert not step.needs_plugin


@needs_rtx
@pytest.mark.slow
def test_the_bundle_has_an_engine_of_each_graph(built: Path) -> None:
    manifest = Bundle.open(built).manifest
    assert [(e.graph, e.sm) for e in manifest.engines] == [
        (graph, 89) for graph in ("prompt", "step", "decode")
    ]
    assert manifest.compute == "bfloat16"
    assert manifest.graphs["step"].inputs["cache.0.static.sink.keys"].dtype == "bfloat16"
    pruning = sum("dynamic" in layer for layer in manifest.plan.layers)
    for engine in manifest.engines:
        step = engine.graph == "step"
        assert engine.plugin_layers == (pruning if step else 0)
        assert engine.needs_plugin == step
        assert engine.phases == (len(manifest.plan.phases) if step else 1)
        assert engine.version
        assert min(engine.layers, engine.seconds, engine.peak_bytes) > 0
        assert manifest.files[engine.file].bytes >= engine.weight_bytes
    assert {kernel.sm for kernel in manifest.kernels} == {89}
    assert all(kernel.spill_bytes == 0 for kernel in manifest.kernels)


@needs_rtx
@pytest.mark.slow
@pytest.mark.long
def test_two_builds_give_the_same_digest(built: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(built).manifest
    first = next(engine for engine in manifest.engines if engine.graph == "step")
    assert rebuilt(built, "step", 89, tmp_path) == manifest.files[first.file].sha256


@needs_rtx
@pytest.mark.slow
def test_the_plugin_is_in_the_network_where_it_is_registered_and_the_body_where_not(
    built: Path, tmp_path: Path
) -> None:
    graph, plan = Bundle.open(built).graph("step"), Bundle.open(built).plan
    pruning = sum(any(role.chooses for group in groups for role in group.roles) for groups in plan.layers)
    assert parse_report(graph, RTX, plugins=True)["plugin_layers"] == pruning
    without = parse_report(graph, RTX, plugins=False)
    assert without["plugin_layers"] == 0
    assert without["layers"] > parse_report(graph, RTX, plugins=True)["layers"] + 10 * pruning
    with_plugin = next(engine for engine in Bundle.open(built).manifest.engines if engine.graph == "step")
    with_body = rebuilt(built, "step", 89, tmp_path, plugins=False)
    assert with_body != Bundle.open(built).manifest.files[with_plugin.file].sha256, "both build"


@needs_rtx
@pytest.mark.slow
def test_an_engine_bundle_is_not_for_onnx_runtime(built: Path) -> None:
    with pytest.raises(InputError, match=r"compute in bfloat16, for TensorRT.*--target onnx"):
        Session.open(built)


def builds_nothing(
    graph: Path, name: str, plan: CachePlan, target: EngineTarget, sm: int, file: Path, *, kernels: object
) -> EngineRecord:
    """Stands in for `build_engine`."""
    file.write_bytes(b"an engine")
    return EngineRecord(
        graph=name,
        flavour=target.flavour.name,
        version="11",
        sm=sm,
        file=f"engines/{file.name}",
        layers=1,
        plugin_layers=1,
        needs_plugin=False,
        phases=1,
        weight_bytes=1,
        activation_bytes=1,
        scratch_bytes=1,
        seconds=1.0,
        peak_bytes=1,
    )


def builds_the_step_alone(graph: Path, name: str, *given: Any, **more: Any) -> EngineRecord:
    """Of the engines the one that has most in it is built."""
    return (build_engine if name == "step" else builds_nothing)(graph, name, *given, **more)


def parsed_layers(layers: int, folder: Path) -> dict[str, int]:
    """Layers of the step graph of a small model, as parsed."""
    spec = small_spec(layers=layers, heads=6, head_dim=16)
    export_bundle(
        spec,
        random_model(spec).state_dict(),
        load_policy("forcing-kv"),
        folder,
        headmap=mixed_map(spec),
        target="tensorrt-rtx",
        sms=(89,),
    )
    report: dict[str, int] = parse_report(folder / "step.onnx", RTX, plugins=True)
    return report


@needs_rtx
@pytest.mark.slow
@pytest.mark.long
def test_a_block_costs_at_most_a_third_of_the_layers_of_a_naive_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 450 layers for a block as the reference writes it; 930 for ours before (docs/engines.md).

    The number depends on which groups and roles there are, not on any size. Graphs are parsed, not built.
    """
    monkeypatch.setattr(bundle_parts, "GRAPHS", ("step",))
    monkeypatch.setattr(bundle_writer, "ALL_GRAPHS", ("step",))
    monkeypatch.setattr(bundle_writer, "check_records", lambda *_: None)  # of a bundle, which this is not
    monkeypatch.setattr(bundle_parts, "build_engine", builds_nothing)
    monkeypatch.setattr(kernel_compiler, "compile_kernels", lambda *_, **__: [])
    one, two = (parsed_layers(layers, tmp_path / str(layers)) for layers in (1, 2))
    assert two["plugin_layers"] - one["plugin_layers"] == 1
    assert two["layers"] - one["layers"] <= 450 / 3


@needs_rtx
@pytest.mark.slow
@pytest.mark.long
def test_two_layers_of_public_width_build_at_480p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_parts, "build_engine", builds_the_step_alone)
    # A decoder is not what this is about: "pixels" that are as many as the latents of 832x480.
    pixels = {"latent_channels": 3, "decoder": Decoder("pixels")}
    spec = replace(load_spec("self-forcing"), layers=2, **pixels)  # type: ignore[arg-type]
    assert spec.geometry("104x60").frame_tokens == 1560
    manifest = export_bundle(
        spec,
        random_weights(spec),
        load_policy("forcing-kv"),
        tmp_path / "b",
        headmap=mixed_map(spec),
        resolution="104x60",
        target="tensorrt-rtx",
        sms=(89,),
    )
    step = next(engine for engine in manifest.engines if engine.graph == "step")
    assert (step.plugin_layers, step.phases) == (1, 3)
    assert step.activation_bytes < 1e9, "scores written out would be more"
    assert step.peak_bytes < 4e9
    assert manifest.plan.kv_bytes == Bundle.open(tmp_path / "b").plan.kv_bytes("bfloat16")
    assert not manifest.verification


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "phases", "profiles"),
    [("full", 21, (0, 1, 20)), pytest.param("window", 10, (0, 1, 2, 3, 4, 9), marks=pytest.mark.long)],
)
def test_an_engine_of_a_frame_wise_model_has_few_profiles(
    policy: str, phases: int, profiles: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine cannot be loaded without a GPU; in its file names of tensors end in the profile's number."""
    monkeypatch.setattr(bundle_parts, "GRAPHS", ("step",))
    monkeypatch.setattr(bundle_writer, "ALL_GRAPHS", ("step",))
    monkeypatch.setattr(bundle_writer, "check_records", lambda *_: None)  # of a bundle, which this is not
    spec = small_spec(layers=1, heads=4, head_dim=16, frames_per_chunk=1, attended_frames=21)
    weights = random_model(spec).state_dict()
    where = tmp_path / "b"
    manifest = export_bundle(spec, weights, load_policy(policy), where, target="tensorrt-rtx", sms=(89,))
    (step,) = manifest.engines
    assert (step.phases, step.profiles, step.decomposed) == (phases, profiles, None)
    named = re.findall(rb"latents \[profile (\d+)\]", (where / step.file).read_bytes())
    assert {0, *map(int, named)} == set(range(len(profiles))), "the first has no number"


@needs_rtx
@pytest.mark.slow
@pytest.mark.long
def test_engine_bundles_can_be_verified_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_parts, "build_engine", builds_the_step_alone)
    spec = small_spec(layers=1, heads=4, head_dim=16)
    manifest: Manifest = export_bundle(
        spec,
        random_model(spec).state_dict(),
        load_policy("full"),
        tmp_path / "b",
        target="tensorrt-rtx",
        sms=(89,),
        dtype="float16",
        verify=True,
    )
    assert set(manifest.verification) == {"prompt", "step", "decode"}
    assert max(manifest.verification.values()) <= 1e-5
    assert manifest.compute == "float16"
    assert not list((tmp_path / "b").glob("*.float32.onnx"))


@needs_rtx
@pytest.mark.slow
def test_ahead_of_time_the_graph_has_nodes_of_one_kernel_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder of the flavour that has such plugins is stood in for; the graph is parsed by RTX."""
    asked: list[EngineTarget] = []

    def build(
        graph: Path, name: str, plan: CachePlan, target: EngineTarget, sm: int, file: Path, **more: Any
    ) -> object:
        asked.append(target)
        return builds_nothing(graph, name, plan, target, sm, file, **more)

    target = EngineTarget(FLAVOURS["tensorrt"], (90,), aot=True)
    monkeypatch.setattr(bundle_writer, "engine_target", lambda name, sms, aot: target)
    monkeypatch.setattr(bundle_parts, "build_engine", build)
    spec = small_spec(layers=3, heads=4, head_dim=16)
    manifest = export_bundle(
        spec,
        random_model(spec).state_dict(),
        load_policy("forcing-kv"),
        tmp_path / "b",
        headmap=headmap_of(spec, STATIC),
        target="tensorrt",
        aot=True,
    )
    assert asked == [target] * 3
    assert manifest.kernels == (), "they are in the engines"
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "b" / "step.onnx").graph.node)
    pruning = [
        nodes[name] for name in ("DynamicPrune", "TokenCosines", "SelectSegments", "DynamicPruneFollow")
    ]
    assert pruning == [0, 1, 1, 2]
    assert parse_report(tmp_path / "b" / "step.onnx", RTX, plugins=False)["plugin_layers"] == 0


# What goes wrong while building.


@needs_rtx
def test_a_graph_that_the_parser_refuses(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph at all")
    with pytest.raises(EngineError, match=r"(?s)tensorrt-rtx failed on broken\.onnx.*parser refused"):
        parse_report(tmp_path / "broken.onnx", RTX, plugins=False)


def test_an_abort_is_an_error_with_the_words_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import os, sys\nprint('[E] no such library', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    monkeypatch.setattr(engine_builder, "CHILD", child)
    with pytest.raises(EngineError, match=r"was ended by signal 6 on g.onnx(?s:.*)no such library"):
        parse_report(tmp_path / "g.onnx", replace(RTX, libraries="no_such_package"), plugins=False)


@needs_rtx
@pytest.mark.slow
def test_memory_is_bounded(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_builder, "available_bytes", lambda: 120_000_000)
    with pytest.raises(EngineError, match=r"memory bound 0\.1 GB"):
        rebuilt(built, "step", 89, tmp_path)
    assert not (tmp_path / "again.engine").exists()
