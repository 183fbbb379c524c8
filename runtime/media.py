"""Opening videos and pictures that strangers may have made: as what holds frames itself, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

MOST_PIXELS = 1 << 25
"""Of a frame: as many as 8K has, which take 100 MB. A picture of 700 kB may say that it has 256 million."""
VIDEOS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "yuv4mpegpipe")
PICTURES = ("gif", "apng", "png_pipe", "jpeg_pipe", "bmp_pipe", "webp_pipe", "tiff_pipe")
"""Names that FFmpeg has for what a file is by its content. Not those of lists of other files and of streams
(hls, dash, concat, sdp, image2): what a stranger calls a video then opens nothing else."""


def open_media(source: Path | BinaryIO, kinds: Sequence[str] = (*VIDEOS, *PICTURES)) -> Any:
    """The container (PyAV's) of a file, or of bytes, that is one of `kinds`.

    Metadata that are not UTF-8 are escaped. Raises av.error.FFmpegError and OSError as PyAV does.
    """
    import av

    options = {
        "format_whitelist": ",".join(kinds),
        "protocol_whitelist": "file",
        "max_pixels": str(MOST_PIXELS),
    }
    # file: or a name such as "v1:kite.mp4" would be a protocol's to FFmpeg
    file = f"file:{source}" if isinstance(source, Path) else source
    return av.open(file, options=options, metadata_errors="backslashreplace")
