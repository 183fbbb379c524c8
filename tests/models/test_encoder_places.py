"""Text encoders on the hub: what is fetched, and how its cache lays it out."""

from __future__ import annotations

import fnmatch
import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.models.encoder_places import find_encoder
from forcingkv.models.text_encoder import load_prompt_encoder
from tests.models.test_text_encoder import LENGTH, PROMPTS, diffusers_folder, transformers_folder, wan_folder


class Hub:
    """A repository on the hub, and the snapshot of it in the cache: links to blobs, of what was fetched."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.fetched: set[str] = set()

    def snapshot_download(
        self, name: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        assert name == "me/encoder"
        snapshot = self.cache / "models--me--encoder" / "snapshots" / "abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in (path for path in self.repository.rglob("*") if path.is_file()):
            inner = file.relative_to(self.repository).as_posix()
            allowed = any(fnmatch.fnmatch(inner, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(inner, pattern) for pattern in ignore_patterns or ()):
                self.fetched.add(inner)
                blob = (
                    self.cache
                    / "models--me--encoder"
                    / "blobs"
                    / hashlib.sha256(file.read_bytes()).hexdigest()
                )
                blob.parent.mkdir(exist_ok=True)
                blob.write_bytes(file.read_bytes())
                link = snapshot / inner
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def same(place: str, folder: Path) -> None:
    found, expected = load_prompt_encoder(place), load_prompt_encoder(folder)
    assert found.name == "encoder"
    for prompt in PROMPTS:
        np.testing.assert_array_equal(found.encode(prompt, LENGTH), expected.encode(prompt, LENGTH))


def test_only_encoder_and_tokenizer_of_a_whole_model_are_fetched(hub: Hub) -> None:
    diffusers_folder(hub.repository)
    (hub.repository / "transformer").mkdir()
    (hub.repository / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"gigabytes")
    same("me/encoder", hub.repository)
    assert {name.split("/")[0] for name in hub.fetched} == {"text_encoder", "tokenizer"}


def test_wan_s_own_repository(hub: Hub) -> None:
    wan_folder(hub.repository)
    (hub.repository / "diffusion_pytorch_model.safetensors").write_bytes(b"gigabytes")
    found = load_prompt_encoder("me/encoder")
    assert found.encode("a kite", LENGTH).shape == (3, 24)
    assert "diffusion_pytorch_model.safetensors" not in hub.fetched


def test_a_repository_of_transformers(hub: Hub) -> None:
    transformers_folder(hub.repository)
    same("me/encoder", hub.repository)


@pytest.mark.parametrize("config", [None, '{"model_type": "t5"}', '{"_class_name": "WanModel"}'])
def test_weights_of_another_model_are_never_fetched(config: str | None, hub: Hub) -> None:
    hub.repository.mkdir()
    (hub.repository / "wan-lora.safetensors").write_bytes(b"terabytes")
    if config:
        (hub.repository / "config.json").write_text(config)
    with pytest.raises(
        InputError, match="holds no text encoder" if config is None else "describes (t5|WanModel)"
    ):
        find_encoder("me/encoder")
    assert hub.fetched <= {"config.json"}


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any, **options: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(InputError, match=r"cannot be fetched from the hub \(no route to host\)"):
        find_encoder("me/encoder")
