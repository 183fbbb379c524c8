"""The examples, each run as a stranger would run it: what they print, and what they leave."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.models.presets import load_spec
from forcingkv.runtime import Chunk, Session
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import mixed_map, random_model, small_spec
from tests.exported import shared_bundle

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
ONE, TWO = "a 3 moving left and a 7 moving up", "a 1 moving right and a 5 moving down"
FRAME = 8 * 12 * 3


@pytest.fixture(scope="module")
def bundle() -> Path:
    """A small model with random weights that knows the words of the demo model."""
    words = load_spec("demo")
    spec = small_spec(layers=2, text=words.text, text_length=words.text_length, text_width=words.text_width)
    weights = random_model(spec).state_dict()
    return shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=mixed_map(spec), verify=False)


@pytest.fixture(scope="module")
def chunks(bundle: Path) -> list[Chunk]:
    """What the examples generate, without them."""
    with Session.open(bundle) as session:
        return list(session.generate(ONE, seed=7, chunks=4))


def command(name: str, bundle: Path, *words: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), "--bundle", str(bundle), *map(str, words)]


def run(name: str, bundle: Path, *words: object, code: int = 0) -> list[str]:
    """The lines that an example prints; of standard error, where it ends with another code than 0."""
    done = subprocess.run(
        command(name, bundle, *words), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return (done.stderr if code else done.stdout).splitlines()


def test_embed(bundle: Path, chunks: list[Chunk]) -> None:
    lines = run("embed.py", bundle)
    assert [line.split(", mean")[0] for line in lines] == [
        f"chunk {index}: (3, 8, 12, 3)" for index in range(4)
    ]
    means = [float(found) for line in lines for found in re.findall(r"mean ([\d.]+)", line)]
    assert means == [round(float(chunk.frames.mean()), 1) for chunk in chunks]
    for line in lines:
        total, denoise, clean, decode = map(float, re.findall(r"\d+\.\d{3}", line))
        assert total >= denoise + clean + decode - 0.002


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a cat"], "error: prompt: the model small does not know the word 'cat'"),
        (["--bundle", "nowhere"], "error: nowhere is not a bundle"),
    ],
)
def test_embed_says_what_is_wrong(words: list[str], message: str, bundle: Path) -> None:
    (line,) = run("embed.py", bundle, *words, code=2)
    assert line.startswith(message)


def test_prompt_switch(bundle: Path) -> None:
    """At two chunks; on a CPU each switch is done for the chunk it is asked for."""
    lines = run("prompt_switch.py", bundle, "--switch", 5, ONE, "--switch", 2, TWO, "--chunks", 7)
    shown = [f"chunk {index}: {TWO if 2 <= index < 5 else ONE}" for index in range(7)]
    shown.insert(2, f"switched: from chunk 2 on: {TWO}")
    shown.insert(6, f"switched: from chunk 5 on: {ONE}")
    assert lines == shown


def test_prompt_switch_without_making_the_cache_anew(bundle: Path) -> None:
    lines = run("prompt_switch.py", bundle, "--switch", 1, TWO, "--chunks", 2, "--no-recache")
    assert lines == [f"chunk 0: {ONE}", f"switched: from chunk 1 on: {TWO}", f"chunk 1: {TWO}"]


def test_pipe(bundle: Path, chunks: list[Chunk]) -> None:
    *lines, last = run("pipe.py", bundle)
    frames = np.concatenate([chunk.frames for chunk in chunks])
    assert lines == [f"brightness {frame.mean():.2f}" for frame in frames]
    assert last == "12 frames of 12x8 sent; the reader ended with exit code 0"


def test_pipe_to_another_program(bundle: Path, chunks: list[Chunk], tmp_path: Path) -> None:
    (line,) = run("pipe.py", bundle, "--to", f"sh -c 'cat > {tmp_path}/out; exit 3'")
    assert line == "12 frames of 12x8 sent; the reader ended with exit code 3"
    assert (tmp_path / "out").read_bytes() == b"".join(chunk.frames.tobytes() for chunk in chunks)


def resumed(bundle: Path, folder: Path, chunks: int) -> list[str]:
    return command(
        "resume.py",
        bundle,
        "--state",
        folder / "state",
        "--out",
        folder / "frames.rgb",
        "--every",
        5,
        "--chunks",
        chunks,
    )


def test_resume_goes_on_after_it_was_killed(bundle: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    with subprocess.Popen(
        resumed(bundle, killed, 1_000_000), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line == "chunk 12\n":
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    first = int(re.findall(r'"index": (\d+)', (killed / "state" / "state.json").read_text())[0])
    stop = first + 8
    outputs = {}
    for folder in (killed, whole):
        done = subprocess.run(
            resumed(bundle, folder, stop), env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs[folder] = done.stdout.splitlines()
    assert first >= 10
    assert outputs[killed][0] == f"going on with chunk {first}"
    assert [line for line in outputs[killed] if line.startswith("chunk")] == [
        f"chunk {index}" for index in range(first, stop)
    ]
    assert len(outputs[whole]) == stop + stop // 5
    frames = (whole / "frames.rgb").read_bytes()
    assert len(frames) == stop * 3 * FRAME
    assert (killed / "frames.rgb").read_bytes() == frames
    (killed / "frames.rgb").write_bytes(b"")
    refused = subprocess.run(resumed(bundle, killed, stop), env=ENVIRONMENT, capture_output=True, check=False)
    assert refused.returncode == 2
    assert b"is not the file that goes with" in refused.stderr


def test_many_videos(bundle: Path) -> None:
    """Each is what a session of its own makes, whatever the other does."""
    lines = run("many_videos.py", bundle)
    alone = []
    with Session.open(bundle, threads=1) as session:
        for prompt in (ONE, TWO):
            frames = [chunk.frames for chunk in session.generate(prompt, seed=7, chunks=4)]
            alone.append(f"{prompt}: 12 frames, mean {np.concatenate(frames).mean():.2f}")
    assert [line.rsplit(", ", 1)[0] for line in lines] == alone
    assert all(re.fullmatch(r"\d+\.\d{3} s a chunk", line.rsplit(", ", 1)[1]) for line in lines)


def run_here(
    name: str,
    bundle: Path,
    *words: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The lines that an example prints in this process, which has loaded torch already."""
    monkeypatch.setattr("sys.argv", command(name, bundle, *words)[1:])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("where", ["host", "device"])
def test_torch_frames(
    where: str,
    bundle: Path,
    chunks: list[Chunk],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("torch_frames.py", bundle, "--frames", where)
    *lines, last = (
        run(*words) if where == "host" else run_here(*words, capsys=capsys, monkeypatch=monkeypatch)
    )
    shown = []
    for chunk in chunks:
        red, green, blue = torch.from_numpy(chunk.frames).float().mean(dim=(0, 1, 2)).tolist()
        shown.append(f"chunk {chunk.index}: torch.uint8 (3, 8, 12, 3) on cpu")
        shown.append(f"  mean red {red:.1f}, green {green:.1f}, blue {blue:.1f}")
    assert lines == shown
    assert last == "the video: (12, 8, 12, 3)"


def test_torch_sees_the_same_memory(chunks: list[Chunk]) -> None:
    frames = chunks[0].frames
    assert torch.from_dlpack(frames).data_ptr() == frames.ctypes.data


def test_the_table_names_every_example_and_links_lead_somewhere() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\)", page, re.MULTILINE)
    assert sorted(table) == [(path.name, path.name) for path in sorted(EXAMPLES.glob("*.py"))]
    links = re.findall(r"\]\(([^)#]+)", page)
    assert [link for link in links if not (EXAMPLES / link).exists()] == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_it_is_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"    python examples/{path.name} --bundle bundle" in text.split('"""')[1]


STAND_IN = """import sys
open(sys.argv[0] + ".words", "w").write("\\n".join(sys.argv[1:]))
open(sys.argv[0] + ".frames", "wb").write(sys.stdin.buffer.read())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for ffmpeg is a script with a first line")
@pytest.mark.parametrize(
    ("address", "container"),
    [("rtmp://localhost/live/key", "flv"), ("srt://localhost:9000?mode=caller", "mpegts")],
)
def test_broadcast(bundle: Path, chunks: list[Chunk], tmp_path: Path, address: str, container: str) -> None:
    """Frames reach ffmpeg as they are; a stand-in keeps what it is told and given."""
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(f"#!{sys.executable}\n{STAND_IN}")
    ffmpeg.chmod(0o755)
    lines = run("broadcast.py", bundle, "--to", address, "--chunks", 4, "--ffmpeg", ffmpeg)
    frames = np.concatenate([chunk.frames for chunk in chunks])
    assert lines == [f"{len(frames)} frames sent"]
    assert Path(f"{ffmpeg}.frames").read_bytes() == frames.tobytes()
    words = Path(f"{ffmpeg}.words").read_text().splitlines()
    assert words[words.index("-s") + 1] == "12x8"
    assert words[-3:] == ["-f", container, address]


def test_broadcast_says_which_addresses_it_takes(bundle: Path) -> None:
    lines = run("broadcast.py", bundle, "--to", "http://localhost/", code=2)
    assert "expected an address that begins with rtmp" in lines[-1]
    lines = run("broadcast.py", bundle, "--to", "rtmp://localhost/", "--ffmpeg", "no such program", code=2)
    assert "--ffmpeg no such program: there is no such program" in lines[-1]
    lines = run(
        "broadcast.py", bundle.parent, "--to", "rtmp://localhost/", "--ffmpeg", sys.executable, code=2
    )
    assert "manifest.json" in lines[-1]
