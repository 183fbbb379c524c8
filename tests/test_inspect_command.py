"""`forcingkv inspect`: what it says of engines, and the picture of where the memory goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.bundle_with_engines import WARNING, bundle_with_engines
from tests.conftest import Ran
from tests.runtime.conftest import small_bundle


@pytest.fixture(scope="module")
def plain() -> Path:
    """A bundle without engines."""
    return small_bundle("forcing-kv")


@pytest.fixture(scope="module")
def built(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_engines(plain, tmp_path_factory.mktemp("built") / "bundle")


def cells(out: str, name: str) -> list[list[str]]:
    """The lines that begin with that name, in words."""
    return [line.split() for line in out.splitlines() if line.startswith(f"  {name} ")]


def test_it_says_how_engines_were_built(built: Path, run: Callable[..., Ran]) -> None:
    ran = run("inspect", built)
    assert ran.code == 0, ran.err
    for sm in (89, 120):
        assert f"engines of tensorrt-rtx 1.7.1 for sm_{sm}\n" in ran.out
    assert cells(ran.out, "graph") == [["graph", "prompt", "step", "decode"]] * 2
    assert cells(ran.out, "layers")[0][1:] == ["1,000", "2,000", "3,000"]
    assert cells(ran.out, "plugin nodes")[0][2:] == ["1", "2", "3"]
    assert cells(ran.out, "phases")[0][1:] == ["1", "2", "3"]
    assert cells(ran.out, "of them scratch")[0][3:] == ["10.0", "MB", "20.0", "MB", "30.0", "MB"]
    assert cells(ran.out, "built in")[0][2:] == ["0.5", "s", "1.0", "s", "1.5", "s"]
    assert cells(ran.out, "host memory, peak")[0][3:] == ["10.0", "GB", "20.0", "GB", "30.0", "GB"]
    digest = json.loads((built / "manifest.json").read_text())["files"]["engines/step-sm120.engine"]["sha256"]
    assert cells(ran.out, "sha256")[1][2] == digest[:12]
    kernels = "token_cosines, select_segments, compact_segments for sm_80; at most 46 registers"
    assert f"kernels {kernels}" in " ".join(ran.out.split())


def test_it_says_which_passes_chunks_take(plain: Path, run: Callable[..., Ran]) -> None:
    told = " ".join(run("inspect", plain).out.split())
    said = "2 passes at 1000, 625 a chunk; noise drawn anew between passes; clean pass at 0"
    assert f"schedule {said}" in told


def test_it_says_once_what_both_gpus_need(built: Path, run: Callable[..., Ran]) -> None:
    out = run("inspect", built).out
    assert out.count("device memory of a session with tensorrt-rtx 1.7.1 for sm_89, sm_120\n") == 1
    assert [line[1:3] for line in cells(out, "weights")] == [["1.00", "GB"]] * 2 + [["6.00", "GB"]]
    assert cells(out, "activations")[-1][1:3] == ["500", "MB"], "decode beside the larger of the others"
    assert "the most of prompt and step, which take turns, and those of decode" in " ".join(out.split())
    assert [line[0] for line in cells(out, "current")] == ["current"], "it is in no buffer"


def test_lines_keep_to_80_columns(built: Path, run: Callable[..., Ran]) -> None:
    lines = run("inspect", built).out.splitlines()[1:]  # the first is the bundle's path
    assert [line for line in lines if len(line) > 80] == []
    at = lines.index("warnings")
    assert " ".join(line.strip() for line in lines[at + 1 : at + 3]) == WARNING


def test_json_has_the_manifest_and_the_footprint_of_each_gpu(built: Path, run: Callable[..., Ran]) -> None:
    data = json.loads(run("inspect", built, "--json").out)
    assert data["schema"] == "forcingkv.bundle/1"
    assert [(one["flavour"], one["version"], one["sm"]) for one in data["footprint"]] == [
        ("tensorrt-rtx", "1.7.1", 89),
        ("tensorrt-rtx", "1.7.1", 120),
    ]
    for one in data["footprint"]:
        assert one["total"] == sum(one["parts"].values())
        assert one["parts"]["activations"] == 5 * 10**8
        assert one["parts"]["weights"] == 6 * 10**9


def test_without_graphs_it_is_a_session_on_torch(run: Callable[..., Ran]) -> None:
    lean = small_bundle("forcing-kv", "torch")
    ran = run("inspect", lean)
    assert ran.code == 0, ran.err
    assert "memory of a session on torch" in ran.out
    assert "read and written in place" in ran.out
    parts = json.loads(run("inspect", lean, "--json").out)["footprint"][0]["parts"]
    assert parts["kv_current"] > 0
    assert parts["weights"] > 0


def test_without_engines_it_is_a_session_on_onnx_runtime(plain: Path, run: Callable[..., Ran]) -> None:
    ran = run("inspect", plain)
    assert "memory of a session on ONNX Runtime\n" in ran.out
    assert "device memory" not in ran.out
    assert "engines of" not in ran.out
    assert "warnings\n  none\n" in ran.out
    [one] = json.loads(run("inspect", plain, "--json").out)["footprint"]
    assert one["sm"] is None
    assert min(one["parts"][name] for name in ("weights", "activations")) > 0


def test_the_picture_is_a_png_and_json_stays_json(
    built: Path, plain: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    sizes = []
    for name, bundle in (("built", built), ("plain", plain)):
        path = tmp_path / f"{name}.png"
        ran = run("inspect", bundle, "--picture", path, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["schema"] == "forcingkv.bundle/1"
        with Image.open(path) as image:
            assert image.format == "PNG"
            sizes.append(image.size)
        assert path.stat().st_size < 150_000
    assert sizes[0][0] == sizes[1][0]
    again = tmp_path / "again.png"
    run("inspect", built, "--picture", again)
    assert again.read_bytes() == (tmp_path / "built.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "built.png", "plain.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("file/a.png", "a.png cannot be written"), ("a.svg", "a.svg is not a png file")],
)
def test_a_picture_that_cannot_be_written(
    name: str, message: str, plain: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    (tmp_path / "file").write_text("in the way")
    ran = run("inspect", plain, "--picture", tmp_path / name)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_picture_needs_matplotlib(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = run("inspect", plain, "--picture", tmp_path / "a.png")
    assert ran.code == 2
    assert "pip install 'forcingkv[analyze]'" in ran.err
