"""Reading the boxes of an mp4 file that `Mp4Writer` wrote: its head, and its fragments one after another.

Boxes are those of ISO/IEC 14496-12: 4 bytes of size, 4 of name, then the content; `ftyp` and `moov` are the
head, a `moof` with the `mdat` after it a fragment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.media import open_media

MOST_HEAD = 1 << 24
"""Bytes, more than any head or table of a fragment that is written here."""
_DURATION, _SIZE, _FLAGS, _OFFSET = 0x100, 0x200, 0x400, 0x800
"""Flags of `trun`: what it says of each sample, in this order, 4 bytes each."""


@dataclass(frozen=True)
class Fragment:
    """Where the bytes of a fragment are, and how many frames it has."""

    start: int
    end: int
    frames: int


@dataclass(frozen=True)
class Fragments:
    """A file as far as it is whole."""

    head: bytes
    all: tuple[Fragment, ...]
    torn: bool
    """Whether more follows, of a write that was cut off."""

    @property
    def frames(self) -> int:
        """Of all whole fragments."""
        return sum(fragment.frames for fragment in self.all)

    def first(self, frames: int) -> tuple[Fragment, ...] | None:
        """The fragments that hold exactly the first frames; None: none ends there."""
        found, left = [], frames
        for fragment in self.all:
            if left <= 0:
                break
            found.append(fragment)
            left -= fragment.frames
        return tuple(found) if left == 0 else None


def read_fragments(path: Path) -> Fragments:
    """The fragments of a file. Raises InputError for one that cannot be read, or that has anything else."""
    try:
        with path.open("rb") as file:
            return _fragments(file, str(path))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(path)) from error


def stream_of(head: bytes) -> list[bytes]:
    """What a head says of the stream, without what it says of the video: equal for fragments that may follow
    one another."""
    moov = next(content for name, content in _boxes(head) if name == b"moov")
    return [name + content for name, content in _boxes(moov) if name not in (b"udta", b"meta")]


def metadata_of(path: Path, fragments: Fragments) -> dict[str, str]:
    """What a file says of itself, by its head. Raises InputError where its head is damaged."""
    import av

    first = fragments.all[0] if fragments.all else Fragment(0, 0, 0)
    with path.open("rb") as file:
        file.seek(first.start)
        content = fragments.head + file.read(first.end - first.start)
    try:
        with open_media(BytesIO(content), ["mov", "mp4"]) as video:
            return dict(video.metadata)
    except av.error.FFmpegError as error:
        raise _foreign(str(path), f"a damaged head ({error.strerror})") from error


def as_stored(text: str) -> str:
    """A text of the metadata as a file gives it back: what is no text is written as its number."""
    return text.encode("utf-8", "backslashreplace").decode()


def copy_bytes(source: BinaryIO, to: BinaryIO, size: int) -> None:
    """Copy so many bytes from where a file stands."""
    while size and (part := source.read(min(size, 1 << 20))):
        to.write(part)
        size -= len(part)


def _fragments(file: BinaryIO, where: str) -> Fragments:
    size = file.seek(0, 2)
    end, head, torn = 0, b"", False
    found: list[Fragment] = []
    while end < size:
        box = _whole_box(file, end, size)
        if box is None:
            torn = True
            break
        name, start, end_of_box = box
        if name in (b"ftyp", b"moov") and not found:
            head += _content(file, end, end_of_box, where)
            end = end_of_box
            continue
        data = _whole_box(file, end_of_box, size) if name == b"moof" else None
        if name != b"moof" or (data is not None and data[0] != b"mdat"):
            raise _foreign(where, f"a box {(data or box)[0]!r} where a fragment would be")
        if data is None:
            torn = True
            break
        number, sizes = _samples(_content(file, start, end_of_box, where), where)
        if number != len(found) + 1 or sum(sizes) != data[2] - data[1]:
            raise _foreign(where, f"a fragment {number} of {sum(sizes)} bytes in place {len(found) + 1}")
        found.append(Fragment(end, data[2], len(sizes)))
        end = data[2]
    if not any(name == b"moov" for name, _ in _boxes(head)):
        raise _foreign(where, "no head")
    return Fragments(head, tuple(found), torn)


def _whole_box(file: BinaryIO, start: int, size: int) -> tuple[bytes, int, int] | None:
    """Name, start of the content and end of a box; None: it is not there as a whole."""
    file.seek(start)
    opening = file.read(16)
    if len(opening) < 8:
        return None
    length, name, content = *struct.unpack(">I4s", opening[:8]), start + 8
    if length == 1 and len(opening) == 16:  # 64 bits, as of an mdat above 4 GB
        length, content = struct.unpack(">Q", opening[8:])[0], start + 16
    end = start + length
    return (name, content, end) if content <= end <= size else None


def _content(file: BinaryIO, start: int, end: int, where: str) -> bytes:
    if end - start > MOST_HEAD:
        raise _foreign(where, f"a table of {end - start} bytes")
    file.seek(start)
    return file.read(end - start)


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        if not 8 <= length <= len(content) - at:
            return
        yield name, content[at + 8 : at + length]
        at += length


def _samples(moof: bytes, where: str) -> tuple[int, list[int]]:
    """The number of a fragment, and the bytes of each of its frames."""
    try:
        inner = dict(_boxes(moof))
        (number,) = struct.unpack_from(">I", inner[b"mfhd"], 4)
        track = dict(_boxes(inner[b"traf"]))
        default = _default_size(track[b"tfhd"])
        flags, count = struct.unpack_from(">II", track[b"trun"])
        flags &= 0xFFFFFF
        at = 8 + 4 * bool(flags & 1) + 4 * bool(flags & 4)
        each = 4 * sum(bool(flags & one) for one in (_DURATION, _SIZE, _FLAGS, _OFFSET))
        if not flags & _SIZE:
            return number, [default] * min(count, MOST_HEAD)
        first = at + 4 * bool(flags & _DURATION)
        sizes = [struct.unpack_from(">I", track[b"trun"], first + n * each)[0] for n in range(count)]
    except (KeyError, struct.error) as error:
        raise _foreign(where, "a fragment without its tables") from error
    return number, sizes


def _default_size(tfhd: bytes) -> int:
    """The bytes of samples of which `trun` does not say it."""
    (flags,) = struct.unpack_from(">I", tfhd)
    flags &= 0xFFFFFF
    at = 8 + 8 * bool(flags & 1) + 4 * bool(flags & 2) + 4 * bool(flags & 8)
    return int(struct.unpack_from(">I", tfhd, at)[0]) if flags & 0x10 else 0


def _foreign(where: str, why: str) -> InputError:
    return InputError(
        f"is not a video that can be gone on with: it has {why}",
        where=where,
        expected="one that forcingkv wrote, as it was written",
        hint="Choose another --out: it gets the rest of the video.",
    )
