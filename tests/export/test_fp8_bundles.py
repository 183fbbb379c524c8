"""Bundles in FP8: calibration, what is asked for on the command line, verification, sessions, engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from forcingkv.commands.console import default_prompts
from forcingkv.commands.export import texts_for
from forcingkv.export import VerificationError, bundle_parts, export_bundle, fp8
from forcingkv.export.bake import baked_bytes, baked_model
from forcingkv.export.fp8 import CalibrationTexts, calibration_plan, input_scale, rounded_inputs
from forcingkv.export.onnx_writer import write_onnx
from forcingkv.export.precision import Precision
from forcingkv.export.space import check_memory_to_calibrate
from forcingkv.headmaps import HeadMap, InputError
from forcingkv.models.checkpoint import build_model, load_weights, weight_shapes
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle, Session, memory
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.roles import Recent
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words, write_embeds
from tests.conftest import Ran, headmap_of, random_model, small_spec
from tests.exported import ROOT, shared_bundle

FP8 = Precision("float32", "bfloat16", "fp8")
INPUTS = ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
"""The layers of a block that have an input of their own: self_attn.k and v take that of q."""
LAYERS = (*INPUTS, "self_attn.k", "self_attn.v")


def small(layers: int = 2) -> tuple[ModelSpec, dict[str, Tensor], HeadMap]:
    spec = small_spec(layers=layers)
    return spec, random_model(spec).state_dict(), headmap_of(spec, [[0], [1, 2]][:layers])


def prompts(spec: ModelSpec, *texts: str) -> CalibrationTexts:
    return CalibrationTexts("prompts", texts, tuple(encode_words(spec, text) for text in texts))


@pytest.fixture(scope="module")
def exported() -> Path:
    spec, weights, headmap = small()
    return shared_bundle(
        spec,
        weights,
        load_policy("forcing-kv"),
        headmap=headmap,
        dtype="fp8",
        calibration=prompts(spec, "a b", "b a d"),
    )


# Calibration.


def test_calibration_runs_at_a_smaller_resolution() -> None:
    headmap = headmap_of(spec := load_spec("self-forcing"), [list(range(6))] * 30)
    pixels = {}
    for name in ("480p", "720p", "1080p"):
        plan = build_plan(spec, spec.geometry(name), load_policy("forcing-kv"), headmap)
        smaller = calibration_plan(plan)
        pixels[name] = (smaller.geometry.width, smaller.geometry.height)
        assert smaller.frame_tokens <= fp8.FRAME_TOKENS
        assert smaller.choice is not None
        assert smaller.choice.split.kept_tokens * 6 == smaller.frame_tokens
        assert smaller.layers == plan.layers
        assert smaller.phases[-1].first_chunk + 1 == fp8.CHUNKS, "every phase is seen"
    assert pixels == {"480p": (416, 240), "720p": (416, 240), "1080p": (384, 208)}
    demo = load_spec("demo")
    plan = build_plan(demo, demo.geometry(), load_policy("full"))
    assert calibration_plan(plan) is plan, "its position table fits one resolution"


def calibrated(spec: ModelSpec, plan: CachePlan, weights: Mapping[str, Tensor]) -> dict[str, float]:
    model = build_model(spec, weights)
    scales, record = fp8.calibrate(model, plan, FP8, prompts(spec, "a b", "c"))
    assert scales == {name: input_scale(value) for name, value in record.largest.items()}
    assert not any(module._forward_pre_hooks for module in model.modules()), "no hook stays"
    return record.largest


def test_calibration_sees_the_largest_input_whatever_the_order_of_heads() -> None:
    spec, weights, headmap = small()
    policy = load_policy("full")
    plan = build_plan(spec, spec.geometry(), policy)
    largest = calibrated(spec, plan, weights)
    assert set(largest) == {f"blocks.{n}.{layer}" for n in range(spec.layers) for layer in LAYERS}
    assert largest == calibrated(spec, plan, weights)
    orders = head_orders(spec, load_policy("forcing-kv"), headmap)
    permuted = calibrated(spec, plan, permute_heads(weights, spec, orders))
    assert permuted == pytest.approx(largest, rel=1e-4)
    for n in range(spec.layers):
        shared = {largest[f"blocks.{n}.self_attn.{part}"] for part in "qkv"}
        assert len(shared) == 1, "one input"


def test_calibration_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights, _ = small()
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    weights["blocks.1.self_attn.v.bias"][0] = torch.nan
    with pytest.raises(InputError, match=r"^calibration: blocks\.1\.self_attn\.o takes values that are not"):
        calibrated(spec, plan, weights)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    with pytest.raises(InputError, match=r"for FP8 needs about 1\.5 GB .*1\.0 GB are available.*bfloat16"):
        check_memory_to_calibrate(plan)


def test_a_bundle_is_verified_and_says_what_it_was_calibrated_with(exported: Path) -> None:
    manifest = Bundle.open(exported).manifest
    assert set(manifest.verification) == {"prompt", "step", "step.fp8", "decode"}
    share = manifest.verification["step.fp8"]
    assert share <= bundle_parts.ROUNDED_TOLERANCE
    assert max(v for name, v in manifest.verification.items() if name != "step.fp8") <= 1e-5
    assert (manifest.compute, manifest.linear, manifest.multiplies_in) == ("float32", "fp8", "fp8")
    record = manifest.calibration
    assert record is not None
    assert (record.texts, record.prompts) == ("prompts", ("a b", "b a d"))
    assert (record.chunks, record.seed, record.resolution) == (4, 0, (12, 8))
    assert len(record.largest) == 2 * len(LAYERS)
    assert not list(exported.glob("*exact*")), "what only verification needs is gone"
    graph = onnx.load(exported / "step.onnx", load_external_data=False).graph
    rounded = Counter(node.input[1] for node in graph.node if node.op_type == "QuantizeLinear")
    assert rounded == {f"blocks.{n}.{layer}.input_scale": 1 for n in range(2) for layer in INPUTS}
    for tensor in graph.initializer:
        if tensor.name in rounded:
            largest = record.largest[tensor.name.removesuffix(".input_scale")]
            assert onnx.numpy_helper.to_array(tensor) == input_scale(largest)
    pointing = {t.name: t.data_type for t in graph.initializer if t.external_data}
    stored = [name for name in load_file(exported / "weights.safetensors") if name in pointing]
    assert sum(pointing[name] == onnx.TensorProto.FLOAT8E4M3FN for name in stored) == 2 * len(LAYERS)
    onnx.checker.check_model(str(exported / "step.onnx"))


def test_a_graph_that_rounds_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inputs saturate, as if calibration had seen a hundredth."""
    spec, weights, _ = small(layers=1)

    def write(*args: Any, input_scales: Mapping[str, float], **options: Any) -> onnx.ModelProto:
        return write_onnx(*args, input_scales={n: s / 100 for n, s in input_scales.items()}, **options)

    monkeypatch.setattr(bundle_parts, "write_onnx", write)
    with pytest.raises(VerificationError, match=r"graph step\.fp8 differs from torch by .* at most 2e\+00"):
        export_bundle(
            spec,
            weights,
            load_policy("full"),
            tmp_path / "b",
            dtype="fp8",
            calibration=prompts(spec, "a"),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_session_makes_what_torch_makes(exported: Path) -> None:
    """Over the first chunk, as far apart as at most half of what FP8 changes: see `quantized_differences`."""
    bundle, prompt = Bundle.open(exported), "b a d"
    spec, plan = bundle.plan.spec, bundle.plan
    model = baked_model(spec, exported / "weights.safetensors")
    assert bundle.manifest.calibration is not None
    scales = {name: input_scale(value) for name, value in bundle.manifest.calibration.largest.items()}
    text, noise = torch.from_numpy(encode_words(spec, prompt)), seeded_noise(plan, 11)
    plain = next(generate(model, plan, text, noise, 1)).latents
    with rounded_inputs(model, scales):
        rounding = next(generate(model, plan, text, noise, 1)).latents
    with Session.open(exported) as session:
        chunks = list(session.generate(prompt, seed=11, chunks=5))
    found = torch.from_numpy(chunks[0].latents)
    assert (found - rounding).norm() <= (rounding - plain).norm() / 2
    assert all(np.isfinite(chunk.latents).all() for chunk in chunks)


def asked(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, *words: object) -> CalibrationTexts:
    """What `forcingkv export` would calibrate with."""
    asked: list[CalibrationTexts] = []

    def stop(*args: object, calibration: CalibrationTexts, **options: object) -> None:
        asked.append(calibration)
        raise VerificationError("far enough")

    monkeypatch.setattr("forcingkv.export.export_bundle", stop)
    assert run("export", "--dtype", "fp8", "--out", "unused", *words).code == 1
    return asked[0]


def test_texts_of_the_command(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = asked(run, monkeypatch, "--model", "demo")
    assert shipped.prompts == tuple(default_prompts("demo")[:4])
    assert shipped.kind == "prompts"
    np.testing.assert_array_equal(shipped.arrays[3], encode_words(load_spec("demo"), shipped.prompts[3]))
    (tmp_path / "prompts.txt").write_text("a 3 moving left\n")
    given = asked(run, monkeypatch, "--model", "demo", "--calibration", tmp_path / "prompts.txt")
    assert given.prompts == ("a 3 moving left",)
    public = ("--model", "self-forcing", "--random-weights")
    drawn = asked(run, monkeypatch, *public)
    assert (drawn.kind, drawn.prompts) == ("random", ())
    assert [array.shape for array in drawn.arrays] == [(1, 512, 4096)] * 2
    write_embeds(tmp_path / "e.safetensors", ["one", "two"], [np.ones((3, 4096), np.float32)] * 2, {})
    read = asked(run, monkeypatch, *public, "--calibration", tmp_path / "e.safetensors")
    assert (read.kind, read.prompts) == ("embeddings", ("one", "two"))
    assert read.arrays[1].sum() == 3 * 4096


def test_a_model_without_texts_at_hand_needs_a_file() -> None:
    spec = load_spec("self-forcing")
    with pytest.raises(InputError, match=r"none ship with it; expected --calibration FILE.*forcingkv encode"):
        texts_for(spec, None, random=False)


NEAR = Policy("near", "every head sees the chunk before", {"all": (Recent(3),)})
"""Two phases only."""


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_model_draws_the_same_video_in_fp8() -> None:
    """Seen: 37 dB in the first chunk on average over 20 prompts (29 for the worst), where weights in
    bfloat16 alone give 57. Later chunks drift apart; their digits are read as often as those of float32."""
    spec = load_spec("demo")
    weights = load_weights(spec)
    bundle = shared_bundle(  # of graphs that were traced for `demo_bundle`
        spec,
        weights,
        load_policy("forcing-kv"),
        headmap=HeadMap.read(ROOT / "headmaps" / "maps" / "demo.json"),
        dtype="fp8",
        verify=False,
        calibration=prompts(spec, default_prompts("demo")[0]),
    )
    model, errors = build_model(spec, weights), []
    with Session.open(bundle) as session:
        for seed, prompt in enumerate(default_prompts("demo")[20:22]):
            found = next(session.generate(prompt, seed=seed, chunks=1)).latents.clip(-1, 1)
            text = torch.from_numpy(encode_words(spec, prompt))
            chunk = next(generate(model, session.plan, text, seeded_noise(session.plan, seed), 1))
            errors.append(float(np.mean((found - chunk.latents.numpy().clip(-1, 1)) ** 2)))
    decibels = [10 * np.log10(4 / error) for error in errors]
    assert min(decibels) > 22, decibels
    assert np.mean(decibels) > 30, decibels


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="needs tensorrt-rtx: pip install 'forcingkv[tensorrt-rtx]'",
)
@pytest.mark.long
def test_tensorrt_builds_engines() -> None:
    spec = small_spec(layers=2, heads=4, head_dim=16, ffn_width=64)
    bundle = shared_bundle(
        spec,
        random_model(spec).state_dict(),
        NEAR,
        dtype="fp8",
        target="tensorrt-rtx",
        sms=(89,),
        calibration=prompts(spec, "a b"),
    )
    manifest = Bundle.open(bundle).manifest
    assert (manifest.compute, manifest.verification) == ("bfloat16", {})
    assert manifest.calibration is not None
    matrices = sum(shape[0] * shape[1] for name, shape in weight_shapes(spec).items() if FP8.quantizes(name))
    (step,) = (engine for engine in manifest.engines if engine.graph == "step")
    rest = baked_bytes(spec, Precision("bfloat16", "bfloat16")) - 2 * matrices
    assert matrices < step.weight_bytes < matrices + rest, "a byte each"
