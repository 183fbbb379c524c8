"""`forcingkv export --encoder`: where the encoder comes from, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.models.test_decoder_files import as_folder, as_pth
from tests.models.test_decoders import SMALL, small_taehv, small_vae

SPEC = """
base = "self-forcing"
name = "narrow"
layers = 1
heads = 2
head_dim = 12
ffn_width = 32
text_width = 8
text_length = 6
latent_channels = 4
width = 48
height = 32
dtype = "float32"
"""
PIXELS = """
latent_channels = 3
decoder = { kind = "pixels", spatial_stride = 1, temporal_stride = 1 }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with specs, a VAE, and a tiny decoder."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "spec.toml").write_text(SPEC)
    (folder / "pixels.toml").write_text(SPEC.replace("latent_channels = 4\n", "") + PIXELS)
    (folder / "other").mkdir()
    as_folder(small_vae().state_dict(), folder)
    other = SMALL | {"z_dim": 2, "latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}
    as_folder(small_vae(other).state_dict(), folder / "other", other)
    as_pth(small_taehv().state_dict(), folder)
    return folder


def export(run: Callable[..., Ran], place: Path, out: Path, *words: object, model: str = "spec.toml") -> Ran:
    given = ["--model", place / model, "--random-weights", "--policy", "full", "--target", "torch"]
    return run("export", *given, *words, "--out", out, "--json")


@pytest.mark.parametrize("decoder", ["wan-vae", "taehv"])
def test_the_encoder_is_that_of_the_vae_or_named_apart(
    decoder: str, place: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    words = {
        "wan-vae": ["--vae", place, "--encoder", "vae"],
        "taehv": ["--decoder", "taehv", "--vae", place / "weights.pth", "--encoder", place],
    }
    ran = export(run, place, tmp_path / "bundle", *words[decoder])
    assert ran.code == 0, ran.err
    manifest = json.loads(ran.out)
    assert manifest["model"]["decoder"]["kind"] == decoder
    assert manifest["graphs"]["encode"]["weights"] == "encoder.safetensors"
    assert set(manifest["files"]) == {"weights.safetensors", "decoder.safetensors", "encoder.safetensors"}
    ran = export(run, place, tmp_path / "bundle", *words[decoder][:-2])
    assert ran.code == 0, ran.err
    assert "encode" not in json.loads(ran.out)["graphs"]
    assert not (tmp_path / "bundle" / "encoder.safetensors").exists(), "it was the bundle's own, and goes"


@pytest.mark.parametrize(
    ("model", "words", "told"),
    [
        ("spec.toml", ["--encoder", "vae"], "means the file of --vae, which is not given"),
        ("spec.toml", ["--vae", "PLACE", "--encoder", "PLACE/none"], "there is no such file or folder"),
        ("spec.toml", ["--vae", "PLACE", "--encoder", "PLACE/weights.pth"], "holds a tiny decoder"),
        ("spec.toml", ["--vae", "PLACE", "--encoder", "PLACE/other"], "encodes to 2 channels at strides 4"),
        ("pixels.toml", ["--encoder", "PLACE"], "are pixels: it needs no encoder"),
    ],
)
def test_what_is_no_encoder_of_the_model_is_refused_before_anything_is_written(
    model: str, words: list[str], told: str, place: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    given = [word.replace("PLACE", str(place)) for word in words]
    ran = export(run, place, tmp_path / "bundle", *given, model=model)
    assert (ran.code, told in " ".join(ran.err.split())) == (2, True), ran.err
    assert not (tmp_path / "bundle").exists()
