"""What every writer of frames does; and frames as bytes for another program."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.locks import busy, is_held
from forcingkv.headmaps.writing import open_alone, refuse_name, unwritable

Frames = npt.NDArray[np.uint8]


class ReaderGoneError(BrokenPipeError):
    """The program that read the frames went away. No fault of anyone's: the video ends here."""

    def __init__(self, where: str) -> None:
        super().__init__(errno.EPIPE, "the reader of the frames has gone", where)


MOST_FPS = 1000
MOST_PIXELS = 1 << 14
"""Width or height of enlarged frames, as H.264 takes them: one is held in memory at a time."""


@dataclass(frozen=True)
class Kept:
    """The frames of a place that a writer is to go on after."""

    frames: int
    """How many, from the first on. 0 is for bytes: all are made again, and what is there must be the same as
    far as the first frames that come."""
    size: tuple[int, int]
    """Width and height of frames as they are given to the writer."""
    last: str | None
    """`digest_of` the last of them, as it was given; None: not known. No mp4 can be asked for it."""


def digest_of(frame: Frames) -> str:
    """SHA-256 of the bytes of a frame (height, width, 3)."""
    return hashlib.sha256(np.ascontiguousarray(frame).data).hexdigest()


class FrameWriter(ABC):
    """Takes the frames of a video as they are made. A context manager, which closes it.

    Nothing is made or changed before the first frames come, so wrong input leaves an earlier result alone.
    What was written before an error or Ctrl-C stays, and is a shorter video.

    Args:
        path: the place; `where` in errors.
        fps: frames a second.
        enlarge: whole number by which each pixel is repeated, for tiny videos.
        metadata: what the file says of itself.
        going_on: whether `keep` will be called: a folder of pictures that was cut short is taken then.

    Raises InputError where `fps` is not a rate, or the place cannot be written to, as far as can be found out
    without writing.
    """

    def __init__(
        self,
        path: Path,
        fps: float,
        enlarge: int = 1,
        metadata: Mapping[str, str] = {},
        going_on: bool = False,
    ) -> None:
        self.rate = Fraction(fps).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
        if not 0 < self.rate <= MOST_FPS:
            expected = f"frames a second, above 0 and at most {MOST_FPS}"
            raise InputError(f"is {fps}", where="fps", expected=expected)
        if not 1 <= enlarge <= MOST_PIXELS:
            expected = f"a whole number, from 1 to {MOST_PIXELS}"
            raise InputError(f"is {enlarge}", where="enlarge", expected=expected)
        self.path, self.fps, self.enlarge, self.metadata = path, fps, enlarge, dict(metadata)
        self.going_on = going_on
        self._kept: Kept | None = None
        self._size: tuple[int, int] | None = None
        self._closed = False
        try:
            self._check_place()
        except OSError as error:
            raise unwritable(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def expect(self, width: int, height: int) -> None:
        """Raise InputError for a size of frames that is too large when enlarged."""
        sides = width * self.enlarge, height * self.enlarge
        if self.enlarge > 1 and max(sides) > MOST_PIXELS:
            raise InputError(
                f"{self.enlarge} makes frames of {sides[0]}x{sides[1]} pixels",
                where="enlarge",
                expected=f"at most {MOST_PIXELS} a side",
            )

    def keep(self, kept: Kept) -> None:
        """Go on after the first frames that the place holds, in place of replacing them. To be called before
        the first frames come: what lies behind those kept is cut off when they do, and not before.

        Raises InputError where the place holds fewer frames, or is seen to hold others.
        """
        self._check_kept(kept)
        self._kept = kept
        width, height = kept.size
        self._size = height, width

    def write(self, frames: Frames) -> None:
        """Append frames: uint8 (n, height, width, 3), all of one size.

        After an error of any kind the writer is closed, with what was written before.

        Raises:
            InputError: frames of another kind or size, or the place cannot be written to.
            ReaderGoneError: the place is a pipe, and its reader has gone.
            RuntimeError: the writer is closed.
        """
        if self._closed:
            raise RuntimeError("the writer is closed")
        try:
            self._check(frames)
            if len(frames):
                self._append(frames)
        except BaseException as error:
            self._closed = True
            with suppress(OSError):
                self._end()
            if isinstance(error, BrokenPipeError):
                raise ReaderGoneError(str(self.path)) from error
            if isinstance(error, OSError):
                raise unwritable(self.path, error) from error
            raise

    def close(self) -> None:
        """Complete the file. A second call does nothing. Raises InputError where it cannot be written."""
        if self._closed:
            return
        self._closed = True
        try:
            self._end()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _check(self, frames: Frames) -> None:
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]:
            shape = f"are {frames.dtype} {frames.shape}"
            raise InputError(shape, where="frames", expected="uint8 (n, height, width, 3)")
        height, width = frames.shape[1:3]
        self.expect(width, height)
        self._size = self._size or (height, width)
        if self._size != (height, width):
            expected = "{1}x{0}, as the first".format(*self._size)
            raise InputError(f"are {width}x{height}", where="frames", expected=expected)

    def _enlarged(self, frames: Frames) -> Iterator[Frames]:
        """Frames (height, width, 3) one by one, so that only one large one is held."""
        for frame in frames:
            yield np.ascontiguousarray(frame.repeat(self.enlarge, 0).repeat(self.enlarge, 1))

    def _check_place(self) -> None:
        """Raise OSError or InputError for a place that a file cannot be made at. Changes nothing."""
        refuse_name(self.path)
        if self.path.is_dir():
            raise os_error(errno.EISDIR)
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise os_error(errno.ENOTDIR)
        if not os.access(self.path if self.path.exists() else parent, os.W_OK):
            raise os_error(errno.EACCES)
        if self.path.is_file() and is_held(self.path):
            raise busy(self.path)

    @abstractmethod
    def _check_kept(self, kept: Kept) -> None:
        """Raise InputError where the place does not hold these frames. Changes nothing."""

    def _fewer(self, found: int, kept: Kept, why: str = "") -> InputError:
        return InputError(
            f"holds {found} whole frames{why}",
            where=str(self.path),
            expected=f"{kept.frames} or more, which the saved state goes on after",
            hint="Choose another --out: it gets the rest of the video.",
        )

    def _check_last(self, found: Frames, kept: Kept) -> None:
        """Raise InputError unless this is the last of the frames that are kept, enlarged."""
        small = found[:: self.enlarge, :: self.enlarge]
        enlarged = np.array_equal(small.repeat(self.enlarge, 0).repeat(self.enlarge, 1), found)
        if kept.last is None or not enlarged or digest_of(small) != kept.last:
            unknown = "its state does not know its frames" if kept.last is None else "it is another"
            raise InputError(
                f"frame {kept.frames} is not known to be the one that the saved video has there ({unknown})",
                where=str(self.path),
                expected="frames of the same video, of the same --enlarge",
                hint="Choose another --out: it gets the rest of the video.",
            )

    @abstractmethod
    def _append(self, frames: Frames) -> None:
        """Write frames, one at least. All of them are in the file when it returns."""

    @abstractmethod
    def _end(self) -> None:
        """Close what is open; there may be nothing. Called once, after errors too."""


class RawWriter(FrameWriter):
    """rgb24: the bytes of the frames and nothing else, row by row, three bytes a pixel.

    For another program, which must know size and rate: to standard output (`-`), or to a file or FIFO.

    Raises InputError where the place cannot be written to, or standard output is a terminal.
    """

    _file: FileIO | None = None

    def _check_place(self) -> None:
        if str(self.path) != "-":
            super()._check_place()
        elif sys.stdout.isatty():
            raise InputError("standard output is a terminal", where="-", expected="a pipe or a file")

    def _append(self, frames: Frames) -> None:
        # Without a buffer: bytes that a broken pipe left in one would be tried again at exit.
        if self._file is None and str(self.path) == "-":
            sys.stdout.flush()
            self._file = FileIO(sys.stdout.fileno(), "wb", closefd=False)
        elif self._file is None:
            self._file = open_alone(self.path, anew=self._kept is None)
            if self._kept:
                self._begin_after(self._kept, self._file, frames)
        for frame in self._enlarged(frames):
            write_all(self._file, frame.data.cast("B"))

    def frames_there(self, size: tuple[int, int]) -> int:
        """How many frames of that width and height the file holds, if it holds such frames."""
        return self.path.stat().st_size // self._frame_bytes(size)

    def _frame_bytes(self, size: tuple[int, int]) -> int:
        return size[0] * size[1] * self.enlarge**2 * 3

    def _begin_after(self, kept: Kept, file: FileIO, frames: Frames) -> None:
        if not kept.frames:
            for frame in self._enlarged(frames):
                there = file.read(frame.nbytes)
                if there != frame.tobytes()[: len(there)]:
                    raise InputError(
                        "holds other frames than the rest of the saved video, and not those before it",
                        where=str(self.path),
                        hint="Choose another --out: it gets the rest of the video.",
                    )
        file.truncate(kept.frames * self._frame_bytes(kept.size))
        file.seek(0, os.SEEK_END)

    def _check_kept(self, kept: Kept) -> None:
        if not kept.frames:
            return
        size, there = self._frame_bytes(kept.size), self.frames_there(kept.size)
        if there < kept.frames:
            raise self._fewer(there, kept)
        width, height = (side * self.enlarge for side in kept.size)
        last: Frames = np.fromfile(self.path, np.uint8, size, offset=(kept.frames - 1) * size)
        self._check_last(last.reshape(height, width, 3), kept)

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()


def need_av() -> None:
    """Raise MissingExtraError, naming the install command, unless PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("PyAV", "video") from error


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write all bytes to a file without a buffer, whose own `write` may take fewer."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def os_error(number: int) -> OSError:
    """The error of that number (`errno`), as the system words it."""
    return OSError(number, os.strerror(number))
