"""`generate --restore`: the video that is gone on with is the one that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.mp4 import read_fragments
from forcingkv.runtime.video import Mp4Writer
from tests.conftest import Ran, headmap_of, random_model, small_spec
from tests.exported import shared_bundle

Run = Callable[..., Ran]
SEED, CHUNKS, SAVED = 7, 7, 4
"""The state is saved after four chunks of three frames; the run ends after six, and the whole video is seven."""
SECONDS = CHUNKS * 3 / 16
OUTS = ("a.mp4", "a", "a.rgb")
SWITCHES = ("--switch", "0.3:d e", "--switch", "1.1:b")
"""From chunks 2 and 6 on: one before the state, one to come."""


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Frames of 12x8 pixels, three a chunk, at 16 frames a second."""
    spec = small_spec()
    weights, headmap = random_model(spec).state_dict(), headmap_of(spec, [[0], [1, 2], [], [0, 1, 2]])
    return shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap)


@pytest.fixture
def words(bundle: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """A command for the whole video, which saves its state to the folder `state`."""

    def given(out: str, *more: object, seconds: float = SECONDS) -> list[object]:
        what = ["--prompt", "a b c", "--seed", SEED, "--enlarge", 2, "--fps", 16, *SWITCHES]
        saving = ["--save", tmp_path / "state", "--save-every", SAVED]
        length = ["--seconds", seconds]
        return ["generate", "--bundle", bundle, "--out", tmp_path / out, *what, *length, *saving, *more]

    return given


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind of output: the whole video, and what is there of it when it was cut after six chunks."""
    return tmp_path_factory.mktemp("made")


def content(path: Path) -> dict[str, bytes]:
    """All files of an output by their names."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def interrupted(run: Run, words: Callable[..., list[object]], out: str, tmp_path: Path) -> dict[str, bytes]:
    """Makes the whole video, then again as far as six chunks, of which the last two came after the state.

    Returns the content of the whole one.
    """
    whole = run(*words(out))
    assert whole.code == 0, whole.err
    wanted = content(tmp_path / out)
    _remove(tmp_path / out)
    shutil.rmtree(tmp_path / "state")
    cut = run(*words(out, seconds=6 * 3 / 16))
    assert cut.code == 0, cut.err
    if out == "a":
        (tmp_path / out / "frames.json").unlink()  # what a process that was killed leaves
        (tmp_path / out / ".frame-000019.png.partial").write_bytes(b"half")
    return wanted


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize("out", OUTS)
def test_the_same_words_with_restore_give_the_uninterrupted_video(
    out: str, words: Callable[..., list[object]], tmp_path: Path, run: Run
) -> None:
    wanted = interrupted(run, words, out, tmp_path)
    going = run(*words(out, "--restore", tmp_path / "state", "--json"))
    assert going.code == 0, going.err
    assert content(tmp_path / out) == wanted
    result = json.loads(going.out)
    assert (result["kept_frames"], result["frames"], result["warnings"]) == (12, 9, [])
    assert f"{tmp_path / out} keeps its first 12 frames, and the rest follows, from chunk 4 on" in going.err
    # And once more, from the same state: the file has all frames by now, and is cut back to those of the state.
    assert run(*words(out, "--restore", tmp_path / "state")).code == 0
    assert content(tmp_path / out) == wanted
    # Nothing else but the state need be told: it knows the rest, the switch to come among it.
    short = ["generate", "--bundle", words("")[2], "--out", tmp_path / out, "--restore", tmp_path / "state"]
    again = run(*short, "--seconds", SECONDS)
    assert again.code == 0, again.err
    assert content(tmp_path / out) == wanted
