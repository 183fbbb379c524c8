"""Commands on models other than the demo: checkpoints, decoders, embeddings, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from forcingkv.commands.models import text_input, text_inputs
from forcingkv.models.checkpoint import random_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime import memory
from forcingkv.runtime.embeds_writer import growing_embeds
from forcingkv.runtime.text import write_embeds
from tests.conftest import Ran

SPEC = """
base = "self-forcing"
name = "narrow"
layers = 2
heads = 2
head_dim = 12
ffn_width = 32
text_width = 8
text_length = 6
attended_frames = 15
width = 96
height = 64
dtype = "float32"
"""
PIXELS = """
latent_channels = 3
decoder = { kind = "pixels", spatial_stride = 1, temporal_stride = 1 }
"""
PROMPTS = ["a red kite", "a blue boat"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec, a checkpoint in Self Forcing's form, and embeddings of two prompts."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "spec.toml").write_text(SPEC)
    (folder / "prompts.txt").write_text("a red kite\n")
    (folder / "pixels.toml").write_text(SPEC.replace("layers = 2", "layers = 1") + PIXELS)
    weights = random_weights(load_spec(str(folder / "spec.toml")), seed=1)
    state = {f"model.{name}": weights[name] for name in weights}
    torch.save({"generator": state, "generator_ema": state}, folder / "self_forcing_dmd.pt")
    drawn = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    write_embeds(folder / "embeds.safetensors", PROMPTS, list(drawn), {})
    return folder


def options(place: Path, *names: str) -> list[object]:
    known = {"model": "spec.toml", "checkpoint": "self_forcing_dmd.pt", "embeds": "embeds.safetensors"}
    return [word for name in names for word in (f"--{name}", place / known[name])]


@pytest.mark.slow
@pytest.mark.usefixtures("white_pictures")
def test_from_a_public_checkpoint_to_a_video(place: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    given = options(place, "model", "checkpoint")
    ran = run(
        "analyze",
        "heads",
        *given,
        *options(place, "embeds"),
        "--samples",
        2,
        "--chunks",
        3,
        "--key",
        "generator",
        "--rule",
        "quota",
        "--out",
        tmp_path / "heads",
        "--json",
    )
    assert ran.code == 0, ran.err
    headmap = tmp_path / "heads" / "headmap.json"
    assert json.loads(ran.out)["headmap"]["model"]["weights"]
    words = ["--policy", "forcing-kv", "--decoder", "taehv", "--resolution", "96x96", "--out", tmp_path / "b"]
    for refused in (["--key", "ema"], []):
        ran = run("export", *given, *refused, "--headmap", headmap, *words)
        assert ran.code == 2, "taehv has no weights here, and there is no entry 'ema'"
        assert not (tmp_path / "b").exists()
    ran = run("export", *options(place, "model"), "--random-weights", "--headmap", headmap, *words, "--json")
    assert ran.code == 0, ran.err
    manifest = json.loads(ran.out)
    assert manifest["model"]["decoder"]["kind"] == "taehv"
    assert set(manifest["files"]) > {"weights.safetensors", "decoder.safetensors"}
    ran = run(
        "generate",
        "--bundle",
        tmp_path / "b",
        *options(place, "embeds"),
        "--prompt",
        PROMPTS[1],
        "--seconds",
        1,
        "--out",
        tmp_path / "video.mp4",
        "--json",
    )
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["frames"] == 21
    with av.open(str(tmp_path / "video.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 16
    assert [frame.shape for frame in frames] == [(96, 96, 3)] * 21

    for words, message in [
        (["--prompt", "a green car"], "has no embedding of 'a green car'; expected one of 'a red kite'"),
        ([], "has 2 prompts, and none was asked for"),
    ]:
        ran = run(
            "generate",
            "--bundle",
            tmp_path / "b",
            *options(place, "embeds"),
            *words,
            "--out",
            tmp_path / "other.mp4",
        )
        assert (ran.code, message in ran.err) == (2, True), ran.err
    ran = run("generate", "--bundle", tmp_path / "b", "--prompt", "a kite", "--out", tmp_path / "other.mp4")
    assert (ran.code, "narrow takes text embeddings, not words" in ran.err) == (2, True), ran.err
    assert not (tmp_path / "other.mp4").exists()


EXPORT = ["export", "--policy", "full", "--out", "OUT"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*EXPORT, "--model", "self-forcing"], "--checkpoint gdhe17/Self-Forcing, or use --random-weights"),
        (
            [*EXPORT, "--model", "SPEC", "--checkpoint", "PT"],
            "the weights of the decoder wan-vae are not given",
        ),
        (
            [*EXPORT, "--model", "SPEC", "--random-weights", "--checkpoint", "PT"],
            "use either --random-weights or --checkpoint, --key and --lora, not both",
        ),
        ([*EXPORT, "--model", "SPEC", "--checkpoint", "PT", "--key", "ema"], "has no entry 'ema'"),
        (
            [*EXPORT, "--model", "longlive", "--checkpoint", "PT"],
            "self_forcing_dmd.pt does not fit the model longlive",
        ),
        (
            [*EXPORT, "--model", "SPEC", "--checkpoint", "PT", "--lora", "PT"],
            "self_forcing_dmd.pt is not a LoRA of this model: unexpected",
        ),
        ([*EXPORT, "--model", "SPEC", "--random-weights", "--dtype", "float8"], "no dtype 'float8'"),
        ([*EXPORT, "--model", "demo", "--decoder", "taehv"], "the latents of demo are pixels"),
        (
            [*EXPORT, "--model", "SPEC", "--random-weights", "--decoder", "taehv", "--vae", "PT"],
            "is no tiny decoder; expected convolutions at the layers",
        ),
        (
            [*EXPORT, "--model", "SPEC", "--random-weights", "--resolution", "480x"],
            "'480x' is not a resolution",
        ),
        (
            ["analyze", "heads", "--model", "SPEC", "--random-weights", "--out", "OUT"],
            "no prompts ship with narrow",
        ),
        (
            ["analyze", "heads", "--model", "SPEC", "--random-weights", "--embeds", "PT", "--out", "OUT"],
            "self_forcing_dmd.pt is not a safetensors file",
        ),
        (
            ["encode", "--prompts", "TEXT", "--text-encoder", "no/such/folder", "--out", "OUT"],
            "no/such/folder cannot be read: there is no such file or folder",
        ),
    ],
)
def test_wrong_input(
    words: list[str], message: str, place: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    before = sorted(place.iterdir())
    files = {"SPEC": place / "spec.toml", "PT": place / "self_forcing_dmd.pt", "TEXT": place / "prompts.txt"}
    files["OUT"] = tmp_path / "out"
    ran = run(*(files.get(word, word) for word in words))
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert (sorted(place.iterdir()), list(tmp_path.iterdir())) == (before, []), "nothing is left behind"


def test_a_model_too_large_to_verify_is_refused_with_what_it_needs(
    place: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    words = [
        "export",
        "--model",
        place / "pixels.toml",
        "--random-weights",
        "--policy",
        "full",
        "--resolution",
        "32x32",
        "--out",
        tmp_path / "b",
    ]
    ran = run(*words)
    assert ran.code == 2
    assert "verifying narrow at 32x32 needs about" in ran.err
    assert "0.0 GB are available. Export with --no-verify" in ran.err
    assert list(tmp_path.iterdir()) == []
    ran = run(*words, "--no-verify")
    assert ran.code == 0, ran.err
    assert "not verified against torch" in ran.out
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["verification"] == {}


def test_embeddings_that_leave_out_the_end_of_a_prompt_are_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By commands that take one prompt (`generate`) or several (`analyze`, `evaluate`, `export`)."""
    spec, shapes = load_spec(str(place / "spec.toml")), [(6, 8), (2, 8)]
    with growing_embeds(tmp_path / "e", PROMPTS, PROMPTS, [1203, 2], shapes, {}) as growing:
        for shape in shapes:
            growing.write(np.ones(shape, np.float32))
    for prompt in PROMPTS:
        text_input(spec, prompt, tmp_path / "e")
    assert capsys.readouterr().err == "note: the last 1,197 tokens of 'a red kite' are not used\n"
    text_inputs(spec, None, tmp_path / "e")
    assert capsys.readouterr().err == "note: 1 of 2 prompts are cut to 6 tokens\n"
