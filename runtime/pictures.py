"""Frames as a folder of PNG files."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.locks import busy, is_held
from forcingkv.headmaps.reading import read_json
from forcingkv.headmaps.renames import sync_tree
from forcingkv.headmaps.writing import Hold, held_inside, is_ours, lock_of, put, write_text
from forcingkv.runtime.frames import Frames, FrameWriter, Kept, need_av, os_error
from forcingkv.runtime.media import open_media

RECORD = "frames.json"
_WRITING = "frames"
SCHEMA = "forcingkv.frames/1"
_NAME = re.compile(r"frame-\d{6,}\.png")


class PngWriter(FrameWriter):
    """A folder of PNG files (RGB, 8 bits), `frame-000001.png` and on, equal to the frames.

    `frames.json` comes last: schema, fps, count, width, height and metadata. A folder without it was cut
    short: it can be gone on with (`keep`), and is replaced only if the process that
    wrote it was killed. An earlier result in the folder is removed when the first frames come, and so is what
    a killed process left there. Meanwhile the folder holds a lock.

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
                raise os_error(errno.ENOTDIR)
            super()._check_place()
            return
        lock = lock_of(self.path, _WRITING)
        if is_held(lock):
            raise busy(self.path)
        names = {name for name in os.listdir(self.path) if not is_ours(name)}
        other = sorted(name for name in names - {RECORD} if not _NAME.fullmatch(name))
        if other or (names and not (self.going_on or lock.exists()) and read_record(self.path) is None):
            lacks = f"such as {other[0]}" if other else f"it has no {RECORD} of an earlier result"
            what = f"holds other files than an earlier result ({lacks})"
            hint = "Choose a new or empty folder: this one would be replaced."
            raise InputError(what, where=str(self.path), hint=hint)
        if not os.access(self.path, os.W_OK):
            raise os_error(errno.EACCES)

    def _check_kept(self, kept: Kept) -> None:
        import av

        names = set(os.listdir(self.path))
        found = next(n for n in range(len(names) + 1) if _picture(n + 1) not in names)
        if found < kept.frames:
            raise self._fewer(found, kept)
        try:
            with open_media(self.path / _picture(kept.frames), ["png_pipe"]) as picture:
                last: Any = next(picture.decode(video=0)).to_ndarray(format="rgb24")
        except (av.error.FFmpegError, StopIteration):
            raise self._fewer(kept.frames - 1, kept, f" ({_picture(kept.frames)} is damaged)") from None
        self._check_last(last, kept)

    def _append(self, frames: Frames) -> None:
        import av

        if self._encoder is None:
            self._count = self._kept.frames if self._kept else 0
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
            put(self.path / _picture(self._count + 1), data)
            self._count += 1

    def _clear(self) -> None:
        self._lock = ExitStack()
        self._hold = self._lock.enter_context(held_inside(self.path, _WRITING, "frame-", RECORD))
        self._hold.unfinished = True
        # The record first: without it nobody takes a half-removed result for a whole one.
        (self.path / RECORD).unlink(missing_ok=True)
        kept = {_picture(number + 1) for number in range(self._count)}
        # From the last on: if the process is killed now, what is left is the video's beginning.
        for path in sorted(self.path.iterdir(), key=_longest_last, reverse=True):
            if path.name not in kept and _NAME.fullmatch(path.name):
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


def _picture(number: int) -> str:
    return f"frame-{number:06d}.png"


def _longest_last(path: Path) -> tuple[int, str]:
    """A key: the names of pictures in order of their numbers."""
    return len(path.name), path.name


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a whole result in a folder of pictures; None: there is none."""
    try:
        data = read_json(folder / RECORD)
    except InputError:
        return None
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA else None
