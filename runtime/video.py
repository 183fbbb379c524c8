"""Where the frames of a video go: an mp4 file, a folder of pictures, or another program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.frame_files import FrameFile, PngWriter, RawWriter, ReaderGoneError
from forcingkv.runtime.mp4 import Mp4Writer

__all__ = ["FrameWriter", "Mp4Writer", "PngWriter", "RawWriter", "ReaderGoneError", "open_writer"]


class FrameWriter(Protocol):
    """Takes the frames of a video as they are made. A context manager, which closes it.

    What was written before an error or Ctrl-C stays, and is a shorter video.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Append frames: uint8 (n, height, width, 3), all of one size.

        Raises:
            InputError: frames of another kind or size, or the place cannot be written to.
            ReaderGoneError: the place is a pipe, and its reader has gone.
            RuntimeError: the writer is closed.
        """

    def close(self) -> None:
        """Complete what was written. Raises InputError where that cannot be written."""


def open_writer(
    out: str | Path, *, fps: float, enlarge: int = 1, metadata: Mapping[str, str] = {}
) -> FrameWriter:
    """The writer for a place. Nothing is made there before the first frames come.

    Args:
        out: a name ending in `.mp4`: a video that plays while it grows (`Mp4Writer`); a name ending in
            `.rgb`, or `-` for standard output: bare bytes (`RawWriter`); an existing folder or a name
            without suffix: PNG files (`PngWriter`).
        fps: frames a second.
        enlarge: whole number by which each pixel is repeated, for tiny videos.
        metadata: what the file says of itself. Bare bytes say nothing.

    Raises:
        InputError: another name, or a place that cannot be written to, as far as can be told now.
        MissingExtraError: PyAV, which mp4 and PNG need, is not installed.
    """
    path = Path(out)
    kinds: dict[str, type[FrameFile]] = {".mp4": Mp4Writer, ".rgb": RawWriter, "": PngWriter}
    kind = RawWriter if str(out) == "-" else kinds.get(path.suffix.lower())
    if kind is None and path.is_dir():
        kind = PngWriter
    if kind is None:
        raise InputError(
            "is not an mp4 file or another place for frames",
            where=str(out),
            expected="a name ending in .mp4, one ending in .rgb (bare bytes), a folder (PNG files), or -"
            " (bare bytes to standard output)",
        )
    return kind(path, fps, enlarge, metadata)
