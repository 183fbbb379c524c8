"""Graphs as ONNX Runtime gets them: the bytes that were checked, though files be links as in a hub's cache.

A graph names the file of its weights relative to its own folder. Some versions of ONNX Runtime refuse a link
there that leads out of that folder (1.24), others follow it (1.26). So the name inside the graph becomes
that of the file which the link leads to, and ONNX Runtime is told the folder of that file. It maps the file
itself into memory: there is no second copy of the weights (docs/decisions/0023).

The graph is taken apart as protobuf by hand, since the runtime does not install onnx: fields are copied as
they are, but for the entries `location` of the initializers' external data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.protobuf import ProtobufError, field, fields

EXTERNAL_DATA = (7, 5, 13)
"""Numbers of the fields `ModelProto.graph`, `GraphProto.initializer` and `TensorProto.external_data`."""
KEY, VALUE = 1, 2
"""Fields of an entry of external data (`StringStringEntryProto`)."""


def graph_and_folder(
    path: Path, weights: Path | None, content: bytes | None = None
) -> tuple[str | bytes, Path | None]:
    """What ONNX Runtime is to load, and the folder of its weights where it cannot know it.

    Args:
        path: an ONNX file.
        weights: the file that its initializers lie in, if there is one. Both were found by `files.inside`.
        content: the file's bytes, if they were read before.

    Returns:
        The path alone where neither file is a link and no content is given; else the graph's bytes, and the
        folder of its weights.

    Raises InputError for a graph that is no protobuf, or names another file than `weights`.
    """
    folder = path.parent.resolve()
    files = [path] if weights is None else [path, weights]
    plain = all(file.resolve() == folder / file.name for file in files)
    if plain and (weights is None or weights.parent == path.parent):
        return (str(path), None) if content is None else (content, folder)
    content = path.read_bytes() if content is None else content
    if weights is None:
        return relocated(content, str(path), None, None), folder
    known, target = Path(os.path.relpath(weights, path.parent)).as_posix(), weights.resolve()
    return relocated(content, str(path), known, target.name), target.parent


def relocated(content: bytes, where: str, known: str | None, name: str | None) -> bytes:
    """The bytes of a graph with `name` in place of `known` as the file of its weights.

    Raises InputError for a graph that is no protobuf, or names another file than `known`.
    """

    def change(entry: bytes) -> bytes:
        held = {number: payload for number, _, payload, _, _ in fields(entry)}
        if held.get(KEY) != b"location":
            return entry
        value = held.get(VALUE, b"")
        location = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        if known is None or name is None or location != known:
            raise InputError(
                f"takes weights from the file {location!r}",
                where=where,
                expected=f"{known!r}, as its manifest says" if known else "no file: its manifest names none",
                hint="The bundle is damaged, or not to be trusted: export or copy it again.",
            )
        return field(KEY, b"location") + field(VALUE, name.encode())

    try:
        return _rewritten(content, EXTERNAL_DATA, change)
    except ProtobufError as error:
        raise InputError(f"cannot be read as an ONNX graph ({error})", where=where) from error


def _rewritten(message: bytes, path: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    """The message with `change` applied to every field that lies at a path of field numbers."""
    parts = []
    for number, _, payload, start, end in fields(message):
        if number != path[0] or not isinstance(payload, bytes):
            parts.append(message[start:end])
        else:
            parts.append(
                field(number, _rewritten(payload, path[1:], change) if path[1:] else change(payload))
            )
    return b"".join(parts)
