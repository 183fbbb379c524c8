"""Export and runtime together: the bundle computes what torch does, and a spoilt one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from forcingkv.export import VerificationError, export_bundle
from forcingkv.export import bundle_parts as writer
from forcingkv.headmaps import HeadMap, InputError
from forcingkv.models.checkpoint import build_model, load_weights, random_weights
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.presets import load_spec
from forcingkv.prune.onnx_operators import graphs
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec, Schedule
from forcingkv.runtime.text import encode_words
from tests.conftest import headmap_of, random_model, small_spec
from tests.exported import demo_bundle, shared_bundle
from tests.runtime.conftest import small_bundle

PROMPT = "b a d"


def small(renoise: str = "fresh", layers: int = 4) -> tuple[ModelSpec, Mapping[str, Tensor], HeadMap]:
    schedule = Schedule((1000.0, 625.0), renoise=renoise)  # type: ignore[arg-type]
    spec = small_spec(schedule=schedule, layers=layers)
    return spec, random_model(spec).state_dict(), headmap_of(spec, [[0], [1, 2], [], [0, 1, 2]][:layers])


@pytest.fixture(scope="module")
def exported() -> Path:
    spec, weights, headmap = small()
    return shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap)


def differences(
    spec: ModelSpec, weights: Mapping[str, Tensor], headmap: HeadMap, policy: str, bundle: Path, prompt: str
) -> list[float]:
    """Largest difference of the latents of each of 10 chunks between ONNX Runtime and torch."""
    chosen = load_policy(policy)
    model = build_model(spec, permute_heads(weights, spec, head_orders(spec, chosen, headmap)))
    text = torch.from_numpy(encode_words(spec, prompt))
    with Session.open(bundle) as session:
        streamed = session.generate(prompt, seed=11, chunks=10)
        reference = generate(model, session.plan, text, seeded_noise(session.plan, 11), 10)
        return [
            float(np.abs(chunk.latents - wanted.latents.numpy()).max())
            for chunk, wanted in zip(streamed, reference, strict=True)
        ]


@pytest.mark.parametrize(
    ("policy", "renoise"),
    [
        ("full", "fresh"),
        ("window", "fresh"),
        ("dummy-forcing", "fresh"),
        pytest.param("dummy-forcing-6", "fresh", marks=pytest.mark.long),
        ("forcing-kv-krea", "fresh"),
        pytest.param("forcing-kv-krea-sink", "fresh", marks=pytest.mark.long),
        ("forcing-kv", "fresh"),
        ("forcing-kv", "predicted"),  # to renoise is the same with every policy
    ],
)
def test_onnx_runtime_equals_torch_over_ten_chunks(policy: str, renoise: str) -> None:
    spec, weights, headmap = small(renoise, layers=2)
    bundle = small_bundle(policy)
    if renoise != "fresh":
        bundle = shared_bundle(spec, weights, load_policy(policy), headmap=headmap)
    headmap = Bundle.open(bundle).headmap or headmap
    assert max(Bundle.open(bundle).manifest.verification.values()) <= 1e-5, "a single pass"
    found = differences(spec, weights, headmap, policy, bundle, PROMPT)
    assert max(found) <= 1e-3, found


def test_layers_of_every_kind_equal_torch(exported: Path) -> None:
    """Of one group, of two, and of two that follow the layer which chooses."""
    found = differences(*small(), "forcing-kv", exported, PROMPT)
    assert max(found) <= 1e-3, found


@pytest.mark.slow
def test_the_demo_model_in_onnx_runtime_equals_torch() -> None:
    spec, policy = load_spec("demo"), "forcing-kv"
    weights = load_weights(spec)
    bundle = demo_bundle()
    headmap = HeadMap.read(bundle / "headmap.json")
    assert max(Bundle.open(bundle).manifest.verification.values()) <= 1e-5, "a single pass"
    prompt, chosen = "a 3 moving left and a 7 moving up", load_policy(policy)
    model = build_model(spec, permute_heads(weights, spec, head_orders(spec, chosen, headmap)))
    text = torch.from_numpy(encode_words(spec, prompt))
    with Session.open(bundle) as session:
        made = [chunk.latents for chunk in session.generate(prompt, seed=11, chunks=7)]
        found = []
        for index, latents in enumerate(made):
            # Each from what came before it on ONNX Runtime: this model amplifies rounding from chunk to
            # chunk, by how much depends on the processor (docs/log.md, "Whose rounding").
            before = torch.from_numpy(np.concatenate(made[:index], 2)) if index else None
            noise = seeded_noise(session.plan, 11)
            *_, last = generate(model, session.plan, text, noise, index + 1, start=before)
            found.append(float(np.abs(latents - last.latents.numpy()).max()))
    assert max(found) <= 1e-3, found


def test_the_step_graph_keeps_one_scoring_node_with_its_body(exported: Path) -> None:
    model = onnx.load(exported / "step.onnx", load_external_data=False)
    kinds = [node.op_type for graph in graphs(model) for node in graph.node if node.domain == "forcingkv"]
    assert kinds == ["DynamicPrune", "DynamicPruneFollow"], "layers 2 follows layer 1; 0 and 3 retain nothing"
    assert {function.name for function in model.functions} == set(kinds)
    onnx.checker.check_model(str(exported / "step.onnx"))
    text = (exported / "step.onnx").read_bytes()
    assert b".py" not in text, "no source paths of the exporting machine"


@pytest.mark.usefixtures("traced_anew")
def test_two_exports_are_equal_to_the_byte(tmp_path: Path) -> None:
    """The other one was made in another test, perhaps in another process."""
    spec, weights, headmap = small("predicted", layers=2)
    first, second = shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap), tmp_path / "b"
    export_bundle(spec, weights, load_policy("forcing-kv"), second, headmap=headmap)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert [n for n in names if (first / n).read_bytes() != (second / n).read_bytes()] == []


def test_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights, headmap = small(layers=1)
    monkeypatch.setattr(writer, "TOLERANCE", -1.0)
    with pytest.raises(VerificationError, match="graph prompt differs from torch"):
        export_bundle(spec, weights, load_policy("full"), tmp_path / "b", headmap=headmap)
    assert list(tmp_path.iterdir()) == []


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        path = bundle / "manifest.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def flip(name: str) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)

    return apply


def link_out(bundle: Path) -> None:
    outside = bundle.parent / "outside.weights"
    shutil.move(bundle / "weights.safetensors", outside)
    (bundle / "weights.safetensors").symlink_to(outside)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip("step.onnx"), "step.onnx has the digest"),
        (flip("weights.safetensors"), "weights.safetensors has the digest"),
        (flip("headmap.json"), "headmap.json has the digest"),
        (lambda b: (b / "prompt.onnx").unlink(), "prompt.onnx is missing"),
        (lambda b: (b / "manifest.json").unlink(), "has no manifest.json"),
        (lambda b: (b / "manifest.json").write_text("{"), "is not JSON"),
        (
            edit(lambda d: d["files"].update({"../x": d["files"]["step.onnx"]})),
            "'../x', which is not inside",
        ),
        (
            edit(lambda d: d["files"].update({"/x": d["files"]["step.onnx"]})),
            "'/x', which is not inside",
        ),
        (link_out, "which is not inside"),
        (
            edit(lambda d: d["graphs"]["step"].update(file="../step.onnx")),
            "has no digest of ../step.onnx",
        ),
        (
            edit(lambda d: d["files"].pop("weights.safetensors")),
            "has no digest of weights.safetensors",
        ),
        (edit(lambda d: d["graphs"].pop("decode")), "has no graph 'decode'"),
        (edit(lambda d: d.update(schema="forcingkv.bundle/2")), "expected 'forcingkv.bundle/1'"),
        (edit(lambda d: d["plan"].update(kv_bytes=1)), "does not follow"),
        (
            edit(lambda d: d["graphs"]["step"]["inputs"].pop("sink_rows.static")),
            "has no input sink_rows.static; .* made by another version",
        ),
        (edit(lambda d: d["model"].update(layers=5)), "is for 4 layers"),
        (edit(lambda d: d.update(headmap="0" * 64)), "is not the one the bundle was baked with"),
    ],
)
def test_a_spoilt_bundle_is_refused(
    exported: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(exported, bundle)
    spoil(bundle)
    with pytest.raises(InputError, match=message):
        Session.open(bundle)


def test_prompts_that_cannot_be_used_are_refused(exported: Path) -> None:
    with Session.open(exported) as session:
        for prompt, message in [
            ("", "is empty"),
            ("a f", "the word 'f'"),
            ("a b c d e a", "has 6 words"),
        ]:
            with pytest.raises(InputError, match=message):
                session.generate(prompt, seed=0, chunks=1)
        with pytest.raises(InputError, match=r"shape \(1, 2\)"):
            session.generate(np.zeros((1, 2), np.float32), seed=0, chunks=1)
    with pytest.raises(InputError, match="there is no backend 'cuda'"):
        Session.open(exported, backend="cuda")


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    spec = small_spec()
    weights = dict(random_weights(spec))
    weights["extra"] = torch.zeros(1)
    weights["head.head.bias"] = torch.zeros(3)
    del weights["blocks.0.norm3.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError,
        match="3 tensors: head.head.bias is .3,. instead of .*; missing "
        r"blocks.0.norm3.bias; unexpected extra",
    ):
        load_weights(spec, tmp_path / "w.safetensors")


def test_a_folder_of_other_files_is_not_replaced(exported: Path, tmp_path: Path) -> None:
    spec, weights, headmap = small(layers=1)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="holds other files than an earlier result"):
        export_bundle(spec, weights, load_policy("full"), tmp_path, headmap=headmap)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    shutil.copytree(exported, tmp_path / "b")
    export_bundle(spec, weights, load_policy("full"), tmp_path / "b", headmap=headmap, verify=False)
    assert Session.open(tmp_path / "b").plan.policy.name == "full"
