"""Videos of strangers: what is called one opens nothing else, and takes no more memory than one has."""

from __future__ import annotations

import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import video_reader
from forcingkv.runtime.video import open_writer
from forcingkv.runtime.video_reader import open_video

NAMES = ("a.mp4", "a.m3u8", "a.mpd", "a.sdp", "a.ffconcat", "a.txt")


def written(path: Path, frames: int = 4) -> Path:
    with open_writer(path, fps=16) as writer:
        writer.write(np.full((frames, 16, 24, 3), 90, np.uint8))
    return path


def frames_of(path: Path) -> int:
    with open_video(path) as (_, frames):
        return len(list(frames))


def png(width: int, height: int) -> bytes:
    """A picture of one colour: 16,000 x 16,000 of them are 700 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_other_files_are_no_videos(name: str, tmp_path: Path) -> None:
    """HLS, DASH, concat, SDP, and URLs in them: neither the file beside is read nor a socket opened."""
    written(tmp_path / "secret.mp4")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.01)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.ts"
        hls = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:1.0,\n{}\n#EXT-X-ENDLIST\n"
        base = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        dash = base + '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
        dash += "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"
        sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        sdp += "a=rtpmap:96 H264/90000\n"
        for text in (hls, dash, "ffconcat version 1.0\nfile '{}'\n", sdp):
            for place in ("secret.mp4", f"file:{tmp_path}/secret.mp4", url):
                (tmp_path / name).write_text(text.format(place))
                with pytest.raises(InputError, match="cannot be read as a video"):
                    frames_of(tmp_path / name)
        with pytest.raises(TimeoutError):
            listening.accept()


def test_pictures_too_large_for_any_screen_are_refused(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(12_000, 8_000))
    with pytest.raises(InputError, match="no size, or more than 33,554,432 pixels"):
        frames_of(tmp_path / "large.png")
    (tmp_path / "small.png").write_bytes(png(120, 80))
    assert frames_of(tmp_path / "small.png") == 1


def test_videos_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_reader, "MOST_VIDEO_FRAMES", 4)
    assert frames_of(written(tmp_path / "a.mp4", 4)) == 4
    with pytest.raises(InputError, match="more than 4 frames"):
        frames_of(written(tmp_path / "b.mp4", 5))
