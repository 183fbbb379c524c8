"""What every writer of frames does; and frames as a folder of PNG files, or as bytes for another program."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.locks import busy, is_held
from forcingkv.headmaps.reading import read_json
from forcingkv.headmaps.renames import sync_tree
from forcingkv.headmaps.writing import (
    Hold,
    held_inside,
    is_ours,
    lock_of,
    open_alone,
    put,
    refuse_name,
    unwritable,
    write_text,
)

Frames = npt.NDArray[np.uint8]


class ReaderGoneError(BrokenPipeError):
    """The program that read the frames went away. No fault of anyone's: the video ends here."""

    def __init__(self, where: str) -> None:
        super().__init__(errno.EPIPE, "the reader of the frames has gone", where)


class FrameWriter(ABC):
    """Takes the frames of a video as they are made. A context manager, which closes it.

    Nothing is made or changed before the first frames come, so wrong input leaves an earlier result alone.
    What was written before an error or Ctrl-C stays, and is a shorter video.

    Args:
        path: the place; `where` in errors.
        fps: frames a second.
        enlarge: whole number by which each pixel is repeated, for tiny videos.
        metadata: what the file says of itself.

    Raises InputError where `fps` is not a rate, or the place cannot be written to, as far as can be found out
    without writing.
    """

    def __init__(self, path: Path, fps: float, enlarge: int = 1, metadata: Mapping[str, str] = {}) -> None:
        self.rate = Fraction(fps).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
        if self.rate <= 0:
            raise InputError(f"is {fps}", where="fps", expected="frames a second, above 0")
        self.path, self.fps, self.enlarge, self.metadata = path, fps, enlarge, dict(metadata)
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
            raise _os_error(errno.EISDIR)
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise _os_error(errno.ENOTDIR)
        if not os.access(self.path if self.path.exists() else parent, os.W_OK):
            raise _os_error(errno.EACCES)
        if self.path.is_file() and is_held(self.path):
            raise busy(self.path)

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
            self._file = open_alone(self.path)
        for frame in self._enlarged(frames):
            write_all(self._file, frame.data.cast("B"))

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()


RECORD = "frames.json"
_WRITING = "frames"
SCHEMA = "forcingkv.frames/1"
_NAME = re.compile(r"frame-\d{6,}\.png")


class PngWriter(FrameWriter):
    """A folder of PNG files (RGB, 8 bits), `frame-000001.png` and on, equal to the frames.

    `frames.json` comes last: schema, fps, count, width, height and metadata. A folder without it was cut
    short. An earlier result in the folder is removed when the first frames come, and so is what a process
    left there that was killed. Meanwhile the folder holds a lock.

    Raises InputError where the folder holds other files than an earlier result, cannot be written to or has
    another writer, MissingExtraError where PyAV is not installed.
    """

    _encoder: Any = None
    _count = 0
    _hold: Hold | None = None
    _lock: ExitStack

    def _check_place(self) -> None:
        need_av()
        if not self.path.is_dir():
            if self.path.exists():
                raise _os_error(errno.ENOTDIR)
            super()._check_place()
            return
        lock = lock_of(self.path, _WRITING)
        if is_held(lock):
            raise busy(self.path)
        names = {name for name in os.listdir(self.path) if not is_ours(name)}
        other = sorted(name for name in names - {RECORD} if not _NAME.fullmatch(name))
        if other or (names and not self._ends_a_result() and not lock.exists()):
            lacks = f"such as {other[0]}" if other else f"it has no {RECORD} of an earlier result"
            what = f"holds other files than an earlier result ({lacks})"
            hint = "Choose a new or empty folder: this one would be replaced."
            raise InputError(what, where=str(self.path), hint=hint)
        if not os.access(self.path, os.W_OK):
            raise _os_error(errno.EACCES)

    def _ends_a_result(self) -> bool:
        """Whether the folder has the record that is written last."""
        try:
            data = read_json(self.path / RECORD)
        except InputError:
            return False
        return isinstance(data, dict) and data.get("schema") == SCHEMA

    def _append(self, frames: Frames) -> None:
        import av

        if self._encoder is None:
            self._clear()
            height, width = (size * self.enlarge for size in frames.shape[1:3])
            encoder: Any = av.CodecContext.create("png", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "rgb24"
            encoder.time_base = 1 / self.rate
            encoder.thread_count = 1  # with more, a picture comes out some frames later
            encoder.options = {"compression_level": "1"}  # a quarter of the time, 8% more bytes
            self._encoder = encoder
        for frame in self._enlarged(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = self._count
            data = b"".join(bytes(packet) for packet in self._encoder.encode(picture))
            put(self.path / f"frame-{self._count + 1:06d}.png", data)
            self._count += 1

    def _clear(self) -> None:
        self._lock = ExitStack()
        self._hold = self._lock.enter_context(held_inside(self.path, _WRITING, "frame-", RECORD))
        self._hold.unfinished = True
        # The record first: without it nobody takes a half-removed result for a whole one.
        (self.path / RECORD).unlink(missing_ok=True)
        for path in list(self.path.iterdir()):
            if _NAME.fullmatch(path.name):
                path.unlink()

    def _end(self) -> None:
        if self._hold is None:
            return
        with self._lock:
            if self._count:
                self._write_record()
            self._hold.unfinished = False

    def _write_record(self) -> None:
        record = {
            "schema": SCHEMA,
            "fps": self.fps,
            "count": self._count,
            "width": self._encoder.width,
            "height": self._encoder.height,
            "metadata": self.metadata,
        }
        sync_tree(self.path)
        write_text(self.path / RECORD, json.dumps(record, indent=1) + "\n")


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


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
