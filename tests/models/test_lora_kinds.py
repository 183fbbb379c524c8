"""What each kind of LoRA adds, by its formula: matrices, differences, LoHa, LoKr, DoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import Weights, load_weights
from forcingkv.models.lora import LoraLike
from tests.conftest import small_spec
from tests.models.lora_files import (
    at,
    base,
    checkpoint,
    drawn,
    flat,
    merged_by_hand,
    named,
    pairs,
    state_file,
    with_alphas,
    worst,
)

Q = "blocks.0.self_attn.q"


def loaded(folder: Path, *loras: LoraLike) -> Weights:
    return load_weights(small_spec(), checkpoint(folder), lora=list(loras))


def test_a_difference_is_added_as_it_is(tmp_path: Path) -> None:
    state = {
        f"diffusion_model.{Q}.diff": drawn((36, 36), 1),
        f"diffusion_model.{Q}.diff_b": drawn((36,), 2),
        "diffusion_model.blocks.1.norm3.diff": drawn((36,), 3),
        "diffusion_model.blocks.1.norm3.diff_b": drawn((36,), 4),
        "diffusion_model.blocks.2.self_attn.norm_k.diff": drawn((36,), 5),
        "diffusion_model.blocks.3.diff_m": drawn((1, 6, 36), 6),
        "diffusion_model.head.diff_m": drawn((1, 2, 36), 7),
        "diffusion_model.patch_embedding.diff": drawn((36, 3, 1, 2, 2), 8),
        "diffusion_model.blocks.0.modulation.diff": drawn((1, 6, 36), 9),
        "lora_unet_blocks_0_norm3.w_norm": drawn((36,), 10),
        "lora_unet_blocks_0_norm3.b_norm": drawn((36,), 11),
        "transformer.blocks.1.norm2.alpha": torch.tensor(3.0),
    }
    targets = [
        f"{Q}.weight", f"{Q}.bias", "blocks.1.norm3.weight", "blocks.1.norm3.bias",
        "blocks.2.self_attn.norm_k.weight", "blocks.3.modulation", "head.modulation",
        "patch_embedding.weight", "blocks.0.modulation", "blocks.0.norm3.weight", "blocks.0.norm3.bias",
    ]  # fmt: skip
    expected = {name: tensor.clone() for name, tensor in base().items()}
    *differences, _ = state.values()  # and an alpha, which belongs to none
    for target, added in zip(targets, differences, strict=True):
        expected[target] += -0.5 * added
    weights = loaded(tmp_path, at(state_file(state, tmp_path / "diff.safetensors"), -0.5))
    assert worst(weights, expected) <= 1e-6
    (record,) = weights.loras
    assert (record.kinds, record.ranks, record.alphas, record.modules) == (("difference",), (), (), 8)


def test_a_lora_and_a_difference_of_one_layer_are_both_added(tmp_path: Path) -> None:
    """As those are that were extracted from whole checkpoints."""
    made = pairs(modules=(Q,), alphas=2.0)
    state = with_alphas(named(made, "", "lora_down.weight", "lora_up.weight"), made, "")
    state |= {f"{Q}.diff": drawn((36, 36), 1), f"{Q}.diff_b": drawn((36,), 2)}
    weights = loaded(tmp_path, state_file(state, tmp_path / "both.safetensors"))
    expected = merged_by_hand(made)
    expected[f"{Q}.weight"] += state[f"{Q}.diff"]
    expected[f"{Q}.bias"] += state[f"{Q}.diff_b"]
    assert worst(weights, expected) <= 1e-6


def test_the_bias_of_lora_b_is_scaled_like_the_matrices(tmp_path: Path) -> None:
    state = {
        f"{Q}.lora_A.weight": drawn((4, 36), 1),
        f"{Q}.lora_B.weight": drawn((36, 4), 2),
        f"{Q}.lora_B.bias": drawn((36,), 3),
        f"{Q}.alpha": torch.tensor(2.0),
    }
    weights = loaded(tmp_path, state_file(state, tmp_path / "bias.safetensors"))
    expected = base()[f"{Q}.bias"] + 0.5 * state[f"{Q}.lora_B.bias"]
    torch.testing.assert_close(weights[f"{Q}.bias"], expected)


def test_a_convolution_is_a_matrix(tmp_path: Path) -> None:
    down, up = drawn((4, 3, 1, 2, 2), 1), drawn((36, 4, 1, 1, 1), 2)
    state = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    weights = loaded(tmp_path, state_file(state, tmp_path / "conv.safetensors"))
    added = torch.einsum("or,rcthw->octhw", up[:, :, 0, 0, 0], down)
    torch.testing.assert_close(weights["patch_embedding.weight"], base()["patch_embedding.weight"] + added)


def test_loha_multiplies_two_products_element_by_element(tmp_path: Path) -> None:
    module = "blocks.1.ffn.0"
    state = {
        f"lora_unet_{flat(module)}.hada_w1_a": drawn((40, 3), 1),
        f"lora_unet_{flat(module)}.hada_w1_b": drawn((3, 36), 2),
        f"lora_unet_{flat(module)}.hada_w2_a": drawn((40, 3), 3),
        f"lora_unet_{flat(module)}.hada_w2_b": drawn((3, 36), 4),
        f"lora_unet_{flat(module)}.alpha": torch.tensor(1.0),
    }
    weights = loaded(tmp_path, state_file(state, tmp_path / "loha.safetensors"))
    w1_a, w1_b, w2_a, w2_b, _ = state.values()
    added = torch.einsum("or,ri,os,si->oi", w1_a, w1_b, w2_a, w2_b) / 3
    torch.testing.assert_close(weights[f"{module}.weight"], base()[f"{module}.weight"] + added)
    assert (weights.loras[0].kinds, weights.loras[0].ranks) == (("LoHa",), (3,))


@pytest.mark.parametrize(
    ("parts", "alpha", "more", "metadata", "scale"),
    [
        (("w1", "w2_a", "w2_b"), 1.0, {}, {}, 1 / 3),
        (("w1_a", "w1_b", "w2"), 1.0, {}, {}, 1 / 3),
        (("w1_a", "w1_b", "w2_a", "w2_b"), 6.0, {}, {}, 2.0),
        (("w1", "w2"), None, {}, {}, 1.0),
        (("w1", "w2"), 9999999999.0, {}, {}, 1.0),
        (("w1", "w2"), 5.0, {}, {"ss_network_module": "lycoris.kohya"}, 1.0),
        (("w1", "w2"), 5.0, {}, {"ss_network_module": "networks.lokr"}, 5 / 10),
        (("w1", "w2"), 5.0, {"lokr_factor": torch.tensor(-1)}, {}, 5 / 10),
    ],
)
def test_lokr_is_a_kronecker_product(
    parts: tuple[str, ...],
    alpha: float | None,
    more: dict[str, torch.Tensor],
    metadata: dict[str, str],
    scale: float,
    tmp_path: Path,
) -> None:
    """(4, 6) x (10, 6) = (40, 36), and where both are whole the scale is as each program has it."""
    shapes = {"w1": (4, 6), "w1_a": (4, 3), "w1_b": (3, 6), "w2": (10, 6), "w2_a": (10, 3), "w2_b": (3, 6)}
    made = {part: drawn(shapes[part], number) for number, part in enumerate(parts)}
    state = {f"lora_unet_blocks_1_ffn_0.lokr_{part}": tensor for part, tensor in made.items()} | more
    if alpha is not None:
        state["lora_unet_blocks_1_ffn_0.alpha"] = torch.tensor(alpha)
    weights = loaded(tmp_path, state_file(state, tmp_path / "lokr.safetensors", metadata))
    one = made["w1"] if "w1" in made else made["w1_a"] @ made["w1_b"]
    two = made["w2"] if "w2" in made else made["w2_a"] @ made["w2_b"]
    added = torch.einsum("ab,cd->acbd", one, two).reshape(40, 36) * scale
    torch.testing.assert_close(weights["blocks.1.ffn.0.weight"], base()["blocks.1.ffn.0.weight"] + added)


@pytest.mark.parametrize("name", ["dora_scale", "columns", "lora_magnitude_vector", "kept whole"])
def test_dora_gives_the_rows_of_the_changed_weight_their_length(name: str, tmp_path: Path) -> None:
    module = "blocks.1.ffn.0"
    made = pairs(modules=(module,), alphas=2.0)
    by_columns = name == "columns"
    lengths = drawn((1, 36) if by_columns else (40, 1), 5).abs() + 0.5
    state = with_alphas(named(made, "", "lora_A.weight", "lora_B.weight"), made, "")
    if "dora" in name or by_columns:
        state[f"{module}.dora_scale"] = lengths
    else:
        suffix = ".style.weight" if name == "kept whole" else ""
        state[f"{module}.lora_magnitude_vector{suffix}"] = lengths.flatten()
    changed = merged_by_hand(made)[f"{module}.weight"]
    full = lengths * changed / changed.norm(dim=0 if by_columns else 1, keepdim=True)
    path = state_file(state, tmp_path / "dora.safetensors")
    assert torch.allclose(loaded(tmp_path, path)[f"{module}.weight"].double(), full, atol=1e-6)
    half = (base()[f"{module}.weight"] + full) / 2
    assert torch.allclose(loaded(tmp_path, at(path, 0.5))[f"{module}.weight"].double(), half, atol=1e-6)
    assert loaded(tmp_path, path).loras[0].kinds == ("DoRA",)


def test_joined_projections_are_split(tmp_path: Path) -> None:
    rows = {"q": drawn((36, 4), 1), "k": drawn((36, 4), 2), "v": drawn((36, 4), 3)}
    down = drawn((4, 36), 4)
    both = {}
    for name in (
        "blocks.1.self_attn.qkv",
        "blocks.1._checkpoint_wrapped_module.self_attn.to_qkv",
        "transformer.blocks.1.attn1.to_qkv",
    ):
        state = {
            f"{name}.lora_A.weight": down.clone(),
            f"{name}.lora_B.weight": torch.cat(list(rows.values())),
        }
        both |= state
        weights = loaded(tmp_path, state_file(state, tmp_path / "fused.safetensors"))
        for part, up in rows.items():
            weight = f"blocks.1.self_attn.{part}.weight"
            torch.testing.assert_close(weights[weight], base()[weight] + up @ down)
    for name in ("blocks.1.cross_attn.kv", "transformer.blocks.1.attn2.to_kv"):
        state = {
            f"{name}.lora_A.weight": down.clone(),
            f"{name}.lora_B.weight": torch.cat([*rows.values()][1:]),
        }
        weights = loaded(tmp_path, state_file(state, tmp_path / "fused.safetensors"))
        for part in "kv":
            weight = f"blocks.1.cross_attn.{part}.weight"
            torch.testing.assert_close(weights[weight], base()[weight] + rows[part] @ down)
    with pytest.raises(InputError, match=r"are the same part of blocks.1.self_attn.qkv"):
        loaded(tmp_path, state_file(both, tmp_path / "both.safetensors"))
