"""A frame-wise model with `++` in its name through the doors that users take: plan, export, generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forcingkv.runtime import Session
from tests.conftest import Ran, headmap_of, small_spec
from tests.runtime.videos import assert_same

Run = Callable[..., Ran]
NAME = "causal-forcing++-2step"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of bundles in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "forcingkv" / "bundles"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """The preset in small, of the same name, in a folder and a file with `++` too."""
    path = tmp_path / f"a {NAME}" / f"{NAME}.toml"
    path.parent.mkdir()
    path.write_text(
        f'base = "{NAME}"\nlayers = 3\nheads = 4\nhead_dim = 12\nffn_width = 16\nlatent_channels = 3\n'
        "text_width = 8\ntext_length = 4\nwidth = 16\nheight = 16\n"
        '[decoder]\nkind = "pixels"\nspatial_stride = 1\ntemporal_stride = 1\n'
    )
    return path


def test_the_preset_is_planned_beside_another(run: Run) -> None:
    reports = {}
    for model in (NAME, "self-forcing"):
        words = ("plan", "--model", model, "--resolution", "1080p", "--gpu", "h200", "--policy", "forcing-kv")
        ran = run(*words, "--json")
        assert ran.code == 0, ran.err
        reports[model] = json.loads(ran.out)
        assert reports[model]["model"] == model
    of = {model: report["policies"][0] for model, report in reports.items()}
    assert "134 static, 226 dynamic as published for self-forcing, assumed for" in of[NAME]["heads"]
    assert "assumed" not in of["self-forcing"]["heads"]


def test_export_and_generate(spec: Path, cache: Path, tmp_path: Path, run: Run) -> None:
    """The same two typical layers, by way of a bundle and by way of the cache: the same video."""
    model = ["--model", spec, "--random-weights", "--layers", 2, "--policy", "forcing-kv"]
    bundle = spec.parent / "b++"
    ran = run("export", *model, "--target", "torch", "--dtype", "float32", "--out", bundle)
    assert ran.code == 0, ran.err
    assert "note: no head map is given: " in ran.err
    assert "KV cache" in ran.out
    assert "phases at chunk 0, 1, 2, 5" in ran.out
    out = spec.parent / "v++.rgb"
    making = ["--prompt", "a kite", "--seconds", 0.5, "--device", "cpu", "--dtype", "float32", "--json"]
    ran = run("generate", *model, *making, "--out", out)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["frames"] == 8, "one pixel frame a chunk"
    (folder,) = cache.iterdir()
    assert folder.name.startswith("causal-forcing__-2step-")
    with Session.open(folder) as session, Session.open(bundle) as other:
        assert (session.spec.name, session.spec.layers, session.spec.frames_per_chunk) == (NAME, 2, 1)
        text = np.ones((1, 4, 8), np.float32)
        assert_same(*(one.generate(text, seed=3, chunks=8) for one in (session, other)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", 2], "expected --random-weights beside it"),
        (["--random-weights", "--layers", 4], "layers is 4; expected 1 to 3, which"),
        (["--random-weights", "--layers", 2, "--headmap", "MAP"], "is for 3 layers of 1 head (small)"),
    ],
)
def test_layers_that_cannot_be_taken(
    spec: Path, tmp_path: Path, run: Run, words: list[object], message: str
) -> None:
    headmap = tmp_path / "map.json"
    headmap_of(small_spec(layers=3, heads=1), [[0]] * 3).write(headmap)
    words = [headmap if word == "MAP" else word for word in words]
    ran = run("export", "--model", spec, *words, "--target", "torch", "--out", tmp_path / "b")
    assert (ran.code, (tmp_path / "b").exists()) == (2, False)
    assert message in " ".join(ran.err.replace("│", " ").split()), ran.err
