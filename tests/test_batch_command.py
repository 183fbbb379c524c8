"""`forcingkv generate --prompts`: names, what is there already, a worker that dies, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from forcingkv.commands import batch_videos
from forcingkv.commands.batch import _lane, seeds_of
from forcingkv.commands.batch_videos import BatchRun
from forcingkv.commands.going_on import about
from forcingkv.headmaps import InputError
from forcingkv.runtime.ray_cluster import off_gpus, takes_gpu
from tests.conftest import Ran
from tests.ray_workers import HAS_PROC, ray_workers
from tests.runtime.conftest import small_bundle

PROMPTS = ("a b c", "d e", "c b a")
MANY = [" ".join(words) for words in product("abcde", repeat=3)][:32]


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Frames of 12x8 pixels, three a chunk, at 16 frames a second."""
    return small_bundle("forcing-kv")


def words(bundle: Path, prompts: Path, out: Path, *more: object) -> list[str]:
    given = ["--bundle", bundle, "--prompts", prompts, "--seconds", 0.3, "--out", out, *more]
    return ["generate", *map(str, given)]


def file_of(folder: Path, prompts: list[str] | tuple[str, ...] = PROMPTS) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def lines(ran: Ran) -> list[dict[str, object]]:
    assert ran.code == 0, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def test_each_prompt_has_a_video_a_seed_named_as_vbench_wants_it(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    out = tmp_path / "videos"
    told = lines(run(*words(bundle, file_of(tmp_path), out, "--seeds", "3,7")))
    names = [f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in (0, 1)]
    assert [Path(str(one["file"])).name for one in told] == names
    assert [(one["prompt"], one["index"], one["seed"], one["made"]) for one in told] == [
        (prompt, index, seed, True) for prompt in PROMPTS for index, seed in ((0, 3), (1, 7))
    ]
    assert sorted(contents(out)) == sorted(names)


def test_a_second_run_makes_what_is_not_there_and_nothing_else(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    given = words(bundle, file_of(tmp_path), tmp_path / "videos", "--seeds", "0:2")
    lines(run(*given))
    before = contents(tmp_path / "videos")
    gone = tmp_path / "videos" / "d e-1.mp4"
    gone.unlink()
    kept = (tmp_path / "videos" / "d e-0.mp4").stat().st_mtime_ns
    told = lines(run(*given))
    assert [Path(str(one["file"])).name for one in told if one["made"]] == ["d e-1.mp4"]
    assert len(told) == 6
    assert contents(tmp_path / "videos") == before
    assert (tmp_path / "videos" / "d e-0.mp4").stat().st_mtime_ns == kept
    assert all(not one["made"] for one in lines(run(*given)))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--enlarge", 2), "enlarge is 1, not 2"),
        (("--fps", 8), "fps is 16.0, not 8.0"),
        (("--seeds", "5:6"), "seed is 0, not 5"),
        (("--seconds", 0.8), "frames, not"),
    ],
)
def test_another_video_under_the_name_is_refused_before_anything_is_made(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], more: tuple[object, ...], why: str
) -> None:
    out, prompts = tmp_path / "videos", file_of(tmp_path)
    lines(run(*words(bundle, prompts, out)))
    (out / "a b c-0.mp4").unlink()
    before = contents(out)
    ran = run(*words(bundle, prompts, out, *more))
    assert (ran.code, ran.out) == (2, "")
    assert why in " ".join(ran.err.split())
    assert contents(out) == before


def test_a_video_computed_in_something_else_is_another(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """Whoever compares dtypes would measure one of them twice."""
    given = words(bundle, file_of(tmp_path), tmp_path / "videos")
    lines(run(*given))
    for more in (("--backend", "torch"), ("--device", "cpu"), ("--dtype", "bfloat16")):
        ran = run(*given, *more)
        assert ran.code == 2
        assert "computed is onnxruntime, float32, not torch," in " ".join(ran.err.split())
    assert not any(one["made"] for one in lines(run(*given, "--backend", "onnxruntime-cpu", "--threads", 2)))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "its end is no part of a video"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is no video of such a batch"),
        (lambda path: path.write_text("notes"), "is no video of such a batch"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no video of such a batch"),
    ],
    ids=["more behind it", "cut off", "empty", "text", "pipe"],
)
def test_a_file_that_is_no_whole_video_is_named(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], spoil: Callable[[Path], object], why: str
) -> None:
    given = words(bundle, file_of(tmp_path), tmp_path / "videos")
    lines(run(*given))
    spoil(tmp_path / "videos" / "d e-0.mp4")
    ran = run(*given)
    said = " ".join(ran.err.split())
    assert (ran.code, why in said, "Choose another --out, or remove it." in said) == (2, True, True), said


def test_what_another_run_made_meanwhile_is_not_replaced(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked before either had made anything."""
    prompts = file_of(tmp_path, ("a b c",))
    lines(run(*words(bundle, prompts, tmp_path / "other", "--seeds", "5:6")))
    theirs, out = tmp_path / "other" / "a b c-0.mp4", tmp_path / "videos"

    def meanwhile(*given: object) -> dict[str, str]:
        shutil.copy(theirs, out / theirs.name)
        return about(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(batch_videos, "about", meanwhile)
    out.mkdir()
    ran = run(*words(bundle, prompts, out))
    assert (ran.code, ran.out) == (2, "")
    assert "is another video: seed is 5, not 0" in " ".join(ran.err.split())
    assert contents(out) == contents(tmp_path / "other")


def test_prompts_of_a_script_are_refused(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """There they are one video that switches; here they would be two."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompts": ["a b"]}\n{"prompts": ["a b c", "d e"]}\n', encoding="utf-8")
    ran = run(*words(bundle, path, tmp_path / "videos"))
    said = " ".join(ran.err.split())
    assert (ran.code, "line 2 has several prompts" in said, "--script" in said) == (2, True, True), said
    path.write_text('{"prompts": ["a b"]}\n{"prompts": ["d e"]}\n', encoding="utf-8")
    assert len(lines(run(*words(bundle, path, tmp_path / "videos")))) == 2


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        (("a b", "c/d"), "prompts.txt, line 2"),
        (("a b", "c", "a b"), "is there twice"),
        (("a b", "a unknownword"), "line 2"),
        ((f"{'a ' * 130}b",), "makes a name of"),
    ],
)
def test_prompts_that_cannot_be_names_or_are_not_known_are_refused_with_their_line(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], prompts: tuple[str, ...], why: str
) -> None:
    ran = run(*words(bundle, file_of(tmp_path, prompts), tmp_path / "videos"))
    assert (ran.code, ran.out) == (2, "")
    assert why in " ".join(ran.err.split())
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--prompt", "a b"), "--prompt is for one video"),
        (("--seed", 0), "--seed is for one video"),
        (("--save", "state"), "--save is for one video"),
        (("--model", "demo"), "--model is for one video"),
        (("--image", "x.png"), "--image is for one video"),
        (("--workers", 2), "--workers is how many workers Ray has"),
        (("--seeds", "5:5"), "--seeds is '5:5'"),
        (("--seconds", "inf"), "--seconds is a video without end"),
        (("--seconds", 1e12), "--seconds is 1e+12; expected at most 86,400"),
    ],
)
def test_options_of_one_video_are_refused(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], more: tuple[object, ...], why: str
) -> None:
    ran = run(*words(bundle, file_of(tmp_path), tmp_path / "videos", *more))
    assert (ran.code, ran.out) == (2, "")
    assert why in " ".join(ran.err.split())


@pytest.mark.parametrize("option", ["--seeds", "--ray", "--workers"])
def test_options_of_many_videos_need_prompts(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], option: str
) -> None:
    value = "2" if option == "--workers" else "local"
    ran = run(
        "generate", "--bundle", str(bundle), "--prompt", "a", "--out", str(tmp_path / "a.mp4"), option, value
    )
    assert ran.code == 2
    assert f"{option} is for many videos" in " ".join(ran.err.split())


@pytest.mark.parametrize("out", ["-", "a.mp4"])
def test_out_is_a_folder(bundle: Path, tmp_path: Path, run: Callable[..., Ran], out: str) -> None:
    ran = run("generate", "--bundle", str(bundle), "--prompts", str(file_of(tmp_path)), "--out", out)
    assert ran.code == 2
    assert "a folder with --prompts" in " ".join(ran.err.split())


def test_without_a_bundle_one_is_asked_for(tmp_path: Path, run: Callable[..., Ran]) -> None:
    ran = run("generate", "--prompts", str(file_of(tmp_path)), "--out", str(tmp_path / "videos"))
    assert ran.code == 2
    assert "--prompts needs a bundle" in " ".join(ran.err.split())


def test_seeds_are_said_in_two_ways() -> None:
    assert seeds_of(None) == [0]
    assert seeds_of("2:5") == [2, 3, 4]
    assert seeds_of("3, 7,11") == [3, 7, 11]
    for wrong in ("", "3:3", "5:2", "-1", "1,1", "a", "0:1000000000", "٣", "1:2:3"):
        with pytest.raises(InputError, match="--seeds is"):
            seeds_of(wrong)


def test_what_a_batch_is_computed_in() -> None:
    """Of two that are said alike a video of one would be taken for the other's."""
    nothing = {"backend": None, "device": None, "provider": None, "dtype": None, "compiled": False}

    def lane(**said: object) -> str:
        run = BatchRun(
            bundle="", digest="", chunks=1, fps=8.0, enlarge=1, embeds=None, lane="", threads=None,
            cuda_graphs=False, **nothing | said,
        )  # fmt: skip
        return _lane(run, "float32")

    assert lane() == lane(backend="onnxruntime") == lane(backend="onnxruntime-cpu") == "onnxruntime, float32"
    assert lane(provider="openvino") == "onnxruntime, float32, provider openvino"
    assert lane(backend="onnxruntime", provider="cuda") == "onnxruntime, float32, provider cuda"
    assert lane(backend="torch") == lane(device="cpu") == lane(dtype="float32") == "torch, float32"
    assert lane(dtype="bfloat16", compiled=True) == "torch, bfloat16, compiled"


@pytest.mark.parametrize(
    ("backend", "device", "provider", "gpu"),
    [
        (None, None, None, False),
        (None, "cpu", None, False),
        ("torch", "cuda", None, True),
        (None, "xpu", None, True),
        ("tensorrt", None, None, True),
        ("onnxruntime", None, "cuda", True),
        ("onnxruntime", None, "openvino", False),
    ],
)
def test_a_worker_gets_a_gpu_where_one_is_named(
    backend: str | None, device: str | None, provider: str | None, gpu: bool
) -> None:
    assert takes_gpu(backend, device, provider) is gpu


def test_a_worker_without_a_gpu_takes_none_that_it_finds() -> None:
    assert off_gpus(None, None, on_torch=False) == ("onnxruntime-cpu", None)
    assert off_gpus("onnxruntime", None, on_torch=False) == ("onnxruntime-cpu", None)
    assert off_gpus("torch", None, on_torch=True) == ("torch", "cpu")
    assert off_gpus(None, None, on_torch=True) == (None, "cpu")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find what this process finds."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def kill_one_at_work(out: Path, killed: list[int], over: threading.Event) -> None:
    while not over.is_set():
        busy = [number for number, title in ray_workers("VideoMaker").items() if ".make" in title]
        if busy and any(out.glob("*.mp4")):
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])
            return
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.usefixtures("importable")
def test_workers_that_are_told_to_end_leave_nothing(bundle: Path, tmp_path: Path) -> None:
    """More threads than cores are no reason to wait for ever; SIGTERM is answered as without Ray."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'forcingkv[ray]'")
    out = tmp_path / "videos"
    more = ("--seconds", 20, "--ray", "local", "--workers", 2, "--threads", os.cpu_count() + 1)
    given = [str(word) for word in words(bundle, file_of(tmp_path, MANY), out)]
    command = [sys.executable, "-m", "forcingkv", *given, *map(str, more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["made"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        said = process.stderr.read()
    assert "the same command makes the others" in said
    assert "SIGTERM received" not in said
    left = contents(out)
    assert left
    assert all(name.endswith(".mp4") and not name.startswith(".") for name in left), sorted(left)


@pytest.mark.long
@pytest.mark.usefixtures("importable")
def test_what_a_worker_cannot_open_is_said_as_without_ray(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'forcingkv[ray]'")
    given = words(bundle, file_of(tmp_path), tmp_path / "videos", "--provider", "openvino")
    alone, spread = run(*given), run(*given, "--ray", "local")
    assert (alone.code, spread.code) == (2, 2)
    assert "--provider" in alone.err
    assert alone.err.splitlines()[-1] in spread.err


@pytest.mark.long
@pytest.mark.usefixtures("importable")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # pipes of Ray's own processes
@pytest.mark.skipif(not HAS_PROC, reason="finds workers in /proc")
def test_two_workers_of_which_one_is_killed_make_the_videos_of_one_process(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'forcingkv[ray]'")
    prompts, seeds = file_of(tmp_path, MANY), ("--seeds", "0:2", "--threads", 1)
    lines(run(*words(bundle, prompts, tmp_path / "alone", *seeds)))
    killed: list[int] = []
    over = threading.Event()
    out = tmp_path / "spread"
    killer = threading.Thread(target=kill_one_at_work, args=(out, killed, over))
    killer.start()
    given = words(bundle, prompts, out, *seeds, "--ray", "local", "--workers", 2)
    try:
        told = lines(run(*given))
    finally:
        over.set()
        killer.join()
    assert len(killed) == 1, "no worker was found at work"
    assert len(told) == len(MANY) * 2 == 64
    assert contents(out) == contents(tmp_path / "alone")
    again = lines(run(*given))
    assert len(again) == 64
    assert not any(one["made"] for one in again)
