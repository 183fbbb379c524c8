"""ComfyUI nodes, loaded and called as ComfyUI does; its progress bar is a stand-in."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import Session
from tests.runtime.conftest import small_bundle

FOLDER = Path(__file__).parents[2] / "hosts" / "comfyui"
PROMPT, OTHER = "a b c", "d e"


class CancelledError(Exception):
    """What ComfyUI raises in a node where its user cancels."""


class Bar:
    """ComfyUI's progress bar."""

    told: list[tuple[int, int, Any]] = []  # noqa: RUF012
    cancel_at: int | None = None

    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        if value == Bar.cancel_at:
            raise CancelledError
        Bar.told.append((value, total or self.total, preview))


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The nodes, found as ComfyUI finds those of a folder in custom_nodes."""
    comfy, utils = ModuleType("comfy"), ModuleType("comfy.utils")
    utils.ProgressBar = Bar  # type: ignore[attr-defined]
    comfy.utils = utils  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    Bar.told, Bar.cancel_at = [], None
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    mappings: dict[str, type] = module.NODE_CLASS_MAPPINGS
    return mappings


def call(node: type, **inputs: Any) -> tuple[Any, ...]:
    """Run a node as ComfyUI does: inputs by the names that it says, those left out with their defaults."""
    said = node.INPUT_TYPES()  # type: ignore[attr-defined]
    assert set(said) <= {"required", "optional", "hidden"}
    known = said["required"] | said.get("optional", {})
    assert inputs.keys() <= known.keys()
    assert said["required"].keys() <= inputs.keys()
    made = getattr(node(), node.FUNCTION)(**inputs)  # type: ignore[attr-defined]
    assert len(made) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)  # type: ignore[attr-defined]
    return tuple(made)


@pytest.fixture
def session(nodes: dict[str, type]) -> Iterator[Session]:
    (opened,) = call(nodes["ForcingKVLoadBundle"], bundle=f" {small_bundle('forcing-kv')} ")
    with opened:
        yield opened


def test_a_video_is_a_batch_of_images_and_is_shown_as_it_comes(
    nodes: dict[str, type], session: Session
) -> None:
    frames, fps = call(nodes["ForcingKVGenerate"], session=session, prompt=PROMPT, seed=7, seconds=0.8)
    chunks = session.spec.chunks_for(0.8)
    expected = np.concatenate([one.frames for one in session.generate(PROMPT, seed=7, chunks=chunks)])
    assert fps == session.spec.fps
    assert isinstance(frames, torch.Tensor)
    assert frames.dtype == torch.float32
    np.testing.assert_array_equal((frames * 255).round().to(torch.uint8).numpy(), expected)
    assert [(value, total) for value, total, _ in Bar.told] == [(n, chunks) for n in range(1, chunks + 1)]
    for _, _, (kind, picture, most) in Bar.told:
        assert (kind, isinstance(picture, Image.Image)) == ("JPEG", True)
        assert max(picture.size) <= most


def test_prompts_are_switched_at_their_seconds(nodes: dict[str, type], session: Session) -> None:
    (one,) = call(nodes["ForcingKVSwitchPrompt"], second=0.8, prompt=OTHER)
    (both,) = call(nodes["ForcingKVSwitchPrompt"], second=0.4, prompt="b a", switches=one)
    assert [second for second, _ in both] == [0.4, 0.8]
    frames, _ = call(
        nodes["ForcingKVGenerate"], session=session, prompt=PROMPT, seed=7, seconds=1.5, switches=one
    )
    spec = session.spec
    video = session.generate(PROMPT, seed=7, chunks=spec.chunks_for(1.5))
    video.switch(OTHER, at=spec.chunks_for(0.8))
    expected = np.concatenate([chunk.frames for chunk in video])
    np.testing.assert_array_equal((frames * 255).round().to(torch.uint8).numpy(), expected)


def test_cancelling_ends_it_at_the_next_chunk(nodes: dict[str, type], session: Session) -> None:
    Bar.cancel_at = 2
    with pytest.raises(CancelledError):
        call(nodes["ForcingKVGenerate"], session=session, prompt=PROMPT, seed=7, seconds=5.0)
    assert len(Bar.told) == 1
    Bar.cancel_at = None
    call(nodes["ForcingKVGenerate"], session=session, prompt=PROMPT, seed=7, seconds=0.3)


def test_what_is_wrong_is_said_in_a_sentence(
    nodes: dict[str, type], session: Session, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="does not know the word 'zebra'"):
        call(nodes["ForcingKVGenerate"], session=session, prompt="zebra", seed=7, seconds=0.3)
    with pytest.raises(InputError):
        call(nodes["ForcingKVLoadBundle"], bundle=str(tmp_path))


def test_a_file_that_was_written_anew_is_another(nodes: dict[str, type], tmp_path: Path) -> None:
    """ComfyUI takes what a node gave last time until `IS_CHANGED` says something else."""
    shutil.copytree(small_bundle("forcing-kv"), tmp_path / "bundle")
    place = tmp_path / "bundle" / "manifest.json"
    says = nodes["ForcingKVLoadBundle"].IS_CHANGED  # type: ignore[attr-defined]
    before = says(bundle=f" {tmp_path / 'bundle'} ", device="", backend="default")
    assert before == says(bundle=str(tmp_path / "bundle"))
    os.utime(place, ns=(1, 1))
    assert says(bundle=str(tmp_path / "bundle")) != before
    place.unlink()
    assert says(bundle=str(tmp_path / "none")) == says(bundle="") == ""
    file = tmp_path / "embeds.safetensors"
    file.write_bytes(b"one")
    for node in ("ForcingKVGenerate", "ForcingKVLoadModel"):
        says = nodes[node].IS_CHANGED  # type: ignore[attr-defined]
        given = {"embeds": str(file)} if node == "ForcingKVGenerate" else {"model": "demo", "vae": str(file)}
        before = says(**given, prompt="a")
        file.write_bytes(file.read_bytes() + b"two")
        assert says(**given, prompt="b") != before


def test_a_switch_behind_the_end_is_refused(nodes: dict[str, type], session: Session) -> None:
    (late,) = call(nodes["ForcingKVSwitchPrompt"], second=9.0, prompt=OTHER)
    with pytest.raises(InputError, match="the switch is at 9 s, and the video ends before"):
        call(nodes["ForcingKVGenerate"], session=session, prompt=PROMPT, seed=7, seconds=0.8, switches=late)


@pytest.mark.long
def test_a_model_is_baked_and_loaded(
    nodes: dict[str, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (opened,) = call(nodes["ForcingKVLoadModel"], model="demo", policy="window", device="cpu")
    with opened as session:
        assert session.plan.policy.name == "window"
        prompt = "a 3 moving left and a 7 moving up"
        frames, _ = call(nodes["ForcingKVGenerate"], session=session, prompt=prompt, seed=7, seconds=0.3)
        assert frames.shape[1:] == (32, 48, 3)
