"""Checkpoints as users have them: each format is read, and refused when anything in it is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.headmaps import InputError, MissingExtraError
from forcingkv.models import hub, tensor_files
from forcingkv.models.checkpoint import load_weights, random_weights
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime.spec import ModelSpec, PublicWeights
from tests.conftest import random_model, small_spec

SOURCE = PublicWeights("owner/repository", "models/base.pt", lora="models/lora.pt", lora_alpha=6.0)
State = dict[str, Tensor]


def spec_with_source() -> ModelSpec:
    return small_spec(source=SOURCE)


@pytest.fixture(scope="module")
def state() -> State:
    return {name: tensor.clone() for name, tensor in random_model(small_spec()).state_dict().items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def in_diffusers(state: State) -> State:
    converted: State = convert_wan_transformer_to_diffusers(dict(state))
    return converted


IN_FASTVIDEO = (
    (r"patch_embedding\.", "patch_embedding.proj."),
    (r"text_embedder\.linear_1\.", "text_embedder.fc_in."),
    (r"text_embedder\.linear_2\.", "text_embedder.fc_out."),
    (r"time_embedder\.linear_1\.", "time_embedder.mlp.fc_in."),
    (r"time_embedder\.linear_2\.", "time_embedder.mlp.fc_out."),
    (r"\.time_proj\.", ".time_modulation.linear."),
    (r"\.attn1\.to_out\.0\.", ".to_out."),
    (r"\.attn1\.", "."),
    (r"\.attn2\.to_out\.0\.", ".attn2.to_out."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.fc_in."),
    (r"\.ffn\.net\.2\.", ".ffn.fc_out."),
    (r"\.norm2\.", ".self_attn_residual_norm.norm."),
)
"""What FastVideo's models call otherwise than diffusers (its `param_names_mapping` of Wan)."""


def in_fastvideo(state: State) -> State:
    named = in_diffusers(state)
    for pattern, other in IN_FASTVIDEO:
        named = {re.sub(pattern, other, name): tensor for name, tensor in named.items()}
    return named


def fsdp(state: State) -> State:
    """As FSDP names what it wraps: the model, and each block."""
    return {
        "model._fsdp_wrapped_module." + name.replace("blocks.", "blocks._fsdp_wrapped_module."): tensor
        for name, tensor in state.items()
    }


def torch_file(layout: Callable[[State], Any]) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        torch.save(layout(state), folder / "checkpoint.pt")
        return folder / "checkpoint.pt"

    return write


def safetensors(layout: Callable[[State], State]) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        save_file(layout(state), folder / "checkpoint.safetensors")
        return folder / "checkpoint.safetensors"

    return write


def sharded(state: State, folder: Path) -> Path:
    """As diffusers shards: a folder `transformer` with two files and their index."""
    place = folder / "transformer"
    place.mkdir(parents=True, exist_ok=True)
    named = in_diffusers(state)
    names = sorted(named)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: named[name] for name in part}, place / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


FORMATS: dict[str, Callable[[State, Path], Path]] = {
    "Self Forcing": torch_file(lambda s: {"generator": s, "generator_ema": prefixed(s, "model.")}),
    "FSDP": torch_file(lambda s: {"generator_ema": fsdp(s)}),
    "under model": torch_file(lambda s: {"model": prefixed(s, "model."), "step": 7}),
    "flat .pt": torch_file(lambda s: prefixed(s, "model.")),
    "compiled": torch_file(lambda s: prefixed(s, "_orig_mod.model.")),
    "flat safetensors": safetensors(lambda s: s),
    "Krea": safetensors(lambda s: prefixed(s, "model.")),
    "diffusers": safetensors(in_diffusers),
    "sharded": sharded,
}


def assert_same(found: Any, expected: State) -> None:
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("layout", FORMATS)
def test_a_checkpoint_is_read(layout: str, state: State, tmp_path: Path) -> None:
    weights = load_weights(small_spec(), FORMATS[layout](state, tmp_path))
    assert_same(weights, state)
    assert weights.digest


def drop(state: State) -> None:
    del state["blocks.2.ffn.0.bias"]


def add(state: State) -> None:
    state["blocks.2.extra.weight"] = torch.zeros(2)


def reshape(state: State) -> None:
    state["blocks.1.self_attn.q.weight"] = torch.zeros(3, 5)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"1 tensors: missing blocks.2.ffn.0.bias"),
        (add, r"1 tensors: unexpected blocks.2.extra.weight"),
        (reshape, r"1 tensors: blocks.1.self_attn.q.weight is \(3, 5\) instead of \(36, 36\)"),
    ],
    ids=["one missing", "one extra", "one of another shape"],
)
def test_a_tensor_that_does_not_fit_is_named(
    layout: str, spoil: Callable[[State], None], message: str, state: State, tmp_path: Path
) -> None:
    spoilt = dict(state)
    spoil(spoilt)
    with pytest.raises(InputError, match=message):
        load_weights(small_spec(), FORMATS[layout](spoilt, tmp_path))


@pytest.mark.parametrize("layout", FORMATS)
def test_a_truncated_file_is_refused(layout: str, state: State, tmp_path: Path) -> None:
    path = FORMATS[layout](state, tmp_path)
    file = path if path.is_file() else sorted(path.rglob("*.safetensors"))[0]
    for kept in (0, 4, file.stat().st_size // 2, file.stat().st_size - 1):
        content = file.read_bytes()
        file.write_bytes(content[:kept])
        with pytest.raises(InputError, match=rf"{file.name} (cannot be read|is refused)"):
            load_weights(small_spec(), path)
        file.write_bytes(content)


class Payload:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.check_call, (["touch", "ran"],)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_pickled_object_is_refused_and_not_run(
    zipped: bool, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({"generator": state, "other": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="a pickled object that is not a tensor"):
        load_weights(small_spec(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_file_from_before_zip_is_read(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(load_weights(small_spec(), tmp_path / "old.pth"), state)


def test_the_entry_of_a_file_can_be_chosen(state: State, tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    path = tmp_path / "checkpoint.pt"
    torch.save({"generator": state, "generator_ema": other, "critic": {}}, path)
    spec = small_spec()
    assert_same(load_weights(spec, path), other)
    assert_same(load_weights(spec, path, key="generator"), state)
    assert_same(load_weights(small_spec(source=PublicWeights("a/b", "c", key="generator")), path), state)
    with pytest.raises(
        InputError, match=r"has no entry 'model'; expected one of generator, generator_ema, critic"
    ):
        load_weights(spec, path, key="model")
    torch.save({"student": state, "step": 3}, path)
    assert_same(load_weights(spec, path), state)
    assert_same(load_weights(spec, path, key="student"), state)
    save_file(state, tmp_path / "flat.safetensors")
    with pytest.raises(InputError, match="has no entry 'generator': a safetensors file is flat"):
        load_weights(spec, tmp_path / "flat.safetensors", key="generator")


def test_causal_forcing_takes_the_entry_that_its_authors_take(state: State, tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"generator": state, "generator_ema": other}, tmp_path / "causal_forcing.pt")
    spec = small_spec(source=load_spec("causal-forcing").source)
    assert_same(load_weights(spec, tmp_path / "causal_forcing.pt"), state)


def test_two_names_for_one_tensor_are_refused(state: State, tmp_path: Path) -> None:
    save_file(state | prefixed({"head.head.bias": torch.zeros(12)}, "model."), tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"are both head.head.bias"):
        load_weights(small_spec(), tmp_path / "c.safetensors")


def spoil_index(change: Callable[[Path, dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
        data = json.loads(path.read_text())
        change(folder, data)
        path.write_text(json.dumps(data))

    return apply


FIRST = "diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "transformer" / FIRST).unlink(), f"lacks the shard {FIRST}"),
        (spoil_index(lambda f, d: d.pop("weight_map")), "is not an index of shards"),
        (spoil_index(lambda f, d: d.update(weight_map=[1])), "is not an index of shards"),
        (spoil_index(lambda f, d: d["weight_map"].update(x="../../etc/passwd")), "not inside the folder"),
        (
            spoil_index(lambda f, d: d["weight_map"].pop("proj_out.bias")),
            "differ in 1 tensors: proj_out.bias",
        ),
    ],
)
def test_a_spoilt_index_is_refused(
    spoil: Callable[[Path], None], message: str, state: State, tmp_path: Path
) -> None:
    sharded(state, tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        load_weights(small_spec(), tmp_path)


def with_lora(folder: Path) -> tuple[State, State]:
    """LongLive's two files, made by PEFT, and what PEFT itself merges them to."""
    model = random_model(small_spec())
    (folder / "models").mkdir(parents=True)
    torch.save({"generator": prefixed(dict(model.state_dict()), "model.")}, folder / SOURCE.file)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"])
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    lora = peft.get_peft_model_state_dict(wrapped)
    torch.save({"generator_lora": lora}, folder / "models" / "lora.pt")
    merged = {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    return merged, lora


def test_a_lora_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    expected, lora = with_lora(tmp_path)
    weights = load_weights(spec_with_source(), tmp_path)
    assert set(weights) == set(expected)
    worst = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= 1e-6
    changed = [name for name in weights if ".ffn.0.weight" in name]
    base = load_weights(spec_with_source(), tmp_path / SOURCE.file)
    assert not any(torch.equal(weights[name], base[name]) for name in changed), "one file is taken alone"
    assert "+" in str(weights.digest)
    save_file(lora, tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6}')
    named = load_weights(spec_with_source(), tmp_path / SOURCE.file, lora=tmp_path / "lora.safetensors")
    assert_same(named, dict(weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("base_model.model.blocks.0.self_attn.q.lora_A.weight"), "q.weight has only"),
        (lambda d: d.update({"blocks.0.norm3.weight": torch.ones(36)}), "unexpected blocks.0.norm3.weight"),
        (
            lambda d: d.update(
                {"blocks.0.x.lora_A.weight": torch.ones(4, 36), "blocks.0.x.lora_B.weight": torch.ones(36, 4)}
            ),
            "the model has no blocks.0.x.weight",
        ),
        (
            lambda d: d.update({"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.ones(5, 36)}),
            r"A \(5, 36\) and B \(36, 4\) do not make blocks.0.self_attn.q.weight \(36, 36\)",
        ),
        (lambda d: d.clear(), "no lora_A and lora_B"),
    ],
)
def test_a_spoilt_lora_is_refused(change: Callable[[State], object], message: str, tmp_path: Path) -> None:
    _, lora = with_lora(tmp_path)
    change(lora)
    torch.save({"generator_lora": lora}, tmp_path / "models" / "lora.pt")
    with pytest.raises(InputError, match=message):
        load_weights(spec_with_source(), tmp_path)


def test_a_folder_without_its_lora_is_refused(tmp_path: Path) -> None:
    with_lora(tmp_path)
    (tmp_path / "models" / "lora.pt").unlink()
    with pytest.raises(InputError, match=r"holds models/base.pt but not models/lora.pt"):
        load_weights(spec_with_source(), tmp_path)


def test_folders_that_leave_open_what_is_meant_are_refused(state: State, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no weights; expected models/base.pt, one .safetensors"):
        load_weights(spec_with_source(), tmp_path)
    save_file(state, tmp_path / "a.safetensors")
    assert_same(load_weights(spec_with_source(), tmp_path), state)
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"holds 2 safetensors files: a.safetensors, b.safetensors"):
        load_weights(spec_with_source(), tmp_path)
    for absent in (tmp_path / "c" / "d.pt", "checkpoints/self_forcing_dmd.pt"):
        with pytest.raises(InputError, match="there is no such file or folder"):
            load_weights(spec_with_source(), absent)


def test_the_hub_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs huggingface_hub.*pip install 'forcingkv\[hub\]'"):
        load_weights(small_spec(), "a/b")


def test_without_a_checkpoint_the_public_one_is_named() -> None:
    with pytest.raises(InputError, match=r"no weights ship with small.*--checkpoint owner/repository"):
        load_weights(spec_with_source())


def test_a_mapped_file_is_mapped_anew(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "RELOAD_BYTES", 5000)
    torch.save({"generator": state}, tmp_path / "c.pt")
    assert_same(load_weights(small_spec(), tmp_path / "c.pt"), state)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_random_weights_depend_on_name_and_seed_alone(seed: int) -> None:
    spec = small_spec()
    weights, deeper = random_weights(spec, seed), random_weights(dataclasses.replace(spec, layers=6), seed)
    name = "blocks.3.ffn.2.weight"
    assert torch.equal(weights[name], deeper[name])
    assert not torch.equal(weights[name], random_weights(spec, seed + 1)[name])
    WanModel(spec).load_state_dict(dict(weights))
