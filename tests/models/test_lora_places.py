"""LoRAs on the hub and in its cache: named as checkpoints are, with a strength behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forcingkv.headmaps import InputError
from forcingkv.models import hub
from forcingkv.models.checkpoint import load_weights
from tests.models.test_places import COMMIT, SPEC, STATE, Hub, cache, into_cache, offline, online

__all__ = ["cache", "offline", "online"]

PAIR = {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 36), "blocks.0.ffn.0.lora_B.weight": torch.ones(40, 2)}


@pytest.fixture
def loras(online: Hub) -> Hub:
    """A repository with LoRAs: one at its top, two in folders, one of those as PEFT saves it."""
    for name in ("style.safetensors", "deep/a b.safetensors", "peft/adapter_model.safetensors"):
        (online.folder / name).parent.mkdir(exist_ok=True)
        save_file(PAIR, online.folder / name)
    (online.folder / "peft" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    (online.folder / "README.md").write_text("LoRAs")
    return online


@pytest.mark.parametrize(
    ("named", "factor", "fetched"),
    [
        ("me/ckpt", 1.0, ["style.safetensors"]),
        ("me/ckpt:0.5", 0.5, ["style.safetensors"]),
        ("me/ckpt:style.safetensors:-2", -2.0, ["style.safetensors"]),
        ("me/ckpt@main:deep/a b.safetensors", 1.0, ["deep/a b.safetensors"]),
        ("me/ckpt@main:0.25", 0.25, ["style.safetensors"]),
        ("me/ckpt:deep:0.5", 0.5, ["deep/a b.safetensors"]),
        ("me/ckpt:peft", 4.0, ["peft/adapter_config.json", "peft/adapter_model.safetensors"]),
        ("me/ckpt:peft/adapter_model.safetensors:0.5", 2.0,
         ["peft/adapter_config.json", "peft/adapter_model.safetensors"]),
    ],
)  # fmt: skip
def test_a_lora_of_the_hub(named: str, factor: float, fetched: list[str], loras: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    save_file(STATE, tmp_path / "base.safetensors")
    weights = load_weights(SPEC, tmp_path / "base.safetensors", lora=named, progress=said.append)
    torch.testing.assert_close(weights["blocks.0.ffn.0.weight"], STATE["blocks.0.ffn.0.weight"] + factor * 2)
    assert sorted(loras.fetched) == fetched
    assert said[0].startswith(f"fetching {hub.readable(sum(map(loras.size, fetched)))} of me/ckpt, revision ")
    file = fetched[-1]
    assert weights.taken == (f"LoRA of me/ckpt, revision {COMMIT[:12]}: {file}",)
    reopened, arguments = weights.__reduce__()
    loras.asked.clear()
    again = reopened(*arguments)
    assert torch.equal(again["blocks.0.ffn.0.weight"], weights["blocks.0.ffn.0.weight"])
    assert loras.asked == [], "the file that was fetched is opened, whatever the hub has by then"


def test_what_is_no_lora_on_the_hub(loras: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(STATE, tmp_path / "base.safetensors")
    (loras.folder / "other.safetensors").write_bytes(b"x")
    for named, message in {
        "me/ckpt": r"me/ckpt holds 2 files of tensors: other.safetensors, style.safetensors.*Name the file",
        "me/ckpt:none.safetensors": r"me/ckpt:none.safetensors holds 0 files of tensors",
        "me/ckpt:style.safetensors:much": r"me/ckpt:style.safetensors:much holds 0 files of tensors",
        "me/ckpt:2_1": r"me/ckpt:2_1 holds 0 files of tensors",
        "me/ckpt:nan": r"has the strength 'nan'",
        "me/other": r"me/other is no file or folder here, and cannot be fetched from the hub",
        "me/ckpt:../x": "which is no place in a repository",
        "loras/style.safetensors": r"there is no such file or folder; expected FILE, FOLDER or FILE:STRE",
    }.items():
        with pytest.raises(InputError, match=message):
            load_weights(SPEC, tmp_path / "base.safetensors", lora=named)
    assert loras.fetched == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    (loras.folder / "style.safetensors").rename(tmp_path / "me" / "ckpt")
    weights = load_weights(SPEC, tmp_path / "base.safetensors", lora="me/ckpt:0.5")
    torch.testing.assert_close(weights["blocks.0.ffn.0.weight"], STATE["blocks.0.ffn.0.weight"] + 1)
    assert loras.fetched == [], "what is here is taken"


def test_a_lora_of_the_hub_without_network(offline: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    save_file(PAIR, tmp_path / "files" / "a.safetensors")
    (tmp_path / "files" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    into_cache(tmp_path / "files", offline, "me/lora")
    save_file(STATE, tmp_path / "base.safetensors")
    weights = load_weights(SPEC, tmp_path / "base.safetensors", lora="me/lora:0.5")
    torch.testing.assert_close(weights["blocks.0.ffn.0.weight"], STATE["blocks.0.ffn.0.weight"] + 4)
    assert "(the hub cannot be asked: " in weights.taken[0]
