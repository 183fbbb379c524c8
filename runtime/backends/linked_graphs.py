"""Graphs whose files are links, as in the cache of a hub: handed to ONNX Runtime by content.

A graph names the file of its weights relative to its own folder. Some versions of ONNX Runtime refuse a link
there that leads out of that folder (1.24), others follow it (1.26). So the name inside the graph becomes
that of the file which the link leads to, and ONNX Runtime is told the folder of that file. It maps the file
itself into memory: there is no second copy of the weights (docs/decisions/0023).

The graph is taken apart as protobuf by hand, since the runtime does not install onnx: fields are copied as
they are, but for the entries `location` of the initializers' external data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from forcingkv.headmaps.errors import InputError

EXTERNAL_DATA = (7, 5, 13)
"""Numbers of the fields `ModelProto.graph`, `GraphProto.initializer` and `TensorProto.external_data`."""
KEY, VALUE = 1, 2
"""Fields of an entry of external data (`StringStringEntryProto`)."""
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
"""Wire types of protobuf."""


def graph_and_folder(path: Path, weights: Path | None) -> tuple[str | bytes, Path | None]:
    """What ONNX Runtime is to load, and the folder of its weights where it cannot know it.

    Args:
        path: an ONNX file.
        weights: the file that its initializers lie in, if there is one. Both were found by `files.inside`.

    Returns:
        The path alone where neither file is a link; else the graph's bytes, and the folder of its weights.

    Raises InputError for a graph that is no protobuf, or names another file than `weights`.
    """
    folder = path.parent.resolve()
    files = [path] if weights is None else [path, weights]
    if all(file.resolve() == folder / file.name for file in files):
        return str(path), None
    if weights is None:
        return relocated(path, None, None), folder
    known, target = Path(os.path.relpath(weights, path.parent)).as_posix(), weights.resolve()
    return relocated(path, known, target.name), target.parent


def relocated(path: Path, known: str | None, name: str | None) -> bytes:
    """The bytes of a graph with `name` in place of `known` as the file of its weights.

    Raises InputError for a graph that is no protobuf, or names another file than `known`.
    """

    def change(entry: bytes) -> bytes:
        fields = {number: payload or b"" for number, _, payload in _fields(entry)}
        if fields.get(KEY) != b"location":
            return entry
        location = fields.get(VALUE, b"").decode(errors="replace")
        if known is None or name is None or location != known:
            raise InputError(
                f"takes weights from the file {location!r}",
                where=str(path),
                expected=f"{known!r}, as its manifest says" if known else "no file: its manifest names none",
                hint="The bundle is damaged, or not to be trusted: export or copy it again.",
            )
        return _field(KEY, b"location") + _field(VALUE, name.encode())

    try:
        return _rewritten(path.read_bytes(), EXTERNAL_DATA, change)
    except (IndexError, OSError) as error:
        raise InputError(f"cannot be read as an ONNX graph ({error})", where=str(path)) from error


def _rewritten(message: bytes, path: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    """The message with `change` applied to every field that lies at a path of field numbers."""
    parts = []
    for number, whole, payload in _fields(message):
        if number != path[0] or payload is None:
            parts.append(whole)
        else:
            parts.append(
                _field(number, _rewritten(payload, path[1:], change) if path[1:] else change(payload))
            )
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes | None]]:
    """Each field of a message: its number, all of it, and what it holds where that has a length.

    Raises IndexError where the message ends within a field.
    """
    place = 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        kind, payload = tag & 7, None
        if kind == VARINT:
            _, place = _varint(message, place)
        elif kind == LENGTH:
            size, place = _varint(message, place)
            payload = message[place : place + size]
            place += size
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            place += 8 if kind == EIGHT_BYTES else 4
        else:
            raise IndexError(f"a field of the wire type {kind}")
        if place > len(message):
            raise IndexError("it ends within a field")
        yield tag >> 3, message[start:place], payload


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The number at a place, and the place after it."""
    number = shift = 0
    while True:
        byte = message[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place
        if shift > 63:
            raise IndexError("a number of more than ten bytes")


def _field(number: int, payload: bytes) -> bytes:
    """A field with a length."""
    return _coded(number << 3 | LENGTH) + _coded(len(payload)) + payload


def _coded(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
