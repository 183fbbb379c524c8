"""Where the frames of a video go: an mp4 file that plays while it grows, pictures, or another program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import new_file, open_alone
from forcingkv.runtime.frames import Frames, FrameWriter, Kept, RawWriter, write_all
from forcingkv.runtime.mp4 import Fragments, as_stored, copy_bytes, metadata_of, read_fragments, stream_of
from forcingkv.runtime.mp4_stream import Mp4Stream, need_h264
from forcingkv.runtime.pictures import PngWriter


def open_writer(
    out: str | Path,
    *,
    fps: float,
    enlarge: int = 1,
    metadata: Mapping[str, str] = {},
    going_on: bool = False,
) -> FrameWriter:
    """The writer for a place. Nothing is made there before the first frames come.

    Args:
        out: a name ending in `.mp4`: a video that plays while it grows (`Mp4Writer`); a name ending in
            `.rgb`, or `-` for standard output: bare bytes (`RawWriter`); an existing folder or a name
            without suffix: PNG files (`PngWriter`).
        fps: frames a second.
        enlarge: whole number by which each pixel is repeated, for tiny videos.
        metadata: what the file says of itself. Bare bytes say nothing.
        going_on: whether the writer is to go on after frames that are there (`FrameWriter.keep`).

    Raises InputError for another name and for a place that cannot be written to, as far as can be found out
    now, MissingExtraError where PyAV, which mp4 and PNG need, is not installed.
    """
    path = Path(out)
    kinds: dict[str, type[FrameWriter]] = {".mp4": Mp4Writer, ".rgb": RawWriter, "": PngWriter}
    name = path.name.lower()  # ".mp4" has no suffix to pathlib
    kind = RawWriter if str(out) == "-" else kinds.get(name if name in kinds else path.suffix.lower())
    kind = kind or (PngWriter if path.is_dir() else None)
    if kind is None:
        files = "a name ending in .mp4, one ending in .rgb (bare bytes), a folder (PNG files)"
        expected = f"{files}, or - (bare bytes to standard output)"
        raise InputError("is not an mp4 file or another place for frames", where=str(out), expected=expected)
    return kind(path, fps, enlarge, metadata, going_on)


class Mp4Writer(FrameWriter):
    """An mp4 file: H.264, yuv420p, BT.709, fragmented, readable while it is written.

    Each `write` appends one fragment, which holds all of its frames: when it returns they are in the file
    and play, even if the process is killed then. So the file grows under its own name, not a temporary
    one: a fragmented file is whole at every moment, and what an interruption leaves is the video so far.
    Each fragment has an encoder of its own and needs none before it: a file that is gone on with (`keep`)
    becomes the one that a single writer makes. Write a chunk at a time: single frames take several times the
    bytes.
    Meanwhile it is locked, and a second writer is refused.

    yuv420p needs even sizes: an odd width or height is made even by repeating the last column or row.
    All of `metadata` is written, whatever its keys.

    Raises InputError where the place cannot be written to, MissingExtraError where PyAV or its encoder for
    H.264 is not installed.
    """

    def __init__(
        self,
        path: Path,
        fps: float,
        enlarge: int = 1,
        metadata: Mapping[str, str] = {},
        going_on: bool = False,
    ) -> None:
        need_h264()
        super().__init__(path, fps, enlarge, metadata, going_on)
        self._file: FileIO | None = None
        self._stream: Mp4Stream | None = None
        self._earlier: Fragments | None = None
        """What the file holds of the video already."""
        self._written = 0

    def _check_kept(self, kept: Kept) -> None:
        found = read_fragments(self.path)
        if found.frames < kept.frames:
            raise self._fewer(found.frames, kept, ", and its end is damaged" if found.torn else "")
        fragments = found.first(kept.frames)
        if fragments is None:
            what = f"has no fragment that ends with frame {kept.frames}, where the saved state goes on"
            raise InputError(what, where=str(self.path), hint="Choose another --out: it gets the rest.")
        stream = self._begin(*kept.size)
        if stream_of(found.head) != stream_of(stream.head):
            raise InputError(
                "is encoded in another way than its rest would be",
                where=str(self.path),
                expected=f"H.264 of {stream.width}x{stream.height} pixels, {float(self.rate):g}"
                " frames a second, by the same version of the encoder",
                hint="Choose another --out: it gets the rest of the video.",
            )
        self._earlier = replace(found, all=fragments)
        stream.fragments, stream.frames = len(fragments), kept.frames

    def _append(self, frames: Frames) -> None:
        stream = self._stream or self._begin(frames.shape[2], frames.shape[1])
        data = stream.fragment(self._enlarged(frames))
        if self._file is None:
            data = self._open_file(stream.head) + data
        assert self._file is not None
        self._put(self._file, data)
        self._written += len(data)

    def _open_file(self, head: bytes) -> bytes:
        """Open the file for what comes next. Returns what belongs before it."""
        if self._earlier is None:
            self._file = open_alone(self.path)
            return head
        start, end = len(self._earlier.head), self._earlier.all[-1].end
        said = metadata_of(self.path, self._earlier)
        if said.items() >= {name: as_stored(text) for name, text in self.metadata.items()}.items():
            self._written = end
        else:  # of another length: all that follows moves
            with new_file(self.path) as partial, self.path.open("rb") as old, partial.open("wb") as new:
                new.write(head)
                old.seek(start)
                copy_bytes(old, new, end - start)
            self._written = len(head) + end - start
        self._file = open_alone(self.path, anew=False)
        self._file.truncate(self._written)
        self._file.seek(self._written)
        return b""

    def _put(self, file: FileIO, data: bytes) -> None:
        if not file.seekable():
            write_all(file, data)
            return
        # The 8 bytes that open the first box come last. Until then they are zero, which players take for
        # padding up to the end: a fragment is there as a whole or, if the process is killed now, not at all.
        write_all(file, bytes(8) + data[8:])
        file.seek(self._written)
        write_all(file, data[:8])
        file.seek(0, os.SEEK_END)

    def _begin(self, width: int, height: int) -> Mp4Stream:
        """Begin a video of frames of that size."""
        sides = width * self.enlarge, height * self.enlarge
        self._stream = Mp4Stream(*sides, self.rate, self.metadata)
        return self._stream

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._file is not None:
            with self._file:
                if not self._file.seekable():  # a FIFO cannot be cut
                    return
                self._file.truncate(self._written)  # what an error left of a fragment
                os.fsync(self._file.fileno())
            if not self._written:
                self.path.unlink()
