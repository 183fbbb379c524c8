"""Where the frames of a video go: an mp4 file that plays while it grows, pictures, or another program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.writing import new_file, open_alone
from forcingkv.runtime.frames import Frames, FrameWriter, Kept, RawWriter, need_av, write_all
from forcingkv.runtime.mp4 import Fragments, as_stored, copy_bytes, metadata_of, read_fragments, stream_of
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


_ENCODER = {"tune": "zerolatency", "preset": "faster", "crf": "20"}
"""zerolatency: a frame that goes in comes out at once; the encoder looks at none to come and makes no
B-frames. On clips of LongLive and Self Forcing at 480P that takes 1.5 and 1.7 times the bytes of the same
preset without it at equal PSNR (39.6 dB; 2.8 and 2.2 Mbit/s)."""

_MUXER = {
    "movflags": "empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer+use_metadata_tags",
    "avoid_negative_ts": "disabled",  # or each fragment's time would be moved to 0
    "flush_packets": "1",
}
_BT709, _LIMITED = 1, 1
"""ITU-T H.273: code of primaries, transfer and matrix; FFmpeg's code of the range 16 to 235."""


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
        need_av()
        import av

        if "libx264" not in av.codecs_available:
            raise MissingExtraError("PyAV with libx264", "video")
        super().__init__(path, fps, enlarge, metadata, going_on)
        self._file: FileIO | None = None
        self._head: Any = None
        self._stream: Any = None
        self._head_bytes = b""
        self._earlier: Fragments | None = None
        """What the file holds of the video already."""
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._fragments = self._frames = self._written = 0

    def _check_kept(self, kept: Kept) -> None:
        found = read_fragments(self.path)
        if found.frames < kept.frames:
            raise self._fewer(found.frames, kept, ", and its end is damaged" if found.torn else "")
        fragments = found.first(kept.frames)
        if fragments is None:
            what = f"has no fragment that ends with frame {kept.frames}, where the saved state goes on"
            raise InputError(what, where=str(self.path), hint="Choose another --out: it gets the rest.")
        self._begin(*kept.size)
        if stream_of(found.head) != stream_of(self._head_bytes):
            raise InputError(
                "is encoded in another way than its rest would be",
                where=str(self.path),
                expected=f"H.264 of {self._stream.width}x{self._stream.height} pixels, {float(self.rate):g}"
                " frames a second, by the same version of the encoder",
                hint="Choose another --out: it gets the rest of the video.",
            )
        self._earlier = replace(found, all=fragments)
        self._fragments, self._frames = len(fragments), kept.frames

    def _append(self, frames: Frames) -> None:
        if self._head is None:
            self._begin(frames.shape[2], frames.shape[1])
        data = self._fragment(frames)
        if self._file is None:
            data = self._open_file() + data
        assert self._file is not None
        self._put(self._file, data)
        self._written += len(data)

    def _open_file(self) -> bytes:
        """Open the file for what comes next. Returns what belongs before it."""
        if self._earlier is None:
            self._file = open_alone(self.path)
            return self._head_bytes
        start, end = len(self._earlier.head), self._earlier.all[-1].end
        said = metadata_of(self.path, self._earlier)
        if said.items() >= {name: as_stored(text) for name, text in self.metadata.items()}.items():
            self._written = end
        else:  # of another length: all that follows moves
            with new_file(self.path) as partial, self.path.open("rb") as old, partial.open("wb") as new:
                new.write(self._head_bytes)
                old.seek(start)
                copy_bytes(old, new, end - start)
            self._written = len(self._head_bytes) + end - start
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

    def _begin(self, width: int, height: int) -> None:
        """Begin a video of frames of that size, with its head: what it holds, no frames."""
        import av

        width, height = (side * self.enlarge + side * self.enlarge % 2 for side in (width, height))
        memory = BytesIO()
        self._head = av.open(memory, "w", format="mp4", options=_MUXER, metadata_errors="backslashreplace")
        self._head.metadata.update(self.metadata)
        self._stream = self._head.add_stream("libx264", rate=self.rate, options=_ENCODER)
        self._configure(self._stream.codec_context, width, height)
        try:
            self._head.start_encoding()
        except av.error.FFmpegError as error:
            what = f"are {width}x{height}, which cannot be encoded ({error.strerror})"
            raise InputError(what, where="frames") from error
        self._head_bytes = memory.getvalue()

    def _configure(self, context: Any, width: int, height: int) -> None:
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED

    def _encoder(self) -> Any:
        """A new encoder, as the one that the head is of."""
        import av

        encoder: Any = av.CodecContext.create("libx264", "w")
        encoder.framerate, encoder.time_base, encoder.options = self.rate, 1 / self.rate, dict(_ENCODER)
        encoder.flags |= av.codec.context.Flags.global_header
        self._configure(encoder, self._stream.width, self._stream.height)
        encoder.open()
        if encoder.extradata != self._stream.codec_context.extradata:
            raise RuntimeError("two encoders of the same settings do not write one stream")
        return encoder

    def _fragment(self, frames: Frames) -> bytes:
        """One fragment with all of the frames.

        A muxer closes a fragment for certain only when it is itself closed. So each fragment has a muxer
        of its own, in memory, which is given its number and takes its time from the packets
        (frag_discont); its head, which would be the file's again, is left out.
        """
        import av

        self._fragments += 1
        memory, options = BytesIO(), _MUXER | {"fragment_index": str(self._fragments)}
        with av.open(memory, "w", format="mp4", options=options) as muxer:
            stream: Any = muxer.add_stream_from_template(self._stream)
            stream.time_base = self._stream.time_base
            muxer.start_encoding()
            head = memory.tell()
            encoder = self._encoder()
            for frame in self._enlarged(frames):
                for packet in self._encoded(encoder, frame):
                    packet.stream = stream
                    muxer.mux(packet)
        return memory.getvalue()[head:]

    def _encoded(self, encoder: Any, frame: Frames) -> list[Any]:
        import av

        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(frame, format="rgb24"),
            format="yuv420p",
            dst_colorspace=av.video.reformatter.Colorspace.ITU709,
            dst_color_range=av.video.reformatter.ColorRange.MPEG,
        )
        picture.pts, picture.time_base = self._frames, 1 / self.rate
        self._frames += 1
        packets: list[Any] = encoder.encode(picture)
        for packet in packets:
            packet.duration = int(1 / self.rate / packet.time_base)
        return packets

    def _end(self) -> None:
        if self._head is not None:
            self._head.close()
        if self._file is not None:
            with self._file:
                if not self._file.seekable():  # a FIFO cannot be cut
                    return
                self._file.truncate(self._written)  # what an error left of a fragment
                os.fsync(self._file.fileno())
            if not self._written:
                self.path.unlink()
