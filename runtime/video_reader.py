"""Frames of pictures and video files, read through PyAV as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import there
from forcingkv.runtime.frames import need_av
from forcingkv.runtime.media import MOST_PIXELS, PICTURES, open_media

MOST_VIDEO_FRAMES = 200_000
"""Three hours at 16 frames a second."""
Frames = Iterator[npt.NDArray[np.uint8]]


@contextmanager
def open_video(path: Path) -> Iterator[tuple[float, Frames]]:
    """Open a video file: its mean frames a second, and its frames, decoded as they are asked for.

    Each frame is uint8 (height, width, 3), in the order they are shown. Raises InputError where there is no
    such file or it is not a video, and while its frames are read, where it is damaged.
    """
    with open_decoded(path) as (rate, frames):
        yield rate, (np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in frames)


@contextmanager
def open_decoded(path: Path, *, pictures: bool = False) -> Iterator[tuple[float, Iterator[Any]]]:
    """As `open_video`, but the frames are PyAV's own; `pictures`: of a picture, whose rate means nothing.

    Raises MissingExtraError where PyAV is not installed.
    """
    need_av()
    import av

    kind = "picture" if pictures else "video"
    if not there(path) or not path.is_file():
        expected = "a PNG or JPEG file" if pictures else "a video, such as an mp4 file"
        raise InputError("there is no such file", where=str(path), expected=expected)
    with ExitStack() as files:
        try:
            if pictures:  # without its name: by .jpg FFmpeg takes its reader of numbered files
                opened = open_media(files.enter_context(path.open("rb")), PICTURES)
            else:
                opened = open_media(path)
        except (av.error.FFmpegError, OSError) as error:
            raise _unreadable(path, kind, str(error.strerror)) from error
        files.enter_context(opened)
        if not opened.streams.video:
            raise _unreadable(path, kind, "no video stream")
        stream = opened.streams.video[0]
        if stream.codec_context is None:
            raise _unreadable(path, kind, "in a codec that is not known")
        size = stream.width * stream.height
        if not 1 <= size <= MOST_PIXELS:
            raise _unreadable(path, kind, f"its frames have no size, or more than {MOST_PIXELS:,} pixels")
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        rate = stream.average_rate
        if not rate and not pictures:
            raise _unreadable(path, kind, "it has no frame rate")
        yield float(rate or 1), _decoded(opened, path, kind)


def _decoded(opened: Any, path: Path, kind: str) -> Iterator[Any]:
    import av

    number = 0
    try:
        for frame in opened.decode(video=0):
            if number == MOST_VIDEO_FRAMES:
                raise _unreadable(path, kind, f"it has more than {MOST_VIDEO_FRAMES:,} frames")
            yield frame
            number += 1
    except (av.error.FFmpegError, MemoryError) as error:
        raise _unreadable(path, kind, getattr(error, "strerror", None) or "memory ran out") from error
    if not number:
        raise _unreadable(path, kind, "it has no frames")


def _unreadable(path: Path, kind: str, why: str) -> InputError:
    expected = "such as a PNG file" if kind == "picture" else "such as an mp4 file"
    return InputError(f"cannot be read as a {kind} ({why})", where=str(path), expected=expected)
