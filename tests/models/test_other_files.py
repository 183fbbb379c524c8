"""Files that are something else than their name says: read by what they are, or refused with that."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import load_weights, weight_shapes
from forcingkv.models.encoder_places import find_encoder
from forcingkv.models.lora import Lora
from tests.conftest import small_spec
from tests.models.test_checkpoints import assert_same, prefixed, sharded
from tests.models.test_layouts import OTHER, SPEC, STATE, Q, load_flat, load_pt

ZEROS: Callable[..., Tensor] = torch.zeros


@pytest.mark.parametrize("name", ["c.pt", "c", "C.SAFETENSORS", "c.bin", "c.ckpt"])
def test_safetensors_are_read_under_any_name(name: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / name)
    assert_same(load_weights(SPEC, tmp_path / name), STATE)
    if "." in name:
        assert_same(load_weights(SPEC, tmp_path), STATE)


@pytest.mark.parametrize("name", ["C.PT", "c.Pth", "c"])
def test_torch_files_are_read_under_any_name(name: str, tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert_same(load_weights(SPEC, tmp_path / name), STATE)
        torch.save(STATE, tmp_path / "c.safetensors", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"is called .safetensors and is a file that torch wrote. Ren"):
            load_weights(SPEC, tmp_path / "c.safetensors")


OTHERS = [
    ("c.safetensors", b"", "cannot be read: it is empty. Fetch it again"),
    ("c.pt", b"", "cannot be read: it is empty"),
    ("c.safetensors", b"<!DOCTYPE html><html>not found", "is a web page"),
    ("c.pt", b"\n<html>", "is a web page"),
    ("c.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
    ("c.gguf", b"GGUF\x03", "is a GGUF file, which is not read"),
    ("c.safetensors", b"GGUF\x03", "is a GGUF file, which is not read"),
    ("config.json", b"{}", "is JSON, not a file of tensors"),
    ("pytorch_model.bin.index.json", b"{}", "is an index of shards that torch wrote"),
    ("a.npy", b"\x93NUMPY\x01", "is an array of numpy"),
    ("__0_0.distcp", b"PK\x03\x04", "is a part of a distributed checkpoint.* dcp_to_torch"),
    ("c.pt", b"PK\x03\x04 and no more", "cannot be read: it is cut short or damaged"),
]


@pytest.mark.parametrize(("name", "content", "message"), OTHERS)
def test_what_is_no_file_of_tensors_is_called_what_it_is(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for opened in (
        lambda: load_weights(SPEC, tmp_path / name),
        lambda: load_weights(SPEC, save_base(tmp_path), lora=tmp_path / name),
    ):
        with pytest.raises(InputError, match=message) as error:
            opened()
        assert "weights_only" not in str(error.value)


def save_base(folder: Path) -> Path:
    save_file(STATE, folder / "base.safetensors")
    return folder / "base.safetensors"


@pytest.mark.parametrize(
    ("held", "called"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Lin"),
    ],
)
def test_an_object_in_a_torch_file_is_named(held: object, called: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"a pickled object that is not a tensor \({called}") as error:
        load_pt({"state_dict": STATE, "hyper_parameters": held}, tmp_path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "a\0b", ""])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    for opened in (
        lambda: load_weights(SPEC, name),
        lambda: load_weights(SPEC, save_base(tmp_path), lora=name or Path("x" * 300)),
        lambda: find_encoder(name),
    ):
        with pytest.raises(InputError, match="there is no such file or folder"):
            opened()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become somebody else, who may not read")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    path = save_base(tmp_path / "closed")
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        for opened in (lambda: load_weights(SPEC, path), lambda: find_encoder(path)):
            with pytest.raises(InputError, match=r"Permission denied|no such file"):
                opened()
    finally:
        os.seteuid(0)


def with_image(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "img_emb.proj.0.bias": ZEROS(4), "patch_embedding.weight": ZEROS(36, 7, 1, 2, 2)}


LARGE = {name: ZEROS(shape) for name, shape in weight_shapes(small_spec(layers=6, heads=5)).items()}
FLAT = ("_fsdp_wrapped_module._flat_param", "blocks.0._fsdp_wrapped_module._flat_param")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (LARGE, r"It has 6 layers of width 60 and takes 3 channels; this model has 4, 36 and 3\.$"),
        (with_image(STATE), r"unexpected img_emb.proj.0.bias. It is of an image-to-video model"),
        ({**STATE, "vace_blocks.0.x.weight": ZEROS(2)}, "unexpected vace_blocks.0.x.weight. It is of VACE"),
        ({name: ZEROS(0) for name in STATE}, "Its tensors are empty, as ZeRO 3 leaves them"),
        ({name: ZEROS(9) for name in FLAT}, "FSDP saved it as flat parameters"),
        ({f"diffusion_model.{Q[:-7]}.lora_A.weight": ZEROS(2, 36)}, "It is a LoRA: give it with --lora"),
    ],
)  # fmt: skip
def test_another_model_is_called_what_it_is(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_flat(state, tmp_path)


def test_weights_given_as_a_lora_are_called_weights(tmp_path: Path) -> None:
    save_file(OTHER, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="It holds weights, not a LoRA: give it with --checkpoint"):
        load_weights(SPEC, save_base(tmp_path), lora=tmp_path / "other.safetensors")


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = sharded(STATE, tmp_path) / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    with pytest.raises(InputError, match="By its name it is one shard of several: name their folder"):
        load_weights(SPEC, shards[0])
    next(folder.glob("*.json")).unlink()
    with pytest.raises(InputError, match=r"They look like shards: their index .* has to lie beside them"):
        load_weights(SPEC, tmp_path)
    for number, path in enumerate(shards):
        path.unlink()
        torch.save(STATE, folder / f"pytorch_model-0000{number}-of-00002.bin")
    with pytest.raises(InputError, match="They look like shards"):
        load_weights(SPEC, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("a/__0_0.distcp", "distributed"), ("m-Q4.gguf", "GGUF files")]
)
def test_a_folder_of_files_that_are_not_read(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"holds a? ?{message}.* not read"):
        load_weights(SPEC, tmp_path)


@pytest.mark.parametrize(
    "folders", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")]
)
def test_one_of_two_transformers_is_not_taken_for_the_model(folders: tuple[str, str], tmp_path: Path) -> None:
    """Each has the names and shapes of Wan 2.1, and is made for some of the steps only."""
    for folder in folders:
        (tmp_path / folder).mkdir()
        save_file(STATE, tmp_path / folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"holds two transformers, the second as .*To try one of them alone"):
        load_weights(SPEC, tmp_path)
    second = load_weights(SPEC, tmp_path / folders[1])
    assert_same(second, STATE)
    assert "by its name one of the two transformers of Wan 2.2" in second.taken[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2]
)
def test_a_weight_that_is_no_number_is_refused_when_it_is_read(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    spoilt = STATE[Q].clone()
    spoilt[3, 5] = value
    weights = load_flat({**STATE, Q: spoilt.to(dtype)}, tmp_path)
    with pytest.raises(InputError, match=f"c.safetensors holds {Q} with values that are no finite numbers"):
        _ = weights[Q]
    assert torch.equal(weights["head.head.bias"], STATE["head.head.bias"])


def test_what_an_optimizer_keeps_is_not_the_model(tmp_path: Path) -> None:
    for content in (
        {"model": STATE, "momentum": OTHER},
        {"generator": prefixed(STATE, "model."), "optimizer": {"master": OTHER}},
        {"exp_avg": OTHER, "anything": STATE},
    ):
        assert_same(load_pt(content, tmp_path), STATE)
    with pytest.raises(InputError, match="holds the model only as exp_avg"):
        load_pt({"exp_avg": STATE}, tmp_path)


A, B = torch.randn(2, 36, generator=torch.Generator().manual_seed(1)), torch.ones(36, 2)
PAIR = {f"{Q[:-7]}.lora_A.weight": A, f"{Q[:-7]}.lora_B.weight": B}
MERGED = (STATE[Q].double() + B.double() @ A.double()).float()


@pytest.mark.parametrize(
    "content",
    [
        {"lora": PAIR, "step": 3},
        {"state_dict": {"lora": PAIR}, "optimizer": {"state": {0: {"exp_avg": ZEROS(2)}}}},
        {**PAIR, "config": {"rank": 2}, "epoch": 1},
        {"ema": PAIR, "model": {}},
        {"generator_lora": PAIR, "critic_lora": {name: 2 * part for name, part in PAIR.items()}},
        {"lora": PAIR, "critic_lora": {name: 2 * part for name, part in PAIR.items()}},
    ],
)
def test_a_lora_is_found_in_whatever_entry(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "lora.pt")
    torch.testing.assert_close(load_weights(SPEC, save_base(tmp_path), lora=tmp_path / "lora.pt")[Q], MERGED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"generator": PAIR, "generator_ema": PAIR}, "holds 2 entries that could be meant: generator, gen"),
        (
            {"generator_lora": PAIR, "style": PAIR},
            "holds 2 entries that could be meant: generator_lora, style",
        ),
        ({**PAIR, "other": PAIR}, "holds 2 entries that could be meant: the file itself, other"),
        ({"critic_lora": PAIR}, "only as critic_lora, which is not what generates"),
    ],
)
def test_entries_of_a_lora_are_not_guessed(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "lora.pt")
    with pytest.raises(InputError, match=message):
        load_weights(SPEC, save_base(tmp_path), lora=tmp_path / "lora.pt")


def test_a_lora_with_scales_is_merged_as_it_means(tmp_path: Path) -> None:
    eight = {name: part.to(torch.float8_e4m3fn) for name, part in PAIR.items()}
    scales = {name.replace(".weight", ".scale_weight"): torch.tensor(0.5) for name in PAIR}
    save_file({**eight, **scales}, tmp_path / "lora.safetensors")
    meant = (
        STATE[Q] + 0.25 * eight[f"{Q[:-7]}.lora_B.weight"].float() @ eight[f"{Q[:-7]}.lora_A.weight"].float()
    )
    weights = load_weights(SPEC, save_base(tmp_path), lora=Lora(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(weights[Q], meant)
    save_file(eight, tmp_path / "lora_fp8_scaled.safetensors")
    with pytest.raises(InputError, match="the name of the file says that it is scaled"):
        load_weights(SPEC, save_base(tmp_path), lora=tmp_path / "lora_fp8_scaled.safetensors")
    save_file(PAIR, tmp_path / "for_fp8_scaled.safetensors")
    weights = load_weights(SPEC, save_base(tmp_path), lora=tmp_path / "for_fp8_scaled.safetensors")
    torch.testing.assert_close(weights[Q], MERGED)


@pytest.mark.parametrize(
    ("tensor", "metadata", "config", "message"),
    [
        (torch.tensor(0.0), None, None, r"has alpha 0 \(alpha tensors of the file\), which some programs"),
        (None, {"ss_network_alpha": "0"}, None, r"has alpha 0 \(ss_network_alpha\)"),
        (None, None, {"r": 2, "lora_alpha": 0}, r"has alpha 0 \(adapter_config.json\)"),
        (torch.tensor(True), None, None, "alpha is stored as bool"),
        (None, {"ss_network_alpha": "8", "ss_network_dim": "32"}, None, "metadata for rank 32, and .* 2"),
        (None, {"lora_alpha": "8"}, None, r"speaks of an alpha in its metadata \(lora_alpha\)"),
        (None, {"networkAlpha": "8"}, None, r"speaks of an alpha in its metadata \(networkAlpha\)"),
        (None, {"peft_config": '{"r": 2, "lora_alpha": 8}'}, None, r"speaks of an alpha .* \(peft_config\)"),
        (None, {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 8}'}, None, "speaks of an alpha"),
        (None, None, {"r": 2, "alpha": 8}, "has alpha 8; expected lora_alpha"),
    ],
)  # fmt: skip
def test_an_alpha_that_is_not_understood_is_not_taken_as_the_rank(
    tensor: Tensor | None, metadata: dict[str, str] | None, config: object, message: str, tmp_path: Path
) -> None:
    alpha = {} if tensor is None else {f"{Q[:-7]}.alpha": tensor}
    save_file({**PAIR, **alpha}, tmp_path / "lora.safetensors", metadata=metadata)
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_weights(SPEC, save_base(tmp_path), lora=tmp_path / "lora.safetensors")


def test_the_configuration_beside_a_link_counts_in_other_processes_too(tmp_path: Path) -> None:
    """As in the hub's cache, where a file is a link to a blob, which has nothing beside it."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(PAIR, tmp_path / "blobs" / "0f")
    (tmp_path / "snapshot" / "adapter_model.safetensors").symlink_to(tmp_path / "blobs" / "0f")
    (tmp_path / "snapshot" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    weights = load_weights(
        SPEC, save_base(tmp_path), lora=tmp_path / "snapshot" / "adapter_model.safetensors"
    )
    reopened, arguments = weights.__reduce__()
    again = reopened(*arguments)
    torch.testing.assert_close(weights[Q], STATE[Q] + 3 * (B @ A))
    assert torch.equal(again[Q], weights[Q])
