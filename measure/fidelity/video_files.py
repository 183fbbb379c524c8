"""Reading the frames of a video file, through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError


@dataclass(frozen=True)
class VideoFile:
    """A video file that is open."""

    path: Path
    fps: float
    """Frames a second, as the file says on average."""
    frames: Iterator[npt.NDArray[np.uint8]]
    """uint8 (height, width, 3), in the order they are shown, decoded as they are asked for."""


@contextmanager
def open_video(path: Path) -> Iterator[VideoFile]:
    """Open a video file.

    Raises InputError where there is no such file or it is not a video, and while its frames are read, where
    it is damaged.
    """
    if not path.is_file():
        raise InputError("there is no such file", where=str(path), expected="a video, such as an mp4 file")
    try:
        opened = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise _not_a_video(path, str(error.strerror)) from error
    with opened:
        if not opened.streams.video:
            raise _not_a_video(path, "no video stream")
        stream = opened.streams.video[0]
        rate = stream.average_rate
        if not rate:
            raise _not_a_video(path, "it does not say its frames a second")
        yield VideoFile(path, float(rate), _decoded(opened, path))


def _decoded(opened: av.container.InputContainer, path: Path) -> Iterator[npt.NDArray[np.uint8]]:
    try:
        for frame in opened.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except av.error.FFmpegError as error:
        raise _not_a_video(path, str(error.strerror)) from error


def _not_a_video(path: Path, why: str) -> InputError:
    return InputError(f"cannot be read as a video ({why})", where=str(path), expected="such as an mp4 file")
