"""Videos of several scenes, and starts of fewer frames than a chunk has, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import Schedule
from tests.conftest import Ran, random_model, small_spec
from tests.exported import shared_bundle

PROMPT, SECOND, THIRD = "a b", "d e", "e"
SPEC = small_spec(
    layers=1,
    frames_per_chunk=2,
    attended_frames=8,
    sink_frames=2,
    scene_frames=2,
    scene_offset=8.0,
    scene_prefix="c ",
    recache="cut",
    schedule=Schedule((1000.0, 625.0), by_frame=True),
)


@pytest.fixture(scope="module")
def bundle() -> Path:
    return shared_bundle(SPEC, random_model(SPEC).state_dict(), load_policy("full"), verify=False)


def script(folder: Path, *frames: int) -> Path:
    told = {"prompts": [PROMPT, SECOND, THIRD], "switch_frame_indices": frames}
    (folder / "scenes.jsonl").write_text(json.dumps(told) + "\n")
    return folder / "scenes.jsonl"


def test_the_first_chunk_of_a_scene_has_the_prefix(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """Of the second scene only the first chunk, of the third, which follows at once, its first one too."""
    out = tmp_path / "a.rgb"
    words = ("--script", script(tmp_path, 4, 8), "--seed", 7, "--seconds", 0.7, "--out", out)
    ran = run("generate", "--bundle", bundle, *words)
    assert ran.code == 0, ran.err
    assert "recache cut, the way of small" in ran.err
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=7, chunks=6)
        video.switch("c d e", at=2)
        video.switch(SECOND, at=3, recache="none")
        video.switch("c e", at=4)
        video.switch(THIRD, at=5, recache="none")
        wanted = np.concatenate([chunk.frames for chunk in video])
    assert out.read_bytes() == wanted.tobytes()


def test_scenes_that_follow_one_another_at_once(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    words = ("--script", script(tmp_path, 4, 6), "--seconds", 0.5, "--out", tmp_path / "a.rgb", "--json")
    ran = run("generate", "--bundle", bundle, *words)
    assert ran.code == 0, ran.err


def test_another_way_has_no_prefix(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    out = tmp_path / "a.rgb"
    words = ("--prompt", PROMPT, "--switch", f"0.25:{SECOND}", "--recache", "none", "--seed", 7)
    ran = run("generate", "--bundle", bundle, *words, "--seconds", 0.5, "--out", out)
    assert ran.code == 0, ran.err
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=7, chunks=4)
        video.switch(SECOND, at=2, recache="none")
        assert out.read_bytes() == np.concatenate([chunk.frames for chunk in video]).tobytes()


def test_a_start_of_fewer_frames_than_a_chunk_is_held(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    start = np.random.default_rng(0).uniform(-1, 1, (1, 3, 1, 8, 12)).astype(np.float32)
    save_file({"latents": start}, tmp_path / "start.safetensors")
    out, latents = tmp_path / "a.rgb", tmp_path / "made.safetensors"
    given = ("--start-latents", tmp_path / "start.safetensors", "--latents-out", latents, "--out", out)
    saving = ("--save", tmp_path / "state", "--save-every", 1)
    ran = run("generate", "--bundle", bundle, "--prompt", PROMPT, "--seconds", 0.5, *given, *saving)
    assert ran.code == 0, ran.err
    assert "begins with 1 given latent frame of" in ran.err
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=0, chunks=4, start=start)
        made = [chunk.latents for chunk in video]
        np.testing.assert_array_equal(made[0][:, :, 0], start[:, :, 0])
        assert (made[0] != next(session.generate(PROMPT, seed=0, chunks=1)).latents).any()
        fresh = session.generate(PROMPT, seed=0, chunks=4, start=start)
        fresh.save(tmp_path / "before")
        restored = list(session.restore(tmp_path / "before"))
        for one, known in zip(restored, made, strict=True):
            np.testing.assert_array_equal(one.latents, known)
    again = run("generate", "--bundle", bundle, "--prompt", PROMPT, "--start-latents", latents, "--out", out)
    assert again.code == 0, again.err  # eight frames: four whole chunks
