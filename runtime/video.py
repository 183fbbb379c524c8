"""Video files through PyAV, written under a temporary name and renamed when complete."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime.files import unwritable

__all__ = ["Mp4Writer"]


class Mp4Writer:
    """Writes uint8 frames (n, height, width, 3) to an mp4 file (H.264, yuv420p).

    Use it as a context manager: the file appears under its name only when the block ends well.

    Args:
        path: the file, ending in .mp4.
        fps: frames a second.
        enlarge: whole number by which each pixel is repeated, for tiny videos.

    Raises:
        InputError: the place cannot be written to.
        MissingExtraError: PyAV is not installed.
    """

    def __init__(self, path: Path, fps: float, enlarge: int = 1) -> None:
        try:
            import av
        except ImportError as error:
            raise MissingExtraError("PyAV", "video") from error
        if path.suffix != ".mp4":
            raise InputError("is not an mp4 file", where=str(path), expected="a name ending in .mp4")
        self.path, self.enlarge = path, enlarge
        self._partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._container: Any = av.open(str(self._partial), "w", format="mp4")
        except OSError as error:
            raise unwritable(path, error) from error
        self._stream: Any = None
        self._rate = Fraction(fps).limit_denominator(1001)

    def __enter__(self) -> Self:
        return self

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Append frames (n, height, width, 3)."""
        import av

        for frame in frames.repeat(self.enlarge, 1).repeat(self.enlarge, 2):
            if self._stream is None:
                self._stream = self._container.add_stream("libx264", rate=self._rate)
                self._stream.height, self._stream.width = frame.shape[:2]
                self._stream.pix_fmt = "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)
