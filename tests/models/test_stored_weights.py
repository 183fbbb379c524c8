"""Weights in forms that other tools store them in: FP8, integers, fused projections, a LoRA beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.runtime.spec import PublicWeights
from tests.conftest import random_model, small_spec
from tests.models.test_checkpoints import assert_same, in_diffusers, prefixed
from tests.models.test_layouts import SPEC, STATE, Q, State, load_flat, load_pt
from tests.models.test_scales import FP8, scaled

MATRICES = [name for name, tensor in STATE.items() if tensor.dim() == 2 and name.endswith(".weight")]


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_plain_fp8_is_cast_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    eight = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    weights = load_flat(eight, tmp_path)
    assert all(weights[name].dtype == torch.bfloat16 for name in STATE)
    assert all(torch.equal(weights[name].float(), eight[name].float()) for name in STATE)
    assert weights.taken == (f"c.safetensors: {len(STATE)} tensors in FP8, without scales",)
    pickled = load_pt(eight, tmp_path)
    assert all(torch.equal(pickled[name].float(), eight[name].float()) for name in MATRICES)


def test_what_was_made_of_scaled_fp8_is_said(tmp_path: Path) -> None:
    stored, _ = scaled(STATE)
    stored |= {name.replace("weight", "scale_input"): torch.ones(()) for name in MATRICES}
    stored |= {"scaled_fp8": torch.zeros(2, dtype=FP8), "text_encoders.x.scale_input": torch.ones(())}
    weights = load_flat(prefixed(stored, "model.diffusion_model."), tmp_path)
    assert f"c.safetensors: {len(MATRICES)} weights times their scales" in weights.taken
    left_out = f"*.scale_input ({len(MATRICES)}), scaled_fp8, text_encoders.*"
    assert f"c.safetensors: left out, since the model does without: {left_out}" in weights.taken
    notes = {"_quantization_metadata": '{"format": "float8_e4m3fn"}'}
    assert (
        load_flat(stored, tmp_path, notes)
        .taken[0]
        .endswith("metadata on scales, scaled_fp8, text_encoders.*")
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_integers_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    spoilt = STATE | {Q: STATE[Q].to(dtype)}
    for load in (load_flat, load_pt):
        with pytest.raises(InputError, match=rf"1 tensors: {Q} is stored as"):
            load(spoilt, tmp_path)
    with pytest.raises(InputError, match=f"{len(STATE)} tensors"):
        load_pt({name: tensor.to(dtype) for name, tensor in STATE.items()}, tmp_path)


def test_tensors_without_contents_are_refused(tmp_path: Path) -> None:
    for spoilt in (STATE[Q].to("meta"), STATE[Q].to_sparse()):
        with pytest.raises(InputError, match=f"1 tensors: {Q} is stored as float32 "):
            load_pt(STATE | {Q: spoilt}, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_same(
        load_flat({n: t.to(dtype) for n, t in STATE.items()}, tmp_path),
        {n: t.to(dtype) for n, t in STATE.items()},
    )


def fused(state: State, keep: bool) -> State:
    """As `fuse_projections` leaves a model, in either naming; `keep`: its parts are there too."""
    made = dict(state)
    for attention, parts, module in (
        ("self_attn", "q k v", "to_qkv"),
        ("cross_attn", "k v", "to_kv"),
        ("attn1", "to_q to_k to_v", "to_qkv"),
        ("attn2", "to_k to_v", "to_kv"),
    ):
        for block in range(SPEC.layers):
            for leaf in ("weight", "bias"):
                names = [f"blocks.{block}.{attention}.{part}.{leaf}" for part in parts.split()]
                if names[0] in state:
                    made[f"blocks.{block}.{attention}.{module}.{leaf}"] = torch.cat([state[n] for n in names])
                    for name in names if not keep else ():
                        del made[name]
    return made


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "beside their parts"])
@pytest.mark.parametrize("naming", [dict, in_diffusers], ids=["wan", "diffusers"])
def test_fused_projections_are_split(naming: Any, keep: bool, tmp_path: Path) -> None:
    weights = load_flat(fused(naming(STATE), keep), tmp_path)
    assert_same(weights, STATE)
    assert "fused projections" in weights.taken[-1]


def test_fused_projections_as_diffusers_makes_them(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    width = SPEC.heads * SPEC.head_dim
    model = WanTransformer3DModel(
        patch_size=(1, SPEC.patch, SPEC.patch),
        num_attention_heads=SPEC.heads,
        attention_head_dim=SPEC.head_dim,
        in_channels=SPEC.latent_channels,
        out_channels=SPEC.latent_channels,
        text_dim=SPEC.text_width,
        freq_dim=SPEC.time_width,
        ffn_dim=SPEC.ffn_width,
        num_layers=SPEC.layers,
        rope_max_seq_len=8,
    )
    model.load_state_dict(in_diffusers(STATE))
    model.fuse_qkv_projections()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    assert state["blocks.0.attn1.to_qkv.weight"].shape == (3 * width, width)
    assert_same(load_flat(state, tmp_path), STATE)


def test_fused_projections_that_contradict_their_parts_are_refused(tmp_path: Path) -> None:
    spoilt = fused(STATE, keep=True)
    spoilt["blocks.1.self_attn.to_qkv.weight"][0, 0] += 1
    weights = load_flat(spoilt, tmp_path)
    with pytest.raises(InputError, match=rf"holds {Q} twice, with other values"):
        weights[Q]
    assert torch.equal(weights[Q.replace(".q.", ".k.")], STATE[Q.replace(".q.", ".k.")])


@pytest.mark.parametrize("rows", [-36, -1, 1])
def test_fused_projections_of_another_size_are_refused(rows: int, tmp_path: Path) -> None:
    spoilt = fused(STATE, keep=False)
    whole = spoilt["blocks.1.self_attn.to_qkv.weight"]
    spoilt["blocks.1.self_attn.to_qkv.weight"] = torch.zeros(len(whole) + rows, whole.shape[1])
    with pytest.raises(InputError, match=rf"3 tensors: blocks.1.self_attn.k.weight is .*{Q} is"):
        load_flat(spoilt, tmp_path)


TARGETS = ["q", "k", "v", "o", "ffn.0", "ffn.2", "head.head"]


def wrapped_by_peft(alpha: float, config: peft.PeftConfig | None = None) -> tuple[State, State]:
    """A model that PEFT has put a LoRA of rank 4 into, unmerged, and what PEFT itself merges it to."""
    config = config or peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS)
    wrapped = peft.get_peft_model(random_model(SPEC), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + 0.05)
    state = {name: tensor.detach().clone() for name, tensor in wrapped.state_dict().items()}
    merged = {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    return state, merged


ALPHA_12 = small_spec(source=PublicWeights("a/b", "c", lora_alpha=12.0))


@pytest.mark.parametrize("layout", ["peft", "another prefix", "old peft"])
def test_a_file_wrapped_by_peft_is_merged(layout: str, tmp_path: Path) -> None:
    state, merged = wrapped_by_peft(12)
    if layout == "another prefix":
        state = prefixed(state, "backbone.")
    if layout == "old peft":  # which kept the weight's own name
        state = {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}
    weights = load_pt({"generator": state}, tmp_path, spec=ALPHA_12)
    assert set(weights) == set(merged)
    for name, expected in merged.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)
    assert not torch.equal(weights[Q], STATE[Q])
    pairs = sum(".lora_A." in name for name in state)
    assert (
        weights.taken[-1]
        == f"c.pt: the LoRA beside {pairs} weights merged, alpha 12 (the model's preset), rank 4"
    )


def test_a_file_wrapped_by_peft_needs_its_alpha(tmp_path: Path) -> None:
    state, _ = wrapped_by_peft(12)
    with pytest.raises(InputError, match=r"holds a LoRA that is not merged .*rank 4.*nothing says its alpha"):
        load_pt(state, tmp_path)
    of_another = small_spec(source=PublicWeights("a/b", "c", lora="l", lora_alpha=6.0))
    with pytest.raises(InputError, match="nothing says its alpha"):
        load_pt(state, tmp_path, spec=of_another)


PATTERNS = {"rank_pattern": {"ffn.0": 2}, "alpha_pattern": {"self_attn.k": 9, "head.head": 1}}
OF_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (peft.LoraConfig(**OF_LORA, use_dora=True), "DoRA beside .*, alpha 12 .*, rank 4"),
        pytest.param(
            peft.LoraConfig(**OF_LORA, lora_bias=True),
            "LoRA beside .*, alpha 12 .*, rank 4",
            # PEFT takes a bias for a matrix that was torn apart.
            marks=pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
        ),
        (peft.LoraConfig(**OF_LORA, bias="lora_only"), "LoRA beside .*, alpha 12 .*, rank 4"),
        (peft.LoraConfig(**OF_LORA, rank_pattern={"ffn.0": 2}), "LoRA beside .*, alpha 12 .*, rank 2, 4"),
        (peft.LoHaConfig(r=4, alpha=12, target_modules=TARGETS), "LoHa beside .*, alpha 12 .*, rank 4"),
        (peft.LoKrConfig(r=2, alpha=12, target_modules=TARGETS), "LoKr beside .*, alpha 12 .*, rank 2"),
        (peft.LoraConfig(**OF_LORA, **PATTERNS), "LoRA beside .*, alpha 1, 9, 12 .*config.json.*, rank 2, 4"),
        (peft.LoraConfig(**OF_LORA, use_rslora=True), r"alpha 12 \(adapter_config.json\), rank 4"),
        (peft.LoKrConfig(r=20, alpha=12, target_modules=TARGETS), r"LoKr .*alpha 12 \(.*config.json\), who"),
    ],
    ids=["DoRA", "bias of B", "bias of the layer", "rank pattern", "LoHa", "LoKr", "patterns", "rsLoRA",
         "LoKr of whole matrices"],
)  # fmt: skip
def test_all_that_peft_puts_into_a_model_is_merged_as_peft_does(
    config: peft.PeftConfig, told: str, tmp_path: Path
) -> None:
    """What the tensors do not show is in the configuration beside the file."""
    state, merged = wrapped_by_peft(12, config)
    options: dict[str, Any] = {"spec": ALPHA_12}
    digest = ""
    if "config" in told:
        digest = load_pt(state, tmp_path, **options).digest or "" if "LoKr" not in told else ""
        config.save_pretrained(tmp_path)
        options = {}
    weights = load_pt(state, tmp_path, **options)
    for name, expected in merged.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=2e-6)
    assert re.search(told, weights.taken[-1])
    assert weights.digest != digest, "a configuration is a part of what the weights are"
    assert max(float((weights[name] - tensor).abs().max()) for name, tensor in STATE.items()) > 0.02


def test_a_lokr_of_whole_matrices_needs_its_configuration(tmp_path: Path) -> None:
    """PEFT divides by a rank that the matrices do not show; other programs do not scale it."""
    state, _ = wrapped_by_peft(12, peft.LoKrConfig(r=20, alpha=12, target_modules=TARGETS))
    with pytest.raises(
        InputError, match=r"modules of whole matrices\), and nothing says its alpha.*adapter_config"
    ):
        load_pt(state, tmp_path, spec=ALPHA_12)


@pytest.mark.parametrize("parts", [True, False], ids=["its parts too", "alone"])
def test_a_lora_beside_a_fused_projection(parts: bool, tmp_path: Path) -> None:
    """Its rows are those of the parts; where these are there too, nothing says which the LoRA belongs to."""
    state = fused(STATE, keep=parts)
    torch.manual_seed(2)
    down, up = torch.randn(4, 36), torch.randn(108, 4)
    module = "blocks.1.self_attn.to_qkv"
    state |= {f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}
    if parts:
        with pytest.raises(InputError, match=rf"holds .*{Q}.* twice, and a LoRA beside only one of them"):
            load_flat(state, tmp_path, spec=ALPHA_12)
        return
    weights = load_flat(state, tmp_path, spec=ALPHA_12)
    for number, part in enumerate("qkv"):
        name = Q.replace(".q.", f".{part}.")
        expected = STATE[name] + 3 * up[36 * number : 36 * (number + 1)] @ down
        torch.testing.assert_close(weights[name], expected)


def test_a_lora_beside_scaled_fp8_is_added_to_what_the_weights_mean(tmp_path: Path) -> None:
    """Matrices in 8 bits need scales like the weights."""
    state, _ = wrapped_by_peft(12)
    stored, meant = scaled(STATE)
    prefix = "base_model.model."
    held = {n.removeprefix(prefix): t for n, t in state.items() if ".lora_" in n}
    weights = load_flat(stored | held, tmp_path, spec=ALPHA_12)
    down, up = (held[Q.replace("weight", f"lora_{side}.default.weight")] for side in "AB")
    torch.testing.assert_close(weights[Q], meant[Q] + 3 * up @ down)
    eight = {name: tensor.to(FP8) for name, tensor in held.items()}
    with pytest.raises(InputError, match=rf"{len(held)} tensors: missing the scale of .*lora_A"):
        load_flat(stored | eight, tmp_path, spec=ALPHA_12)


A = "base_model.model." + Q.replace("weight", "lora_A.default.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(A), f"{Q} has only .*lora_B.default.weight"),
        (
            lambda s: s.update({A: torch.ones(5, 36)}),
            rf"A \(5, 36\) and B \(36, 4\) do not make {Q} \(36, 36\)",
        ),
        (
            lambda s: s.update({A: torch.ones(4, 36, dtype=torch.int8)}),
            "lora_A.default.weight is stored as int8",
        ),
        (
            lambda s: s.update({A.replace("default", "other"): torch.ones(4, 36)}),
            "several adapters: default, other",
        ),
        (lambda s: s.update({A.replace("blocks", "module.blocks"): torch.ones(4, 36)}), "are both blocks.1"),
        (
            lambda s: s.update({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(35)}),
            r"lora_magnitude_vector.default.weight is \(35,\) instead of",
        ),
        (
            lambda s: s.update({A.replace("lora_A", "lora_embedding_A"): torch.ones(36)}),
            "unexpected .*lora_embedding_A",
        ),
        (lambda s: s.update({A.replace(".q.", ".x."): torch.ones(4, 36)}), "unexpected .*self_attn.x.lora_A"),
    ],
)
def test_a_spoilt_lora_beside_weights_is_refused(
    change: Callable[[State], object], message: str, tmp_path: Path
) -> None:
    state, _ = wrapped_by_peft(12)
    change(state)
    with pytest.raises(InputError, match=message):
        load_pt(state, tmp_path, spec=ALPHA_12)
