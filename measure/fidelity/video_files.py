"""Video files: their frames, read through PyAV, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import there
from forcingkv.measure.fidelity.seams import ChunkLayout
from forcingkv.measure.fidelity.video_measures import measure_pair, measure_video
from forcingkv.runtime.media import MOST_PIXELS, open_media

MOST_VIDEO_FRAMES = 200_000
"""Three hours at 16 frames a second."""
Frames = Iterator[npt.NDArray[np.uint8]]


@contextmanager
def open_video(path: Path) -> Iterator[tuple[float, Frames]]:
    """Open a video file: its mean frames a second, and its frames, decoded as they are asked for.

    Each frame is uint8 (height, width, 3), in the order they are shown. Raises InputError where there is no
    such file or it is not a video, and while its frames are read, where it is damaged.
    """
    if not there(path) or not path.is_file():
        raise InputError("there is no such file", where=str(path), expected="a video, such as an mp4 file")
    try:
        opened = open_media(path)
    except (av.error.FFmpegError, OSError) as error:
        raise _not_a_video(path, str(error.strerror)) from error
    with opened:
        if not opened.streams.video:
            raise _not_a_video(path, "no video stream")
        stream = opened.streams.video[0]
        if stream.codec_context is None:
            raise _not_a_video(path, "in a codec that is not known")
        size = stream.width * stream.height
        if not 1 <= size <= MOST_PIXELS:
            raise _not_a_video(path, f"its frames have no size, or more than {MOST_PIXELS:,} pixels")
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        rate = stream.average_rate
        if not rate:
            raise _not_a_video(path, "it has no frame rate")
        yield float(rate), _decoded(opened, path)


def measure_file(path: Path, reference: Path | None, layout: ChunkLayout, top: int | None) -> dict[str, Any]:
    """The numbers of a video file, for JSON: of `measure_video`, and with a reference of `measure_pair`.

    Raises InputError where a file cannot be read, or the two differ in size or length.
    """
    with open_video(path) as (fps, frames):
        data = measure_video(frames, layout, fps, top=top, where=str(path))
    data |= {"video": str(path), "fps": fps}
    if reference is not None:
        with open_video(path) as (_, frames), open_video(reference) as (_, others):
            pair = measure_pair(frames, others, where=str(path))
        data |= pair | {"reference": str(reference), "values": pair["values"] | data["values"]}
    return data


def _decoded(opened: av.container.InputContainer, path: Path) -> Frames:
    try:
        for number, frame in enumerate(opened.decode(video=0)):
            if number == MOST_VIDEO_FRAMES:
                raise _not_a_video(path, f"it has more than {MOST_VIDEO_FRAMES:,} frames")
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (av.error.FFmpegError, MemoryError) as error:
        raise _not_a_video(path, getattr(error, "strerror", None) or "memory ran out") from error


def _not_a_video(path: Path, why: str) -> InputError:
    return InputError(f"cannot be read as a video ({why})", where=str(path), expected="such as an mp4 file")
