"""`forcingkv generate`: where frames go, and what is left when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import forcingkv
from forcingkv.runtime import Session
from tests.conftest import Ran
from tests.runtime.conftest import small_bundle
from tests.runtime.fake_providers import FakeProviders

PROMPT, SEED = "a b c", 7


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Frames of 12x8 pixels, three a chunk, at 16 frames a second."""
    return small_bundle("forcing-kv")


def made_by_session(bundle: Path, chunks: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Session.open(bundle) as session:
        return np.concatenate([c.frames for c in session.generate(PROMPT, seed=SEED, chunks=chunks)])


def pictures(path: Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def words(bundle: Path, out: object, *more: object) -> list[str]:
    given = ["--bundle", bundle, "--prompt", PROMPT, "--seed", SEED, "--out", out, *more]
    return ["generate", *map(str, given)]


def child(given: list[str], **options: Any) -> subprocess.Popen[bytes]:
    places = [str(Path(forcingkv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    return subprocess.Popen([sys.executable, "-m", "forcingkv", *given], env=environment, **options)


def test_where_nodes_run_is_said_of_a_provider_that_is_not_the_cpus(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("--seconds", 0.1, "--json")
    ran = run(*words(bundle, tmp_path / "a.rgb", "--provider", "cpu", "--threads", 1, *short))
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["runs_on"], result["warnings"]) == ("the CPU, 1 thread", [])
    assert result["placement"]["step"]["nodes"].keys() == {"CPUExecutionProvider"}
    assert "nodes" not in ran.err
    ran = run(*words(bundle, tmp_path / "b.rgb", "--provider", "cuda", *short))
    assert (ran.code, ran.out) == (2, "")
    assert "--provider is cuda, which this ONNX Runtime (" in " ".join(ran.err.split())
    assert not (tmp_path / "b.rgb").exists()
    FakeProviders(monkeypatch, "migraphx").on_cpu = {"TopK"}
    ran = run(*words(bundle, tmp_path / "c.rgb", "--provider", "migraphx", *short))
    assert ran.code == 0, ran.err
    told, result = " ".join(ran.err.split()), json.loads(ran.out)
    assert "runs on GPU 0 (MIGraphX provider of ONNX Runtime)" in told
    step = result["placement"]["step"]
    assert step["elsewhere"] == {"TopK": 2}
    taken = step["nodes"]["MIGraphXExecutionProvider"]
    all_nodes = f"{taken} of {taken + 2} nodes on MIGraphXExecutionProvider"
    assert f"step: {all_nodes}, 2 on CPUExecutionProvider (TopK 2)" in told
    assert "warning: whether the memory of GPU 0 is enough was not checked" in told
    assert (tmp_path / "c.rgb").read_bytes() == (tmp_path / "a.rgb").read_bytes()


def test_a_video_says_what_it_is(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    ran = run(*words(bundle, tmp_path / "a.mp4", "--seconds", 0.5, "--enlarge", 4, "--json"))
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["frames"], result["chunks"], result["fps"]) == (9, 3, 16.0)
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].average_rate == 16
        about = video.metadata
    with Session.open(bundle) as session:
        digest = session.bundle.digest
    expected = {
        "title": PROMPT,
        "comment": f"small, policy forcing-kv, seed 7, forcingkv {forcingkv.__version__}",
        "forcingkv.prompt": PROMPT,
        "forcingkv.seed": "7",
        "forcingkv.model": "small",
        "forcingkv.policy": "forcing-kv",
        "forcingkv.bundle": digest,
        "forcingkv.version": forcingkv.__version__,
    }
    assert {key: about.get(key) for key in expected} == expected
    assert len(digest) == 64
    # Colours come back at half the resolution, so not equal; but each frame is most like its own.
    frames = made_by_session(bundle, 3).repeat(4, 1).repeat(4, 2).astype(int)
    apart = [[np.abs(seen - frame).mean() for frame in frames] for seen in pictures(tmp_path / "a.mp4")]
    assert np.argmin(apart, axis=1).tolist() == list(range(9))
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_another_rate_makes_as_many_seconds(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    ran = run(*words(bundle, tmp_path / "a.mp4", "--seconds", 1.5, "--fps", 4, "--json"))
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["frames"] == 6
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].average_rate == 4


def test_a_folder_has_the_very_frames(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    ran = run(*words(bundle, tmp_path / "frames", "--seconds", 0.3))
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"{tmp_path / 'frames'}: 6 frames in 2 chunks, ")
    seen = [pictures(path)[0] for path in sorted((tmp_path / "frames").glob("*.png"))]
    assert np.array_equal(seen, made_by_session(bundle, 2))
    record = json.loads((tmp_path / "frames" / "frames.json").read_text())
    assert (record["fps"], record["count"], record["metadata"]["forcingkv.seed"]) == (16.0, 6, "7")


def test_a_pipe_gets_the_frames_and_nothing_else(bundle: Path) -> None:
    given = words(bundle, "-", "--seconds", 0.5, "--json")
    with child(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as maker:
        # The other process sends on what it reads.
        reader = subprocess.Popen(["cat"], stdin=maker.stdout, stdout=subprocess.PIPE)
        seen = reader.communicate(timeout=300)[0]
        assert maker.stderr is not None
        said = maker.stderr.read().decode()
    assert maker.returncode == 0, said
    assert seen == made_by_session(bundle, 3).tobytes()
    assert "rgb24, 12x8, 16 frames a second\n" in said
    assert json.loads(said[said.index("{") :])["frames"] == 9


def test_a_reader_that_has_enough_ends_it_quietly(bundle: Path) -> None:
    given = words(bundle, "-", "--seconds", 1000)
    with child(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        assert maker.stderr is not None
        assert len(maker.stdout.read(1000)) == 1000
        maker.stdout.close()
        said = maker.stderr.read().decode()
    assert maker.returncode == 128 + signal.SIGPIPE
    assert "Error" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_leaves_a_video_that_plays(
    sent: signal.Signals, code: int, bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    given = words(bundle, path, "--seconds", 1000)
    with child(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as maker:
        while not (path.exists() and path.stat().st_size > 4000):
            assert maker.poll() is None
            time.sleep(0.01)
        maker.send_signal(sent)
        printed, said = maker.communicate(timeout=300)
    assert (maker.returncode, printed) == (code, b""), said
    frames = len(pictures(path))
    assert frames % 3 == 0
    assert f"stopped: {frames} frames in {path}" in said.decode()
    assert "Traceback" not in said.decode()
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_wrong_input_leaves_an_earlier_file_alone(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"earlier")
    for change, message in [
        (["--prompt", "nosuchword"], "the word 'nosuchword'"),
        (["--bundle", str(tmp_path / "nosuch")], "is not a bundle"),
        (["--backend", "nosuch"], "nosuch"),
    ]:
        ran = run(*words(bundle, path), *change)
        assert (ran.code, message in ran.err) == (2, True), ran.err
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_wrong_place_is_refused_before_the_bundle_is_read(tmp_path: Path, run: Callable[..., Ran]) -> None:
    ran = run(*words(tmp_path / "nosuch", tmp_path / "a.avi"))
    assert ran.code == 2
    assert "a.avi is not an mp4 file or another place for frames; expected a name ending in .mp4" in ran.err


def test_without_pyav_bytes_alone_can_be_written(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    ran = run(*words(bundle, tmp_path / "a.mp4"))
    assert (ran.code, "pip install 'forcingkv[video]'" in ran.err) == (2, True)
    ran = run(*words(bundle, tmp_path / "a.rgb", "--seconds", 0.1))
    assert ran.code == 0, ran.err
    assert (tmp_path / "a.rgb").read_bytes() == made_by_session(bundle, 1).tobytes()


def test_a_prompt_changes_on_the_way(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """From the first chunk that begins at that second or later, with the caches made anew or not."""
    made = {}
    for more in ((), ("--switch", "0.2:d e"), ("--switch", "0.2:d e", "--no-recache")):
        ran = run(*words(bundle, tmp_path / "frames", "--seconds", 0.75, *more))
        assert ran.code == 0, ran.err
        files = sorted((tmp_path / "frames").glob("*.png"))
        made[more] = [picture for file in files for picture in pictures(file)]
    kept, switched, stale = made.values()
    assert len(kept) == len(switched) == len(stale) == 12
    for frame in range(12):  # 0.2 seconds are over with the second chunk of three frames
        same = [np.array_equal(kept[frame], other[frame]) for other in (switched, stale)]
        assert same == [frame < 6] * 2
    assert not np.array_equal(switched[6], stale[6])


@pytest.mark.parametrize("change", ["d e", "x:d e", "0:d e", "nan:d e", "-1:d e", "inf:d e", "0.2:xyz"])
def test_a_change_that_cannot_be_used_is_refused(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], change: str
) -> None:
    ran = run(*words(bundle, tmp_path / "a.mp4", "--seconds", 0.5, "--switch", change))
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def script(folder: Path, *lines: object) -> Path:
    path = folder / "interactive.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_script_is_its_prompts_at_latent_frames(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """Of LongLive's form: from the first chunk that begins at a frame or later; with a fade at each."""
    told = script(tmp_path, {"prompts": [PROMPT, "d e", "e"], "switch_frame_indices": [4, 9]})
    given = ["generate", "--bundle", bundle, "--seed", SEED, "--seconds", 0.75, "--fade", 1]
    ran = run(*given, "--script", told, "--out", tmp_path / "a.rgb")
    assert ran.code == 0, ran.err
    said = " ".join(ran.err.split())
    assert "note: 'd e' begins with frame 6, the first of chunk 2, not with 4" in said
    assert "recache replay, the way of small" in said
    assert "'e' begins" not in said
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=SEED, chunks=4)
        video.switch("d e", at=2, fade=1)
        video.switch("e", at=3, fade=1)
        wanted = np.concatenate([chunk.frames for chunk in video])
    assert (tmp_path / "a.rgb").read_bytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--script", "S", "--prompt", "a"), "use either --script or --prompt and --switch, not both"),
        (("--script", "S", "--switch", "1:a"), "use either --script or --prompt and --switch, not both"),
        (("--prompt", "a", "--script-line", 1), "--script-line is of no use without --script"),
        (("--script", "S", "--script-line", 9), "has no video in line 9; expected one of 1"),
        (("--script", "S", "--recache", "keep"), "--recache is 'keep'; expected 'replay' or 'keep-sink' or"),
        (("--script", "S", "--recache", "none", "--no-recache"), "use either --recache or --no-recache"),
        (("--script", "S", "--recache", "keep-sink"), "recache is keep-sink, for which this session has no"),
        (("--script", "bad"), "bad, line 1: switch_frame_indices has 3 after 6; expected latent frames in"),
    ],
)
def test_a_script_that_cannot_be_followed_is_refused(
    bundle: Path, tmp_path: Path, run: Callable[..., Ran], more: tuple[object, ...], message: str
) -> None:
    told = script(tmp_path, {"prompts": [PROMPT, "d e"], "switch_frame_indices": [6]})
    bad = tmp_path / "bad"
    bad.write_text('{"prompts": ["a", "b", "c"], "switch_frame_indices": [6, 3]}')
    given = [{"S": told, "bad": bad}.get(str(word), word) for word in more]
    ran = run("generate", "--bundle", bundle, "--out", tmp_path / "a.rgb", *given)
    assert (ran.code, (tmp_path / "a.rgb").exists()) == (2, False)
    assert message in " ".join(ran.err.split())


def test_switches_after_the_end_are_told(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    told = script(tmp_path, {"prompts": [PROMPT, "d e"], "switch_frame_indices": [60]})
    ran = run(
        *("generate", "--bundle", bundle, "--script", told, "--seconds", 0.1, "--out", tmp_path / "a.rgb")
    )
    assert ran.code == 0, ran.err
    assert "note: the video ends with chunk 0, before 'd e' from chunk 20 on" in " ".join(ran.err.split())


def test_a_saved_video_goes_on(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    saving = ("--save", tmp_path / "state", "--save-every", 2)
    assert run(*words(bundle, tmp_path / "a.rgb", "--seconds", 0.9, *saving)).code == 0
    whole = (tmp_path / "a.rgb").read_bytes()
    going = ["generate", "--bundle", bundle, "--out", tmp_path / "b.rgb", "--restore", tmp_path / "state"]
    ran = run(*going, "--json")
    assert ran.code == 0, ran.err
    rest = (tmp_path / "b.rgb").read_bytes()
    assert len(rest) == len(whole) // 5  # five chunks, the state after the fourth
    assert whole.endswith(rest)
    longer = run(*going, "--seconds", 1.3)
    assert longer.code == 0, longer.err
    assert (tmp_path / "b.rgb").read_bytes().startswith(rest)
    assert len((tmp_path / "b.rgb").read_bytes()) == 3 * len(rest)
    assert run(*going[:-1], tmp_path / "nowhere").code == 2
    complete = run(*going, "--seconds", 0.1)
    assert complete.code == 2
    assert "is complete" in complete.err


def test_a_switch_in_the_way_of_a_model_of_longlives_kind(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """On ONNX Runtime, without naming it: newest frames are encoded anew."""
    from tests.runtime.conftest import small_bundle

    bundle = small_bundle("longlive")
    given = ["generate", "--bundle", bundle, "--prompt", PROMPT, "--seed", SEED, "--seconds", 0.75]
    ran = run(*given, "--switch", "0.3:d e", "--out", tmp_path / "a.rgb")
    assert ran.code == 0, ran.err
    assert "recache keep-sink, the way of small" in " ".join(ran.err.split())
    with Session.open(bundle) as session:
        video = session.generate(PROMPT, seed=SEED, chunks=4)
        video.switch("d e", recache="keep-sink", at=2)
        wanted = np.concatenate([chunk.frames for chunk in video])
    assert (tmp_path / "a.rgb").read_bytes() == wanted.tobytes()
