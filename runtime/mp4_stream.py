"""A video as fragments of mp4 in memory: a head, then one piece of bytes for the frames of each chunk.

In a file (`video.Mp4Writer`) or sent to a browser's MediaSource they play as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime.frames import Frames, need_av

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


def need_h264() -> None:
    """Raise MissingExtraError, naming the install command, unless PyAV and its encoder are installed."""
    need_av()
    import av

    if "libx264" not in av.codecs_available:
        raise MissingExtraError("PyAV with libx264", "video")


class Mp4Stream:
    """H.264, yuv420p, BT.709, in fragments, each of which begins with a keyframe.

    Each fragment has an encoder of its own and needs none before it. yuv420p needs even sizes: an odd width
    or height is made even by repeating the last column or row.

    Args:
        width, height: of frames, in pixels.
        rate: frames a second.
        metadata: what the head says of the video, whatever its keys.

    Attributes:
        head: the bytes before the first fragment: what the stream holds, no frames.
        width, height: of the encoded picture, even.
        frames: how many there were so far; may be set, to go on after others.
        fragments: the same of fragments.

    Raises InputError for a size that cannot be encoded.
    """

    def __init__(self, width: int, height: int, rate: Fraction, metadata: Mapping[str, str] = {}) -> None:
        import av

        self.rate = rate
        self.width, self.height = (side + side % 2 for side in (width, height))
        self.frames = self.fragments = 0
        self._reformatter = av.video.reformatter.VideoReformatter()
        memory = BytesIO()
        self._head = av.open(memory, "w", format="mp4", options=_MUXER, metadata_errors="backslashreplace")
        self._head.metadata.update(dict(metadata))
        self._stream: Any = self._head.add_stream("libx264", rate=rate, options=_ENCODER)
        self._configure(self._stream.codec_context)
        try:
            self._head.start_encoding()
        except av.error.FFmpegError as error:
            what = f"are {self.width}x{self.height}, which cannot be encoded ({error.strerror})"
            raise InputError(what, where="frames") from error
        self.head = memory.getvalue()

    def _configure(self, context: Any) -> None:
        context.width, context.height, context.pix_fmt = self.width, self.height, "yuv420p"
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED

    @property
    def codec(self) -> str:
        """As a browser is told it (RFC 6381): `avc1` and profile, constraints and level of the encoder."""
        _, profile, constraints, level = bytes(self._stream.codec_context.extradata)[4:8]
        return f"avc1.{profile:02x}{constraints:02x}{level:02x}"

    def _encoder(self) -> Any:
        """A new encoder, as the one that the head is of."""
        import av

        encoder: Any = av.CodecContext.create("libx264", "w")
        encoder.framerate, encoder.time_base, encoder.options = self.rate, 1 / self.rate, dict(_ENCODER)
        encoder.flags |= av.codec.context.Flags.global_header
        self._configure(encoder)
        encoder.open()
        if encoder.extradata != self._stream.codec_context.extradata:
            raise RuntimeError("two encoders of the same settings do not write one stream")
        return encoder

    def fragment(self, frames: Iterable[Frames]) -> bytes:
        """One fragment with all of the frames, uint8 (height, width, 3) each.

        A muxer closes a fragment for certain only when it is itself closed. So each fragment has a muxer
        of its own, in memory, which is given its number and takes its time from the packets
        (frag_discont); its head, which would be the stream's again, is left out.
        """
        import av

        self.fragments += 1
        memory, options = BytesIO(), _MUXER | {"fragment_index": str(self.fragments)}
        with av.open(memory, "w", format="mp4", options=options) as muxer:
            stream: Any = muxer.add_stream_from_template(self._stream)
            stream.time_base = self._stream.time_base
            muxer.start_encoding()
            head = memory.tell()
            encoder = self._encoder()
            for frame in frames:
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
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        self.frames += 1
        packets: list[Any] = encoder.encode(picture)
        for packet in packets:
            packet.duration = int(1 / self.rate / packet.time_base)
        return packets

    def close(self) -> None:
        """Let go of the head's muxer."""
        self._head.close()
