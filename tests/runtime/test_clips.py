"""Pictures and videos of any size, rate and kind as frames of a model's."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime.clips import Fit, Fitter, last_frames, open_clip, read_picture


def picture(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    kind = {3: "rgb24", 4: "rgba", 1: "gray"}[pixels.shape[-1]]
    frame = av.VideoFrame.from_ndarray(pixels if pixels.shape[-1] > 1 else pixels[..., 0], format=kind)
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as out:
        stream = out.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, kind
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def clip(path: Path, frames: Sequence[np.ndarray[Any, Any]], fps: float, times: Sequence[int] = ()) -> Path:
    """A file without loss: FFV1 in Matroska."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgra"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgra")
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1) / Fraction(fps).limit_denominator(1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def ramp(height: int, width: int) -> np.ndarray[Any, Any]:
    """Red rises to the right, green downwards."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 4, rows * 4, np.full_like(rows, 9)], -1).astype(np.uint8)


def shades(count: int) -> list[np.ndarray[Any, Any]]:
    return [np.full((8, 12, 3), 10 * n, np.uint8) for n in range(count)]


def values(path: Path, fps: float, fitter: Fitter | None = None) -> list[int]:
    with open_clip(path, fitter or Fitter(12, 8), fps) as frames:
        return [int(frame[0, 0, 0]) // 10 for frame in frames]


def test_a_picture_of_the_size_is_what_it_is(tmp_path: Path) -> None:
    fitter = Fitter(48, 32)
    made = read_picture(picture(tmp_path / "a.png", ramp(32, 48)), fitter)
    assert (made == ramp(32, 48)).all()
    assert fitter.notes == []


@pytest.mark.parametrize(("size", "part"), [((32, 64), "48x32"), ((64, 48), "48x32"), ((33, 48), "48x32")])
def test_a_picture_of_another_shape_is_cropped_to_its_middle(
    tmp_path: Path, size: tuple[int, int], part: str
) -> None:
    fitter, whole = Fitter(48, 32), ramp(*size)
    made = read_picture(picture(tmp_path / "a.png", whole), fitter)
    top, left = (size[0] - 32) // 2, (size[1] - 48) // 2
    assert (made == whole[top : top + 32, left : left + 48]).all()
    assert fitter.notes == [f"{size[1]}x{size[0]} is cropped to its middle {part} (--fit pad shows all)"]


def test_or_shown_whole_over_black(tmp_path: Path) -> None:
    fitter, whole = Fitter(48, 32, "pad"), ramp(32, 32) | 1
    made = read_picture(picture(tmp_path / "a.png", whole), fitter)
    assert (made[:, 8:40] == whole).all()
    assert not made[:, :8].any()
    assert not made[:, 40:].any()
    assert fitter.notes == ["black is added beside 32x32 to make 48x32"]


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_picture_of_another_size_is_scaled(tmp_path: Path, fit: Fit) -> None:
    fitter = Fitter(48, 32, fit)
    large = np.repeat(np.repeat(ramp(32, 48), 2, 0), 2, 1)
    made = read_picture(picture(tmp_path / "a.png", large), fitter)
    assert made.shape == (32, 48, 3)
    assert np.abs(made.astype(int) - ramp(32, 48)).max() <= 3
    assert fitter.notes == ["96x64 is scaled to 48x32"]


def test_what_is_transparent_is_over_black(tmp_path: Path) -> None:
    pixels = np.dstack([np.full((8, 12, 3), 200, np.uint8), np.zeros((8, 12), np.uint8)])
    pixels[:4, :, 3], pixels[4:6, :, 3] = 255, 128
    fitter = Fitter(12, 8)
    made = read_picture(picture(tmp_path / "a.png", pixels), fitter)
    assert [int(made[row, 0, 0]) for row in (0, 4, 7)] == [200, 100, 0]
    assert fitter.notes == ["what is transparent is shown over black"]
    pixels[..., 3] = 255
    opaque = Fitter(12, 8)
    assert (read_picture(picture(tmp_path / "b.png", pixels), opaque) == 200).all()
    assert opaque.notes == []


def test_grey_pictures_have_three_equal_colours(tmp_path: Path) -> None:
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12, 1)
    made = read_picture(picture(tmp_path / "a.png", grey), Fitter(12, 8))
    assert np.abs(made.astype(int) - grey).max() <= 1


def test_a_video_of_the_rate_is_what_it_is(tmp_path: Path) -> None:
    fitter = Fitter(12, 8)
    assert values(clip(tmp_path / "a.mkv", shades(7), 16), 16, fitter) == list(range(7))
    assert fitter.notes == []


@pytest.mark.parametrize(
    ("rate", "wanted"),
    [(32, [0, 2, 4, 6]), (8, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]), (24, [0, 1, 3, 4, 6])],
)
def test_a_video_of_another_rate_shows_each_moment_what_it_showed(
    tmp_path: Path, rate: int, wanted: list[int]
) -> None:
    fitter = Fitter(12, 8)
    assert values(clip(tmp_path / "a.mkv", shades(7), rate), 16, fitter) == wanted
    (note,) = fitter.notes
    assert note.startswith(f"{rate} frames a second are shown as 16")


def test_a_video_whose_frames_come_when_they_like(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", shades(4), 16, times=(0, 1, 4, 5))
    assert values(path, 16)[:6] == [0, 1, 1, 1, 2, 3]


def test_the_last_frames_alone_are_held(tmp_path: Path) -> None:
    with open_clip(clip(tmp_path / "a.mkv", shades(7), 16), Fitter(12, 8), 16) as frames:
        assert [int(frame[0, 0, 0]) // 10 for frame in last_frames(frames, 3)] == [4, 5, 6]


def test_what_is_no_picture_or_video_is_refused(tmp_path: Path) -> None:
    broken = picture(tmp_path / "a.png", ramp(32, 48))
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    for path, told in [
        (broken, "cannot be read as a picture"),
        (tmp_path / "text.png", "cannot be read as a picture"),
        (tmp_path / "none.png", "there is no such file; expected a PNG or JPEG file"),
        (clip(tmp_path / "a.mkv", shades(2), 16), "cannot be read as a picture"),
    ]:
        with pytest.raises(InputError, match=told):
            read_picture(path, Fitter(12, 8))
    with (
        pytest.raises(InputError, match="cannot be read as a video"),
        open_clip(broken, Fitter(12, 8), 16) as f,
    ):
        list(f)
    wide = picture(tmp_path / "wide.png", np.zeros((2, 200, 3), np.uint8))
    with pytest.raises(InputError, match="is 100 times as wide as high"):
        read_picture(wide, Fitter(12, 8))
