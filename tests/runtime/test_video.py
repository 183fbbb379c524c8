"""Writers of frames: what is in the files is what went in, after an interruption too."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime.frames import FrameWriter, RawWriter, ReaderGoneError
from forcingkv.runtime.pictures import PngWriter
from forcingkv.runtime.video import Mp4Writer, open_writer

Frames = np.ndarray[Any, np.dtype[np.uint8]]
STEP = 6
"""By which the grey of each frame of `ramp` is above the one before."""


def ramp(first: int, count: int, height: int = 32, width: int = 48) -> Frames:
    """Frames that are grey, each a little lighter: a frame's number is read off its level."""
    levels = (np.arange(first, first + count) * STEP).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def read(path: Path, form: str = "rgb24") -> Frames:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format=form) for frame in video.decode(video=0)])


def numbers(path: Path) -> list[int]:
    """Numbers of the frames of a video of `ramp`."""
    return [round(float(frame.mean()) / STEP) for frame in read(path)]


def test_an_mp4_gives_back_frames_times_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.mp4"
    about = {
        "title": "a 3 moving left",
        "comment": "two\nlines, and ünïcode",
        "forcingkv.seed": "7",
        "forcingkv.bundle": "ab" * 32,
        "forcingkv.prompt": "",
        "any key": "x" * 5000,
        "broken": "\udcff",
    }
    with open_writer(path, fps=12.5, enlarge=2, metadata=about) as writer:
        writer.write(ramp(0, 5))
        writer.write(ramp(5, 0))
        writer.write(ramp(5, 1))
        writer.write(ramp(6, 7))
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == Fraction(25, 2)
        assert (stream.width, stream.height, stream.codec_context.pix_fmt) == (96, 64, "yuv420p")
        assert video.metadata.items() >= (about | {"broken": "\\udcff"}).items()
        frames = list(video.decode(video=0))
        times = [Fraction(frame.pts or 0) * (frame.time_base or 0) for frame in frames]
    assert times == [n * Fraction(2, 25) for n in range(13)]
    assert numbers(path) == list(range(13))
    assert os.listdir(path.parent) == ["a.mp4"]


def test_colours_come_back_and_are_tagged(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (10, 200, 240), (128, 128, 128)]
    frames = np.array(colours, np.uint8)[:, None, None, :].repeat(32, 1).repeat(48, 2)
    with Mp4Writer(tmp_path / "a.mp4", 8.0) as writer:
        writer.write(frames)
    assert np.abs(read(tmp_path / "a.mp4").astype(int) - frames).max() <= 4
    planes = read(tmp_path / "a.mp4", "yuv420p").reshape(6, -1)
    # BT.709 in the limited range: luma from 16 to 235, differences of colour around 128.
    red, green, blue = np.array(colours).T / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]
    seen = [planes[:, :1536], planes[:, 1536:1920], planes[:, 1920:]]
    for plane, value in zip(seen, expected, strict=True):
        assert np.abs(plane - value[:, None]).max() < 2
    with av.open(str(tmp_path / "a.mp4")) as video:
        context = video.streams.video[0].codec_context
        # Codes of ITU-T H.273; the range is limited.
        assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)
        assert context.color_range == 1


@pytest.mark.parametrize(("height", "width"), [(31, 47), (1, 1), (2, 3)])
def test_odd_sizes_are_made_even_by_repeating(height: int, width: int, tmp_path: Path) -> None:
    frames = ramp(0, 3, height, width)
    frames[:, -1] = 200
    with Mp4Writer(tmp_path / "a.mp4", 8.0) as writer:
        writer.write(frames)
    back = read(tmp_path / "a.mp4")
    assert back.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(back[:, height - 1 :].astype(int) - 200).max() <= 8


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from forcingkv.runtime import video

writer = video.Mp4Writer(Path(sys.argv[1]), 16.0, metadata={"title": "t"})
frames = np.load(sys.argv[2])
for chunk in range(int(sys.argv[3])):
    writer.write(frames[chunk * 3:][:3])
if part := float(sys.argv[4]):
    def put(file, data):
        file.write(data[:int(part * len(data))])
        os.kill(os.getpid(), signal.SIGKILL)
    video.write_all = put
    writer.write(frames[-3:])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("chunks", "part"), [(1, 0), (4, 0), (2, 0.1), (2, 1)])
def test_a_killed_process_leaves_every_frame_that_was_written(
    chunks: int, part: float, tmp_path: Path
) -> None:
    """At once after a write, or within the next one when a part of its bytes is in the file."""
    path, frames = tmp_path / "a.mp4", tmp_path / "frames.npy"
    np.save(frames, ramp(0, 15))
    command = [sys.executable, "-c", KILLED, *map(str, (path, frames, chunks, part))]
    assert subprocess.run(command, timeout=300, check=False).returncode == -signal.SIGKILL
    assert numbers(path) == list(range(3 * chunks))
    with av.open(str(path)) as video:
        assert video.metadata["title"] == "t"
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "frames.npy"]


def test_a_file_plays_while_it_grows_and_wherever_a_write_is_cut(tmp_path: Path) -> None:
    path, cut = tmp_path / "a.mp4", tmp_path / "cut.mp4"
    sizes = []
    with Mp4Writer(path, 16.0) as writer:
        for chunk in range(3):
            writer.write(ramp(chunk * 3, 3))
            assert numbers(path) == list(range(3 * chunk + 3))
            sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    assert len(whole) == sizes[-1], "closing adds nothing"
    unmarked = whole[: sizes[1]] + bytes(8) + whole[sizes[1] + 8 :]
    for size in range(sizes[1], sizes[2], 9):
        cut.write_bytes(unmarked[:size])
        assert numbers(cut) == list(range(6))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("name", ["a.mp4", "a.rgb", "a"])
def test_an_interruption_leaves_what_was_written(
    name: str, error: type[BaseException], tmp_path: Path
) -> None:
    def interrupted() -> None:
        with open_writer(tmp_path / name, fps=8.0) as writer:
            writers.append(writer)
            writer.write(ramp(0, 3))
            writer.write(ramp(3, 3))
            raise error

    writers: list[FrameWriter] = []
    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == [name]
    if name == "a.mp4":
        assert numbers(tmp_path / name) == list(range(6))
    elif name == "a.rgb":
        assert (tmp_path / name).read_bytes() == ramp(0, 6).tobytes()
    else:
        assert json.loads((tmp_path / "a" / "frames.json").read_text())["count"] == 6
    with pytest.raises(RuntimeError, match="closed"):
        writers[0].write(ramp(0, 1))


def test_an_interruption_within_a_write_leaves_whole_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(file: Any, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    path = tmp_path / "a.mp4"
    writer = Mp4Writer(path, 8.0)
    writer.write(ramp(0, 3))
    size = path.stat().st_size
    monkeypatch.setattr("forcingkv.runtime.video.write_all", half)
    with pytest.raises(KeyboardInterrupt):
        writer.write(ramp(3, 3))
    assert path.stat().st_size == size
    assert numbers(path) == [0, 1, 2]


def test_a_folder_of_pictures_equals_the_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 7, 9, 3), np.uint8)
    out = tmp_path / "b" / "frames"
    with open_writer(out, fps=12.5, enlarge=2, metadata={"forcingkv.seed": "7"}) as writer:
        writer.write(frames[:3])
        assert not (out / "frames.json").exists(), "it comes last"
        writer.write(frames[3:])
    names = [f"frame-{n:06d}.png" for n in range(1, 6)]
    assert sorted(os.listdir(out)) == [*names, "frames.json"]
    for name, frame in zip(names, frames, strict=True):
        assert np.array_equal(read(out / name)[0], frame.repeat(2, 0).repeat(2, 1))
    assert json.loads((out / "frames.json").read_text()) == {
        "schema": "forcingkv.frames/1",
        "fps": 12.5,
        "count": 5,
        "width": 18,
        "height": 14,
        "metadata": {"forcingkv.seed": "7"},
    }


def test_an_earlier_folder_is_replaced_and_others_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "frames.v2"
    out.mkdir()
    for count in (5, 2):
        with open_writer(out, fps=8.0) as writer:
            assert len(os.listdir(out)) in (0, 6), "an earlier result stays until frames come"
            writer.write(ramp(0, count))
    assert sorted(os.listdir(out)) == ["frame-000001.png", "frame-000002.png", "frames.json"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other files than an earlier result \(such as notes.txt\)"):
        open_writer(out, fps=8.0)
    (out / "notes.txt").unlink()
    (out / "frames.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds other files .*it has no frames.json"):
        open_writer(out, fps=8.0)
    assert len(os.listdir(out)) == 3


def test_frames_through_a_pipe_into_another_process(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.rgb"
    os.mkfifo(pipe)
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), np.uint8)
    code = "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
    with subprocess.Popen([sys.executable, "-c", code, pipe], stdout=subprocess.PIPE) as reader:
        with open_writer(pipe, fps=8.0) as writer:
            writer.write(frames[:1])
            writer.write(frames[1:])
        assert reader.communicate()[0].decode().strip() == hashlib.sha256(frames.tobytes()).hexdigest()


def test_standard_output_takes_the_bytes_alone(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with open_writer("-", fps=8.0) as writer:
        writer.write(ramp(0, 2))
    print("still open")
    assert capfdbinary.readouterr().out == ramp(0, 2).tobytes() + b"still open\n"


@pytest.mark.parametrize("name", ["pipe.rgb", "pipe.mp4"])
def test_a_reader_that_goes_away_ends_the_video(name: str, tmp_path: Path) -> None:
    pipe = tmp_path / name
    os.mkfifo(pipe)

    def look_once() -> None:
        with pipe.open("rb") as file:
            file.read(10)

    reader = threading.Thread(target=look_once)
    reader.start()
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), np.uint8)
    with open_writer(pipe, fps=8.0) as writer:
        writer.write(noise[:1])
        reader.join()
        with pytest.raises(ReaderGoneError, match="the reader"):
            writer.write(noise)


def wrong_kind(writer: FrameWriter) -> None:
    writer.write(ramp(0, 1).astype(np.float32))


def one_frame(writer: FrameWriter) -> None:
    writer.write(ramp(0, 1)[0])


def other_size(writer: FrameWriter) -> None:
    writer.write(ramp(0, 2))
    writer.write(ramp(0, 1, 32, 50))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (wrong_kind, r"frames are float32 \(1, 32, 48, 3\); expected uint8"),
        (one_frame, r"frames are uint8 \(32, 48, 3\); expected uint8 \(n, height, width, 3\)"),
        (other_size, "frames are 50x32; expected 48x32, as the first"),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.rgb", "a"])
def test_other_frames_are_refused(wrong: Any, message: str, name: str, tmp_path: Path) -> None:
    with open_writer(tmp_path / name, fps=8.0) as writer, pytest.raises(InputError, match=message):
        wrong(writer)
    assert (tmp_path / name).exists() is (wrong is other_size)


@pytest.mark.parametrize(("name", "kind"), [(".mp4", Mp4Writer), (".RGB", RawWriter), (".hidden", PngWriter)])
def test_a_name_may_begin_with_its_suffix(name: str, kind: type, tmp_path: Path) -> None:
    assert type(open_writer(tmp_path / name, fps=8.0)) is kind


@pytest.mark.parametrize(
    ("out", "fps", "message"),
    [
        ("a.avi", 8.0, r"a\.avi is not an mp4 file.*expected a name ending in \.mp4, .*folder.* or -"),
        ("a.mp4", 0.0, "fps is 0.0; expected frames a second"),
        ("a.mp4", float("nan"), "fps is nan"),
        ("a", float("inf"), "fps is inf"),
        ("file/a.mp4", 8.0, r"a\.mp4 cannot be written \(Not a directory\)"),
        ("file/a/b", 8.0, r"b cannot be written \(Not a directory\)"),
        ("file", 8.0, r"file cannot be written \(Not a directory\)"),
        ("folder.mp4", 8.0, r"folder\.mp4 cannot be written \(Is a directory\)"),
        ("x" * 300 + ".rgb", 8.0, r"cannot be written \(File name too long\)"),
    ],
)
def test_wrong_places_are_refused_before_anything_is_made(
    out: str, fps: float, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        open_writer(tmp_path / out, fps=fps)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a.mp4", "a.rgb"])
def test_a_full_disk_is_an_input_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    writer = open_writer(tmp_path / name, fps=8.0)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        writer.write(ramp(0, 3))
    writer.close()


def test_a_place_that_turns_out_unwritable(tmp_path: Path) -> None:
    writer = open_writer("/proc/forcingkv/a.mp4", fps=8.0)
    with pytest.raises(InputError, match="cannot be written"):
        writer.write(ramp(0, 3))


def test_a_terminal_gets_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(InputError, match="-: standard output is a terminal; expected a pipe"):
        open_writer("-", fps=8.0)


def test_without_pyav_the_extra_is_named_and_bytes_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for name in ("a.mp4", "a"):
        with pytest.raises(MissingExtraError, match=r"PyAV.*pip install 'forcingkv\[video\]'"):
            open_writer(tmp_path / name, fps=8.0)
    with open_writer(tmp_path / "a.rgb", fps=8.0) as writer:
        writer.write(ramp(0, 1))
    assert (tmp_path / "a.rgb").read_bytes() == ramp(0, 1).tobytes()


def test_an_earlier_file_stays_until_frames_come(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"earlier")
    with open_writer(path, fps=8.0) as writer:
        pass
    with open_writer(path, fps=8.0) as writer, pytest.raises(InputError):
        wrong_kind(writer)
    assert path.read_bytes() == b"earlier"
    with open_writer(path, fps=8.0) as writer:
        writer.write(ramp(0, 2))
    assert numbers(path) == [0, 1]
