"""What is no LoRA of the model, or cannot be merged, is refused in words that name it and say why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.lora import Lora
from tests.conftest import small_spec
from tests.models.lora_files import at, base, checkpoint, drawn, named, pairs, plain_file, state_file

Q = "blocks.0.self_attn.q"
State = dict[str, Tensor]
NO_LORA = r"is not a LoRA of this model: "


def good() -> State:
    return named(pairs(modules=(Q, "blocks.1.ffn.0")), "diffusion_model.", "lora_A.weight", "lora_B.weight")


def refused(place: Path | Lora, folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_weights(small_spec(), checkpoint(folder), lora=place)


def drop(state: State) -> None:
    del state[f"diffusion_model.{Q}.lora_A.weight"]


def put(**more: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in more.items()})


def ones(name: str, *shape: int) -> Callable[[State], None]:
    return lambda state: state.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (State.clear, "no lora_A and lora_B"),
        (drop, "q.weight has only diffusion_model.blocks.0.self_attn.q.lora_B.weight"),
        (ones("blocks.9.self_attn.q.lora_A.weight", 4, 36), "the model has no blocks.9.self_attn.q.weight"),
        (ones("blocks.0.norm1.diff", 36), "the model has no blocks.0.norm1.weight"),
        (ones("blocks.1.self_attn.k.alpha"), "k.weight has only blocks.1.self_attn.k.alpha"),
        (ones("blocks.1.norm3.weight", 36), "unexpected blocks.1.norm3.weight"),
        (
            ones(f"diffusion_model.{Q}.lora_A.weight", 4, 40),
            r"down \(4, 40\), up \(36, 4\) do not make blocks.0.self_attn.q.weight \(36, 36\)",
        ),
        (
            ones(f"diffusion_model.{Q}.lora_A.weight", 5, 36),
            r"A \(5, 36\) and B \(36, 4\) do not make blocks.0.self_attn.q.weight \(36, 36\)",
        ),
        (
            lambda s: s.update({f"diffusion_model.{Q}.lora_B.weight": torch.ones(36, 4, dtype=torch.int8)}),
            "q.lora_B.weight is stored as int8, which is no dtype of weights here",
        ),
        (ones(f"diffusion_model.{Q}.alpha", 2), r"q.alpha is \(2,\) instead of one number"),
        (
            lambda s: s.update({f"diffusion_model.{Q}.alpha": torch.tensor(float("nan"))}),
            r"q.alpha is nan instead of a finite number",
        ),
        (ones("blocks.1.self_attn.k.diff", 36), r"k.diff is \(36,\) instead of \(36, 36\)"),
        (ones("blocks.1.self_attn.norm_k.diff_b", 36), "the model has no blocks.1.self_attn.norm_k.bias"),
        (ones("blocks.3.diff_m", 1, 2, 36), r"diff_m is \(1, 2, 36\) instead of \(1, 6, 36\)"),
        (ones("lora_te_text_model_0_q.lora_down.weight", 4, 36), "of a text encoder"),
        (ones("lora_te1_layers_0_q.alpha"), "of a text encoder"),
        (ones("text_encoder.blocks.0.q.lora_A.weight", 4, 36), "of a text encoder"),
        (ones("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", 4, 36), "an image that the video"),
        (ones("transformer.blocks.0.attn2.add_k_proj.lora_A.weight", 4, 36), "an image that the video"),
        (ones("lora_unet_blocks_0_cross_attn_v_img.alpha"), "an image that the video begins with"),
        (ones("img_emb.proj.1.lora_down.weight", 4, 36), "an image that the video begins with"),
        (ones("transformer_2.blocks.0.attn1.to_q.lora_A.weight", 4, 36), "second transformer of Wan 2.2"),
        (ones(f"lora_unet_{Q.replace('.', '_')}.oft_blocks", 4, 9, 9), "of OFT, which turns weights"),
        (ones(f"{Q}.lora_mid.weight", 4, 4), "a Tucker decomposition"),
        (ones(f"{Q}.hada_t1", 4, 4), "a Tucker decomposition"),
        (ones(f"{Q}.set_weight", 36, 36), "of a replacement"),
        (ones(f"{Q}.dora_scale", 36), r"dora_scale is \(36,\) instead of \(36, 1\) or \(1, 36\)"),
        (ones("blocks.1.self_attn.k.dora_scale", 36, 1), "k.weight has only blocks.1.self_attn.k.dora_scale"),
        (ones(f"{Q}.lora_B.bias", 40), r"lora_B.bias is \(40,\), not the bias of blocks.0.self_attn"),
        (ones(f"{Q}.hada_w1_a", 36, 4), "q.weight is given as LoRA and as LoHa"),
        (
            put(
                blocks__1__ffn__2__hada_w1_a=drawn((36, 3), 1),
                blocks__1__ffn__2__hada_w1_b=drawn((3, 40), 2),
                blocks__1__ffn__2__hada_w2_a=drawn((36, 2), 3),
                blocks__1__ffn__2__hada_w2_b=drawn((2, 40), 4),
            ),
            r"do not make blocks.1.ffn.2.weight \(36, 40\)",
        ),
        (
            put(blocks__1__ffn__2__lokr_w1=drawn((4, 4), 1), blocks__1__ffn__2__lokr_w2=drawn((9, 9), 2)),
            r"lokr_w1 \(4, 4\), lokr_w2 \(9, 9\) do not make blocks.1.ffn.2.weight \(36, 40\)",
        ),
        (put(blocks__1__ffn__2__lokr_w1=drawn((4, 4), 1)), "ffn.2.weight has only blocks.1.ffn.2.lokr_w1"),
        (
            ones(f"lora_unet_{Q.replace('.', '_')}.lora_down.weight", 4, 36),
            r"q.lora_A.weight and lora_unet_blocks_0_self_attn_q.lora_down.weight are the same part",
        ),
        (
            put(
                blocks__2__ffn__0__lora_A__one__weight=torch.ones(4, 36),
                blocks__2__ffn__0__lora_A__two__weight=torch.ones(4, 36),
            ),
            "holds several adapters: one, two; expected one",
        ),
        (
            put(
                blocks__2__ffn__0__lora_A__one__weight=torch.ones(4, 36),
                blocks__2__ffn__0__lora_B__two__weight=torch.ones(40, 4),
            ),
            "holds several adapters: one, two; expected one",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: Callable[[State], None], message: str, tmp_path: Path) -> None:
    state = good()
    change(state)
    refused(state_file(state, tmp_path / "lora.safetensors"), tmp_path, message)


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path: Path) -> None:
    state = {f"lora_te_layers_{n}.lora_down.weight": torch.ones(4, 36) for n in range(40)}
    refused(
        state_file(good() | state, tmp_path / "lora.safetensors"),
        tmp_path,
        NO_LORA + r"(unexpected lora_te_layers_\d+.lora_down.weight; ){5}... \(40 tensors of a text encoder",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((36, 4), float("nan")), r"lora.safetensors gives blocks.0.self_attn.q.weight values"),
        (torch.full((36, 4), float("inf")), r"lora.safetensors gives blocks.0.self_attn.q.weight values"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused_when_it_is_read(values: Tensor, message: str, tmp_path: Path) -> None:
    state = good() | {f"diffusion_model.{Q}.lora_B.weight": values}
    weights = load_weights(
        small_spec(), checkpoint(tmp_path), lora=state_file(state, tmp_path / "lora.safetensors")
    )
    with pytest.raises(InputError, match=message):
        _ = weights[f"{Q}.weight"]
    assert torch.equal(weights["blocks.3.ffn.0.weight"], base()["blocks.3.ffn.0.weight"])


CONFIGS: list[tuple[object, str]] = [
    ([], r"is \[\]; expected a table"),
    ({"r": 8, "lora_alpha": 16}, r"has rank 8 for diffusion_model.*, whose matrices have 4"),
    ({"r": 0, "lora_alpha": 16}, r"adapter_config.json: r is 0; expected a whole number from 1 on"),
    ({"r": True, "lora_alpha": 16}, r"r is True; expected a whole number"),
    ({"r": 4, "lora_alpha": "much"}, r"alpha is 'much'; expected a finite number"),
    ({"r": 4, "lora_alpha": float("inf")}, r"the number Infinity is not a finite number"),
    ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 8}}, r"for 'to_q', which names no mod"),
    ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"q(": 8}}, r"has the pattern 'q\('"),
    ({"r": 4, "lora_alpha": 4, "alpha_pattern": [1]}, r"alpha_pattern is \[1\]; expected a table"),
    ({"r": 4, "lora_alpha": 4, "use_dora": True}, r"a DoRA by adapter_config.json, and .* no magnitudes"),
    ({"r": 4, "lora_alpha": 4, "peft_type": "OFT"}, r"is of OFT, which is not merged"),
    ({"r": 4, "lora_alpha": 4, "fan_in_fan_out": True}, r"fan_in_fan_out True: its matrices are tra"),
    ({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}, r"init_lora_weights 'pissa'"),
    ({"r": 4, "lora_alpha": 4, "init_lora_weights": "olora"}, r"init_lora_weights 'olora'"),
    ({"r": 4, "lora_alpha": 4, "modules_to_save": ["head"]}, r"has modules_to_save"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), CONFIGS)
@pytest.mark.parametrize("beside", [True, False], ids=["adapter_config.json", "metadata"])
def test_a_configuration_that_cannot_be_followed_is_refused(
    config: object, message: str, beside: bool, tmp_path: Path
) -> None:
    folder, metadata = tmp_path / "lora", None
    if beside:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
    else:
        own = (
            {f"transformer.{name}": value for name, value in config.items()}
            if isinstance(config, dict)
            else config
        )
        metadata = {"lora_adapter_metadata": json.dumps(own)}
        message = message.replace("adapter_config.json", "lora_adapter_metadata")
    refused(state_file(good(), folder / "adapter_model.safetensors", metadata), tmp_path, message)


def test_metadata_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    for metadata, message in [
        (
            {"ss_network_alpha": "Dynamic"},
            r"metadata ss_network_alpha is 'Dynamic'; expected a finite number",
        ),
        ({"lora_adapter_metadata": "{"}, r"lora_adapter_metadata is not JSON"),
    ]:
        refused(state_file(good(), file, metadata), tmp_path, message)


def test_a_dora_and_another_change_of_one_weight_are_refused(tmp_path: Path) -> None:
    dora = good() | {f"{Q}.dora_scale": torch.ones(36, 1)}
    first = state_file(dora, tmp_path / "dora.safetensors")
    second = plain_file(pairs(modules=(Q,), seed=5), tmp_path / "plain.safetensors")
    message = r"dora.safetensors is a DoRA, which rescales blocks.0.self_attn.q.weight; .*plain.safetensors"
    with pytest.raises(InputError, match=message):
        load_weights(small_spec(), checkpoint(tmp_path), lora=[first, second])
    load_weights(small_spec(), checkpoint(tmp_path), lora=[first, at(second, 0)])
    both = state_file(dora | {f"{Q}.diff": torch.ones(36, 36)}, tmp_path / "both.safetensors")
    refused(both, tmp_path, r"the same file changes that too")


def test_which_file_is_meant(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    refused(tmp_path / ("long" * 100), tmp_path, r"there is no such file or folder")
    refused(
        tmp_path / "none.safetensors", tmp_path, r"there is no such file or folder; expected FILE, FOLDER or"
    )
    refused(folder, tmp_path, r"lora holds 0 files of tensors; expected one, or adapter_model.safetensors")
    first = plain_file(pairs(), folder / "a.safetensors")
    assert load_weights(small_spec(), checkpoint(tmp_path), lora=folder).loras[0].file == "a.safetensors"
    plain_file(pairs(seed=1), folder / "b.safetensors")
    refused(folder, tmp_path, r"holds 2 files of tensors: a.safetensors, b.safetensors.*Name the file")
    plain_file(pairs(seed=2), folder / "pytorch_lora_weights.safetensors")
    weights = load_weights(small_spec(), checkpoint(tmp_path), lora=folder)
    assert weights.loras[0].file == "pytorch_lora_weights.safetensors"
    first.write_bytes(first.read_bytes()[:-10])
    refused(first, tmp_path, r"a.safetensors cannot be read as safetensors")
    (folder / "c.pt").write_bytes(b"no torch file")
    refused(folder / "c.pt", tmp_path, r"c.pt (is refused|cannot be read)")


def test_a_weight_that_is_no_number_is_not_added_to(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.int8) for name, tensor in base().items()}
    save_file(state, tmp_path / "checkpoint.safetensors")
    file = plain_file(pairs(modules=(Q,)), tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"int8"):
        _ = load_weights(small_spec(), tmp_path / "checkpoint.safetensors", lora=file)[f"{Q}.weight"]


# FILE:STRENGTH


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1),
        ("style.safetensors:0.5", "style.safetensors", 0.5),
        ("style.safetensors:-1", "style.safetensors", -1),
        ("style.safetensors:0", "style.safetensors", 0),
        ("style.safetensors:1e-1", "style.safetensors", 0.1),
        ("a:b/style.safetensors", "a:b/style.safetensors", 1),
        ("a:b/style.safetensors:2", "a:b/style.safetensors", 2),
        ("v1:2", "v1:2", 1),
        ("v1:2:0.5", "v1:2", 0.5),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1),
        (r"C:\loras\style.safetensors:0.8", r"C:\loras\style.safetensors", 0.8),
        ("C:/loras/style.safetensors:.8", "C:/loras/style.safetensors", 0.8),
        (":0.5", ":0.5", 1),
        ("x" * 5000 + ":2", "x" * 5000, 2),
    ],
)
def test_file_and_strength(
    text: str, path: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1:2").touch()
    assert Lora.parse(text) == Lora(Path(path), strength)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--lora names nothing; expected FILE or FILE:STRENGTH"),
        ("here:nan", r"--lora here has the strength 'nan'; expected a finite number"),
        ("here:inf", r"has the strength 'inf'"),
        ("here:-1e999", r"has the strength '-inf'"),
        ("here:0,8", r"--lora here has the strength '0,8'; expected a finite number, such as 0.8"),
        ("here:", r"has the strength ''"),
        ("absent:nan", r"has the strength 'nan'"),
        ("both:1", r"there are both 'both:1' and 'both'.* both:1:1 is the one; both:1.000000 is the other"),
    ],
)
def test_a_strength_that_is_none(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "both", "both:1"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        Lora.parse(text)
    assert Lora.parse("both:1:1") == Lora(Path("both:1"), 1)
    assert Lora.parse("both:1.000000") == Lora(Path("both"), 1)


def test_every_message_is_a_sentence() -> None:
    with pytest.raises(InputError) as refusal:
        Lora(Path("a"), float("nan"))
    assert re.fullmatch(
        r"--lora a has the strength 'nan'; expected a finite number, such as 0.8\.", str(refusal.value)
    )
