"""Frames of a chunk as the bytes that a client asked for."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from typing import Protocol

import numpy as np

from forcingkv.runtime import Chunk
from forcingkv.runtime.frames import MOST_PIXELS, Frames
from forcingkv.runtime.mp4_stream import Mp4Stream
from forcingkv.serve.messages import FramesAs, Seconds
from forcingkv.serve.refusals import RefusalError

QUALITY = 3
"""Of JPEG, as FFmpeg counts: 2 is the best, 31 the smallest."""


class FrameCoder(Protocol):
    """Makes the parts of a chunk.

    Attributes:
        head: parts that come before the first chunk.
        codec: what a browser is told; None: nothing.
        width, height: as a client sees frames.
    """

    head: list[bytes]
    codec: str | None
    width: int
    height: int

    def parts(self, frames: Frames) -> list[bytes]:
        """Of the frames of a chunk, uint8 (frames, height, width, 3)."""

    def close(self) -> None:
        """Let go of what it holds."""


Coded = tuple[tuple[bytes, ...], Seconds]
"""The parts of a chunk, and what it took."""


def coded(coder: FrameCoder, chunk: Chunk) -> Coded:
    """The frames of a chunk as a client gets them. On a GPU what it took is waited for."""
    took = {name: getattr(chunk.timing, name) for name in Seconds.model_fields}
    return tuple(coder.parts(chunk.frames)), Seconds(**took)


def coder_for(
    kind: FramesAs, width: int, height: int, fps: float, enlarge: int, first_frame: int
) -> FrameCoder:
    """A coder for a video whose next frame is the `first_frame`. Raises RefusalError for frames too large."""
    if max(width, height) * enlarge > MOST_PIXELS:
        raise RefusalError("bad_request", f"Frames enlarged {enlarge} times are too large.")
    kinds: dict[FramesAs, type[Mp4Parts | JpegParts | RawParts]] = {
        "mp4": Mp4Parts,
        "jpeg": JpegParts,
        "rgb24": RawParts,
    }
    return kinds[kind](width * enlarge, height * enlarge, fps, enlarge, first_frame)


class RawParts:
    """The bytes of all frames of a chunk, row by row, three bytes a pixel: one part."""

    def __init__(self, width: int, height: int, fps: float, enlarge: int, first_frame: int) -> None:
        self.head: list[bytes] = []
        self.codec: str | None = None
        self.width, self.height, self._enlarge = width, height, enlarge

    def parts(self, frames: Frames) -> list[bytes]:
        return [frames.repeat(self._enlarge, 1).repeat(self._enlarge, 2).tobytes()]

    def close(self) -> None:
        """Nothing is held."""


class Mp4Parts(RawParts):
    """A fragment of H.264 a chunk, and its head before."""

    def __init__(self, width: int, height: int, fps: float, enlarge: int, first_frame: int) -> None:
        super().__init__(width, height, fps, enlarge, first_frame)
        self._stream = Mp4Stream(width, height, Fraction(fps).limit_denominator(1001))
        self._stream.frames = first_frame
        self.head, self.codec = [self._stream.head], self._stream.codec
        self.width, self.height = self._stream.width, self._stream.height

    def parts(self, frames: Frames) -> list[bytes]:
        return [self._stream.fragment(enlarged(frames, self._enlarge))]

    def close(self) -> None:
        self._stream.close()


class JpegParts(RawParts):
    """A JPEG a frame: a part each."""

    def parts(self, frames: Frames) -> list[bytes]:
        return [self._picture(frame) for frame in enlarged(frames, self._enlarge)]

    def _picture(self, frame: Frames) -> bytes:
        import av

        memory = BytesIO()
        with av.open(memory, "w", format="mjpeg") as container:
            stream = container.add_stream(
                "mjpeg", rate=1, options={"qmin": str(QUALITY), "qmax": str(QUALITY)}
            )
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuvj444p"
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            for packet in (*stream.encode(picture), *stream.encode()):
                container.mux(packet)
        return memory.getvalue()


def enlarged(frames: Frames, enlarge: int) -> Iterator[Frames]:
    """Frames one by one, so that only one large one is held."""
    for frame in frames:
        yield np.ascontiguousarray(frame.repeat(enlarge, 0).repeat(enlarge, 1))
