"""The command line: bad input gets a message, exit code 2 and leaves nothing; good input gives files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import av
import pytest

from forcingkv.models.presets import load_spec
from tests.conftest import Ran, headmap_of
from tests.exported import demo_bundle

PROMPT = "a 3 moving left and a 7 moving up"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `headmap.json`, for the demo model, and a `bundle` of it made by the command line."""
    folder = tmp_path_factory.mktemp("made")
    headmap_of(load_spec("demo"), [[0, 1], [2], [0, 3], [], [0, 1, 2, 3], [1]]).write(folder / "headmap.json")
    shutil.copytree(demo_bundle(), folder / "bundle")
    return folder


def spoilt(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((folder / "headmap.json").read_text())
    change(data)
    path = folder / "spoilt.json"
    path.write_text(json.dumps(data))
    return path


def first(data: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = data["layers"][0]
    return layer


def for_other_model(data: dict[str, Any]) -> None:
    data["model"]["layers"] = 5
    data["layers"].pop()


EXPORT = ["export", "--model", "demo", "--target", "onnx", "--headmap"]
RTX = ["--target", "tensorrt-rtx", "--sm"]


def test_export_says_that_a_policy_uses_no_head_map(made: Path, run: Callable[..., Ran]) -> None:
    ran = run(*EXPORT, made / "headmap.json", "--policy=window", "--checkpoint=./absent.pt", "--out=nowhere")
    assert (ran.code, "the policy window treats all heads alike, and uses no head map" in ran.err) == (
        2,
        True,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (for_other_model, "is for 5 layers of 4 heads (demo); expected 6 layers of 4 heads"),
        (lambda d: first(d)["heads"]["dynamic"].append(0), "layer 0 gives head 0 twice"),
        (lambda d: first(d)["heads"]["dynamic"].remove(2), "layer 0 leaves out head 2"),
        (lambda d: first(d).update(scores=[float("nan")] * 4), "the number NaN is not a finite number"),
    ],
    ids=["another model", "overlapping", "missing", "NaN"],
)
def test_a_faulty_head_map(
    change: Callable[[dict[str, Any]], object],
    message: str,
    made: Path,
    tmp_path: Path,
    run: Callable[..., Ran],
) -> None:
    shutil.copy(made / "headmap.json", tmp_path)
    before = sorted(tmp_path.iterdir())
    path = spoilt(tmp_path, change)
    ran = run(*EXPORT, path, "--out", tmp_path / "b")
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
    path.unlink()
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["export", "--model", "nosuch", "--out", "OUT"],
            "no model 'nosuch'; expected one of causal-forcing, causal-forcing++-1step, ",
        ),
        (["export", "--model", "demo", "--out", "OUT"], "the policy forcing-kv needs a head map"),
        ([*EXPORT, "MAP", "--resolution", "50x32", "--out", "OUT"], "demo runs at 48x32 only"),
        (
            [*EXPORT, "MAP", "--policy", "POLICY", "--out", "OUT"],
            "97 segments are asked of the 96 tokens",
        ),
        ([*EXPORT, "MAP", "--resolution", "96x64", "--out", "OUT"], "runs at 48x32 only"),
        ([*EXPORT, "MAP", "--policy", "nosuch", "--out", "OUT"], "there is no policy 'nosuch'"),
        ([*EXPORT, "MAP", "--out", "FILE/bundle"], "bundle cannot be written"),
        ([*EXPORT, "MAP", "--out", "x" * 300], "cannot be written (File name too long)"),
        (
            [*EXPORT, "MAP", "--checkpoint", "", "--out", "OUT"],
            "there is no such file or folder; expected a file",
        ),
        (["evaluate", "--video", "x" * 300], "there is no such file; expected a video"),
        ([*EXPORT, "nosuch.json", "--out", "OUT"], "nosuch.json cannot be read"),
        ([*EXPORT, "MAP", "--checkpoint", "FILE", "--out", "OUT"], "cannot be read as a torch file"),
        (
            ["export", "--model", "demo", "--target", "cuda", "--out", "OUT"],
            "target: there is no target 'cuda'; expected",
        ),
        ([*EXPORT, "MAP", *RTX, "90", "--out", "OUT"], "no engines for sm_90; expected one of 75, 80"),
        ([*EXPORT, "MAP", *RTX, "90", "--out", "OUT"], "build with --target tensorrt, on a machine"),
        (
            [*EXPORT, "MAP", *RTX, "89", "--dtype", "float32", "--out", "OUT"],
            "no attention kernel in float32",
        ),
        ([*EXPORT, "MAP", *RTX, "86", "--dtype", "fp8", "--out", "OUT"], "bfloat16"),
        ([*EXPORT, "MAP", *RTX, "89", "--aot", "--out", "OUT"], "--aot: tensorrt-rtx has no plugins"),
        ([*EXPORT, "MAP", *RTX, "89", "--policy", "POLICY", "--out", "OUT"], "97 segments are asked of"),
        (
            [
                "export",
                "--model",
                "self-forcing",
                "--random-weights",
                "--headmap",
                "MAP",
                *RTX,
                "89",
                "--out",
                "OUT",
            ],
            "is for 6 layers of 4 heads",
        ),
        ([*EXPORT, "MAP", "--sm", "89", "--out", "OUT"], "--sm is for engines only; expected --target"),
        (["analyze", "heads", "--model", "nosuch", "--out", "OUT"], "there is no model 'nosuch'"),
        (
            ["analyze", "heads", "--model", "demo", "--prompts", "EMPTY", "--out", "OUT"],
            "has no prompts",
        ),
        (
            ["analyze", "heads", "--model", "demo", "--prompts", "FILE", "--out", "OUT"],
            "not know the word",
        ),
        (["analyze", "heads", "--model", "demo", "--chunks", "1", "--out", "OUT"], "chunks: 1 are too few"),
        (["analyze", "heads", "--model", "demo", "--rule", "magic", "--out", "OUT"], "no rule 'magic'"),
        (
            ["analyze", "heads", "--model", "demo", "--samples", "1", "--out", "FILE/x"],
            "cannot be listed",
        ),
        (["generate", "--bundle", "nosuch", "--prompt", PROMPT, "--out", "OUT.mp4"], "is not a bundle"),
        (["generate", "--bundle", "BUNDLE", "--prompt", " ", "--out", "OUT.mp4"], "the prompt is empty"),
        (["generate", "--bundle", "BUNDLE", "--prompt", "a cat", "--out", "OUT.mp4"], "the word 'cat'"),
        (
            ["generate", "--bundle", "BUNDLE", "--prompt", PROMPT, "--out", "OUT.avi"],
            "is not an mp4 file",
        ),
        (
            ["generate", "--bundle", "BUNDLE", "--prompt", PROMPT, "--out", "FILE/a.mp4"],
            "cannot be written",
        ),
        (["headmap", "validate", "nosuch.json"], "nosuch.json cannot be read"),
        (["inspect", "nosuch"], "is not a bundle"),
    ],
)
def test_wrong_input(
    words: list[str], message: str, made: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    (tmp_path / "file").write_text("a cat\n")
    (tmp_path / "empty").write_text("\n \n")
    policy = resources.files("forcingkv.runtime.kv.policies").joinpath("forcing-kv.toml").read_text()
    (tmp_path / "policy.toml").write_text(policy.replace("segments = 6", "segments = 97"))
    before = sorted(tmp_path.iterdir())
    places = {"FILE": "file", "EMPTY": "empty", "POLICY": "policy.toml", "OUT": "out"}
    given = [w.replace("MAP", str(made / "headmap.json")) if w == "MAP" else w for w in words]
    given = [str(made / "bundle") if w == "BUNDLE" else w for w in given]
    for name, file in places.items():
        given = [str(tmp_path / w.replace(name, file)) if w.startswith(name) else w for w in given]
    ran = run(*given)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_a_changed_byte_and_a_path_that_leaves_the_bundle(
    made: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    bundle = tmp_path / "bundle"
    for change, message in [
        (
            lambda data: data["files"].update({"../x": data["files"]["step.onnx"]}),
            "'../x', which is not inside",
        ),
        (None, "weights.safetensors has the digest"),
    ]:
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(made / "bundle", bundle)
        if change:
            data = json.loads((bundle / "manifest.json").read_text())
            change(data)
            (bundle / "manifest.json").write_text(json.dumps(data))
        else:
            content = bytearray((bundle / "weights.safetensors").read_bytes())
            content[1000] ^= 1
            (bundle / "weights.safetensors").write_bytes(content)
        ran = run("generate", "--bundle", bundle, "--prompt", PROMPT, "--out", tmp_path / "a.mp4")
        assert (ran.code, message in ran.err) == (2, True), ran.err
        assert sorted(tmp_path.iterdir()) == [bundle]


def test_generate_writes_a_video_that_plays(made: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = tmp_path / "a.mp4"
    ran = run(
        "generate",
        "--bundle",
        made / "bundle",
        "--prompt",
        PROMPT,
        "--seconds",
        1.5,
        "--enlarge",
        4,
        "--out",
        path,
        "--json",
    )
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["frames"], result["chunks"]) == (12, 4)
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 8
    assert [frame.shape for frame in frames] == [(128, 192, 3)] * 12
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("white_pictures")
def test_analyze_then_show(tmp_path: Path, run: Callable[..., Ran]) -> None:
    out = tmp_path / "heads"
    ran = run("analyze", "heads", "--model", "demo", "--samples", 1, "--chunks", 3, "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in out.iterdir()) == [
        "headmap.json",
        "report.html",
        "stability.json",
        "stats",
    ]
    counts = {"static": 0, "dynamic": 0}
    for layer in json.loads(ran.out)["headmap"]["layers"]:
        for label, heads in layer["heads"].items():
            counts[label] += len(heads)
    assert sum(counts.values()) == 24
    assert run("headmap", "validate", out / "headmap.json", "--model", "demo").code == 0
    shown = run("headmap", "show", out / "headmap.json").out.splitlines()
    assert shown[6].startswith("demo, 6 layers x 4 heads: ")
    assert sum(line.count("S") for line in shown[:6]) == counts["static"]


def test_inspect_names_every_file(made: Path, run: Callable[..., Ran]) -> None:
    ran = run("inspect", made / "bundle")
    assert ran.code == 0
    for path in (made / "bundle").iterdir():
        assert path.name in ran.out or path.name == "manifest.json"
    data = json.loads(run("inspect", made / "bundle", "--json").out)
    assert data["schema"] == "forcingkv.bundle/1"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export fails where its work would begin."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("forcingkv.commands.export.weights_for", begun)


@pytest.mark.usefixtures("no_work")
def test_an_export_over_a_file_is_refused_before_the_work(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """FAULTS.md F12: it worked for 26 seconds first, and ended in a traceback."""
    (tmp_path / "b").write_text("mine")
    ran = run("export", "--model", "demo", "--policy", "window", "--out", tmp_path / "b")
    assert (ran.code, (tmp_path / "b").read_text()) == (2, "mine")
    assert "expected" in ran.err, ran.err


@pytest.mark.usefixtures("no_work")
def test_what_people_put_beside_a_bundle_is_said_to_stay(
    made: Path, tmp_path: Path, run: Callable[..., Ran], capsys: pytest.CaptureFixture[str]
) -> None:
    """CASES.md 11."""
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    (tmp_path / "bundle" / "my-video.mp4").write_bytes(b"mine")
    (tmp_path / "bundle" / "notes").mkdir()
    with pytest.raises(AssertionError, match="the work began"):
        run("export", "--model", "demo", "--policy", "window", "--out", tmp_path / "bundle")
    assert "holds what is no part of its bundle, and stays: my-video.mp4, notes" in capsys.readouterr().err
