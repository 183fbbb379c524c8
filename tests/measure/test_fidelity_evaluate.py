"""`forcingkv evaluate`: bundles of a small model with random weights, and video files."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.measure.fidelity.evaluation import estimate, evaluate_sessions
from forcingkv.measure.fidelity.pairs import mean_psnr
from forcingkv.measure.fidelity.seams import ChunkLayout
from forcingkv.measure.fidelity.video_measures import METRICS, measure_video
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.video import open_writer
from studies.planted_seams import SEAMS
from tests.conftest import Ran, random_model, small_spec
from tests.exported import shared_bundle
from tests.measure.textures import Frames, moving

PROMPTS = ("a b", "c d", "b e a")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of videos of 24x16 pixels, three frames a chunk, and a file of prompts."""
    folder, spec = tmp_path_factory.mktemp("bundles"), small_spec(width=24, height=16, layers=1)
    weights = random_model(spec).state_dict()
    for policy in ("full", "window"):
        shutil.copytree(shared_bundle(spec, weights, load_policy(policy), verify=False), folder / policy)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def words(bundles: Path, *more: object) -> tuple[object, ...]:
    given = ["--bundle", bundles / "window", "--bundle", bundles / "full"]
    return ("evaluate", *given, "--prompts", bundles / "prompts.txt", "--threads", 1, *more)


def videos_of(bundle: Path, seeds: int) -> list[Frames]:
    made = []
    with Session.open(bundle, threads=1) as session:
        for number in range(len(PROMPTS) * seeds):
            chunks = session.generate(PROMPTS[number // seeds], seed=5 + number, chunks=5)
            made.append(np.concatenate([chunk.frames for chunk in chunks]))
    return made


def test_bundles_are_compared_pair_by_pair(bundles: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    ran = run(*words(bundles, "--seeds", 2, "--seed", 5, "--out", tmp_path / "all.csv", "--json"))
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["reference"], result["videos"], result["prompts"], result["chunks"]) == ("full", 6, 3, 5)
    assert result["warnings"] == ["6 videos of each policy: intervals of fewer than 32 are too narrow."]
    found = {row["policy"]: row["metrics"] for row in result["policies"]}
    assert list(found) == ["window", "full"]
    # What the command says is what the parts give for videos made one by one.
    full, window = (videos_of(bundles / name, 2) for name in ("full", "window"))
    assert found["window"]["psnr"]["mean"] == pytest.approx(mean_psnr(window, full))
    assert "psnr" not in found["full"]
    values = {
        name: [measure_video(video, ChunkLayout(3, 3), 16.0)["values"]["motion"] or 0.0 for video in made]
        for name, made in (("full", full), ("window", window))
    }
    prompts = np.repeat(PROMPTS, 2).tolist()
    difference = estimate(np.subtract(values["window"], values["full"]).tolist(), prompts)
    shown = found["window"]["motion"]
    assert shown["mean"] == pytest.approx(np.mean(values["window"]))
    assert shown["difference"] == pytest.approx(vars(difference))
    assert shown["low"] <= shown["mean"] <= shown["high"]
    assert found["full"]["motion"]["difference"] is None
    assert "digits_read" not in shown, "another model than the demo one has no digits"
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert [row["policy"] for row in rows[:3]] == ["full", "window", "full"]  # in turn
    assert [int(row["seed"]) for row in rows[::2]] == [5, 6, 7, 8, 9, 10]
    means = [np.mean([float(row["motion"]) for row in rows if row["policy"] == name]) for name in found]
    assert means == pytest.approx([found[name]["motion"]["mean"] for name in found])
    assert [path.name for path in tmp_path.iterdir()] == ["all.csv"]


def test_the_table_is_readable(bundles: Path, run: Callable[..., Ran]) -> None:
    ran = run(*words(bundles, "--samples", 2, "--chunks", 3))
    assert ran.code == 0, ran.err
    assert "2 videos a policy, 2 prompts: mean and 95% interval" in ran.out
    assert "difference to full, pair by pair" in ran.out
    assert "warning: 2 videos of each policy" in ran.out
    assert METRICS["seam_residual"][0] in ran.out


def test_without_full_kv_nothing_is_paired(bundles: Path, run: Callable[..., Ran]) -> None:
    given = ["--bundle", bundles / "window", "--prompts", bundles / "prompts.txt", "--chunks", 2, "--json"]
    ran = run("evaluate", *given)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["reference"] is None
    assert "psnr" not in result["policies"][0]["metrics"]


def test_a_bundle_beside_its_copy_differs_in_nothing(
    bundles: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """Policies of one name are told apart by their folders."""
    shutil.copytree(bundles / "full", tmp_path / "twin")
    given = [
        "--bundle",
        bundles / "full",
        "--bundle",
        tmp_path / "twin",
        "--prompts",
        bundles / "prompts.txt",
    ]
    ran = run("evaluate", *given, "--reference", "full", "--chunks", 2, "--json")
    assert ran.code == 0, ran.err
    found = {row["policy"]: row["metrics"] for row in json.loads(ran.out)["policies"]}
    assert "psnr" not in found["twin"], "identical videos have none"
    assert found["twin"]["ssim"]["mean"] == 1
    assert found["twin"]["motion"]["difference"]["mean"] == 0


def test_torch_measures_what_onnx_runtime_does(bundles: Path, run: Callable[..., Ran]) -> None:
    given = words(bundles, "--samples", 2, "--chunks", 2, "--json")
    found = {}
    for name, options in {"onnxruntime": [], "torch": ["--device", "cpu"]}.items():
        ran = run(*given, *options)
        assert ran.code == 0, ran.err
        assert "not policies alone" not in ran.err
        found[name] = {row["policy"]: row["metrics"] for row in json.loads(ran.out)["policies"]}
    for policy in ("full", "window"):
        ours, theirs = (found[name][policy]["motion"]["mean"] for name in ("torch", "onnxruntime"))
        assert ours == pytest.approx(theirs, rel=0.05)


def test_what_is_not_a_matter_of_policies_is_said(
    bundles: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """One bundle for torch alone, and one with graphs."""
    weights = random_model(small_spec(width=24, height=16, layers=1)).state_dict()
    spec = small_spec(width=24, height=16, layers=1)
    made = shared_bundle(spec, weights, load_policy("full"), target="torch")
    given = ["evaluate", "--bundle", made, "--bundle", bundles / "window", "--chunks", 2, "--samples", 2]
    ran = run(*given, "--prompts", bundles / "prompts.txt", "--threads", 1)
    assert ran.code == 0, ran.err
    assert "note: not policies alone are compared" in ran.err
    assert "full on the CPU, 1 thread, in float32 (torch); window on the CPU, 1 thread" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "xpu"], "finds no device xpu here"),
        (
            ["--backend", "torch", "--provider", "cpu"],
            "--provider is nothing that the backend torch has a use for",
        ),
        (["--backend", "mine"], "there is no backend 'mine'"),
    ],
)
def test_what_no_session_can_run_on_is_refused(
    options: list[str], message: str, bundles: Path, run: Callable[..., Ran]
) -> None:
    ran = run(*words(bundles, *options))
    assert ran.code == 2
    assert message in " ".join(ran.err.split())


def test_wrong_bundles_and_prompts(bundles: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    (tmp_path / "one.txt").write_text("a b\na b\n")
    full = ["--bundle", bundles / "full"]
    prompts = ["--prompts", bundles / "prompts.txt"]
    for given, message in [
        ([], "--bundle and --video are both missing; expected one of the two"),
        ([*full, "--video", "a.mp4"], "--bundle and --video are both given"),
        ([*full, *prompts, "--top", 3], "--reference-video and --top go with --video"),
        ([*full, *prompts, "--out", "all.xlsx"], "all.xlsx is not a csv file"),
        ([*full, *prompts, "--reference", "window"], "there is no bundle 'window'; expected one of full"),
        ([*full, *full, *prompts], "'full' is given twice"),
        ([*full, *prompts, "--samples", 4], "--samples is 4, but there are only 3 prompts. Give a file"),
        ([*full, "--prompts", tmp_path / "one.txt"], "there is only one prompt; expected two different ones"),
        ([*full], "no prompts ship with small"),
        (["--bundle", tmp_path, *prompts], "is not a bundle"),
    ]:
        ran = run("evaluate", *given)
        assert (ran.code, message in ran.err) == (2, True), ran.err
        assert ran.out == ""


def test_models_that_cannot_be_compared() -> None:
    def session(width: int) -> Any:
        bundle = SimpleNamespace(manifest=SimpleNamespace(frame_size=(width, 16)))
        return SimpleNamespace(spec=small_spec(), bundle=bundle)

    with pytest.raises(
        InputError, match="full is small at 24x16, window is small at 32x16; expected one model"
    ):
        evaluate_sessions({"full": session(24), "window": session(32)}, [], 5, "full")


def write(path: Path, video: Frames) -> Path:
    with open_writer(path, fps=16) as writer:
        writer.write(video)
    return path


def test_video_files(tmp_path: Path, run: Callable[..., Ran]) -> None:
    layout, video = ChunkLayout(9, 12), moving(45, (1, 1))
    planted = SEAMS["brightness, 4 levels"](video, layout)
    plain, seamed = write(tmp_path / "plain.mp4", video), write(tmp_path / "seamed.mp4", planted)
    given = ["--video", seamed, "--video", plain, "--reference-video", plain, "--reference-video", plain]
    ran = run("evaluate", *given, "--json", "--out", tmp_path / "all.csv")
    assert ran.code == 0, ran.err
    first, second = json.loads(ran.out)["videos"]
    assert (first["frames"], first["fps"], first["boundaries"]) == (45, 16.0, [8, 20, 32])
    assert first["values"]["seam_residual"] > 1.4 * second["values"]["seam_residual"]
    assert [len(first["seams"][name]) for name in ("motion", "jolt", "residual")] == [3] * 3
    levels = [value or 99 for value in first["psnr_by_frame"]]
    assert np.mean(levels[9:21]) < np.mean(levels[:9]) - 5
    assert second["values"]["psnr"] is None
    assert second["values"]["ssim"] == 1
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == [str(seamed), str(plain)]
    assert (rows[1]["psnr"], float(rows[1]["ssim"])) == ("", 1)
    shown = run("evaluate", "--video", seamed)
    assert shown.code == 0, shown.err
    assert "seamed" in shown.out
    assert "PSNR" not in shown.out


def test_wrong_video_files(tmp_path: Path, run: Callable[..., Ran]) -> None:
    video = moving(21)
    whole = write(tmp_path / "whole.mp4", video)
    text = tmp_path / "text.mp4"
    text.write_text("not a video at all")
    one, short = write(tmp_path / "one.mp4", video[:1]), write(tmp_path / "short.mp4", video[:20])
    small = write(tmp_path / "small.mp4", video[:, :32])

    def with_reference(path: Path) -> list[Any]:
        return ["--video", path, "--reference-video", whole]

    for given, message in [
        (["--video", tmp_path / "nosuch.mp4"], "nosuch.mp4: there is no such file"),
        (["--video", text], "text.mp4 cannot be read as a video ("),
        (["--video", one], "one.mp4 has 1 frame; expected two or more"),
        (with_reference(short), "short.mp4 has 20 frames; expected more than 20"),
        (with_reference(small), "small.mp4 has frames of 96x32; expected 96x64"),
        (
            ["--video", whole, *with_reference(whole)],
            "--video is given 2 times and --reference-video 1 times; expected a reference",
        ),
        (
            ["--video", whole, "--chunk-frames", 13],
            "frames a chunk are 9 in the first chunk and 13 in later",
        ),
        (["--video", whole, "--device", "cpu"], "and --compile go with --bundle, not --video"),
        (["--video", whole, "--top", 21], "has 20 pairs of frames, and the 21 with most motion"),
    ]:
        ran = run("evaluate", *given)
        assert (ran.code, message in ran.err) == (2, True), ran.err
        assert ran.out == ""


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "polars", "onnx", "seaborn", "matplotlib"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocked())
from forcingkv.__main__ import main
sys.argv = ["forcingkv", *sys.argv[1:]]
main()
"""


def test_it_needs_no_torch(bundles: Path) -> None:
    given = ["--bundle", bundles / "full", "--prompts", bundles / "prompts.txt", "--chunks", 2, "--json"]
    command = [sys.executable, "-c", WITHOUT, "evaluate", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["videos"] == 3


def test_without_opencv_the_extra_is_named(
    tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cv2" else found(name))
    ran = run("evaluate", "--video", tmp_path / "a.mp4")
    assert ran.code == 2
    assert (
        "this needs cv2, which is not installed. Install it with: pip install 'forcingkv[evaluate]'"
        in ran.err
    )


def test_a_place_that_cannot_be_written(tmp_path: Path, run: Callable[..., Ran]) -> None:
    video = write(tmp_path / "a.mp4", moving(10))
    ran = run("evaluate", "--video", video, "--out", video / "all.csv")
    assert ran.code == 2
    assert "all.csv cannot be written" in ran.err
