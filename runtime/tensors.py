"""The safetensors file format with numpy alone: read a header, read arrays, write as a stream.

A file is 8 bytes of header length (little-endian), a JSON header, and the tensors' bytes, one after the
other without a gap. The `safetensors` library does the same where it is installed; the runtime may not
need it, and writing tensor by tensor keeps a large checkpoint out of memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.reading import parse_json
from forcingkv.headmaps.writing import new_file
from forcingkv.runtime.dtypes import STORED_AS

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
METADATA = "__metadata__"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: str
    """The format's name: "F32", "BF16", "I64", ..."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file (not of the data, as the header has it)."""
    bytes: int


def read_header(path: Path | str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and the file's metadata. Reads no tensor.

    Raises InputError where the file cannot be read, is no safetensors file, is cut short, or its
    header does not describe exactly the bytes that follow it.
    """
    where = str(path)
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, text = _header_text(file, size, where)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=where) from error
    try:
        header = parse_json(text, where)
    except InputError as error:
        raise _no_safetensors(where, f"its header {error.what}") from error
    if not isinstance(header, dict):
        raise _no_safetensors(where, "its header is not a table of tensors")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _no_safetensors(where, f"{METADATA} is not a table of texts")
    tensors = {name: _stored(name, entry, start, where) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)))
    end = start
    for name, tensor in tensors.items():
        if tensor.offset != end:
            fault = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise InputError(f"the tensor {name!r} {fault}", where=where)
        end += tensor.bytes
    if end != size:
        hint = "The file was cut short: copy it again." if size < end else None
        raise InputError(f"has {size} bytes", where=where, expected=f"{end}, as its header says", hint=hint)
    return tensors, metadata


def read_arrays(path: Path | str, only: str | None = None) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file, or the one of that name, as arrays of their shape; BF16 comes as float32.

    Raises InputError as `read_header` does, and for a dtype that numpy has no type for (the 8-bit floats).
    """
    tensors, _ = read_header(path)
    arrays = {}
    with Path(path).open("rb") as file:
        for name, tensor in tensors.items():
            if only not in (None, name):
                continue
            dtype = STORED_AS[tensor.dtype]
            if tensor.dtype != "BF16" and dtype.array is None:
                raise InputError(f"the tensor {name!r} is {tensor.dtype}, which numpy lacks", where=str(path))
            file.seek(tensor.offset)
            array: npt.NDArray[Any] = np.fromfile(file, dtype.bits, math.prod(tensor.shape))
            if tensor.dtype == "BF16":  # the upper half of a float32
                array = (array.astype("<u4") << 16).view("<f4")
            arrays[name] = array.reshape(tensor.shape)
    return arrays


def file_start(
    planned: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None, where: str
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The bytes that a file of those tensors begins with, and where each tensor lies in it.

    Raises ValueError for a dtype that there is none of; `where` is the file, for messages.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in planned.items():
        if dtype not in STORED_AS or name == METADATA:
            raise ValueError(f"a tensor {name!r} of dtype {dtype!r} cannot be stored")
        begin, end = end, end + math.prod(shape) * STORED_AS[dtype].bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8
    start = len(text).to_bytes(8, "little") + text
    tensors = {name: _stored(name, header[name], len(start), where) for name in planned}
    return start, tensors


@contextmanager
def new_tensors(
    path: Path, planned: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """A safetensors file of the tensors {name: (dtype, shape)}, which are written one by one in that order.

        with new_tensors(path, {"a": ("F32", (2, 3))}, {"made by": "me"}) as writer:
            writer.write("a", array)

    It has a temporary name until all are written. Raises ValueError for a dtype that there is none of and for
    tensors that were not written, InputError where the file cannot be written.
    """
    start, tensors = file_start(planned, metadata, str(path))
    with new_file(path) as partial, partial.open("wb") as file:
        file.write(start)
        writer = TensorWriter(file, tensors)
        yield writer
        if writer.left:
            raise ValueError(f"{', '.join(writer.left)} was not written")


class TensorWriter:
    """Writes the tensors of a file that `new_tensors` begins.

    Attributes:
        tensors: where each tensor lies, known before any is written.
        left: names of those that are still to be written, in order.
    """

    def __init__(self, file: BinaryIO, tensors: dict[str, StoredTensor]) -> None:
        self.tensors, self.left = tensors, list(tensors)
        self._file = file

    def write(self, name: str, data: bytes | memoryview | npt.NDArray[Any]) -> None:
        """Write the next tensor.

        An array must have the planned shape and dtype (BF16 and 8-bit floats: their bits, as unsigned
        integers). Raises ValueError for a tensor out of order or of another size.
        """
        if self.left[:1] != [name]:
            expected = ", ".join(self.left[:1]) or "none"
            raise ValueError(f"{name!r} is not the next tensor; expected {expected}")
        planned = self.tensors[name]
        if isinstance(data, np.ndarray):
            kind = np.dtype(STORED_AS[planned.dtype].bits)
            if data.shape != planned.shape or data.dtype != kind:
                raise ValueError(f"{name!r} is {data.dtype} {data.shape}, expected {kind} {planned.shape}")
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        given = memoryview(data).nbytes
        if given != planned.bytes:
            raise ValueError(f"{name!r} has {given} bytes, expected {planned.bytes}")
        self._file.write(data)
        del self.left[0]


def _header_text(file: BinaryIO, size: int, where: str) -> tuple[int, bytes]:
    first = file.read(8)
    if len(first) < 8:
        raise _no_safetensors(where, f"it has {size} bytes")
    length = int.from_bytes(first, "little")
    if not 2 <= length <= MAX_HEADER:
        raise _no_safetensors(where, f"its header would have {length} bytes")
    if 8 + length > size:
        hint = "The file was cut short, or is not safetensors."
        raise InputError(f"has {size} bytes, fewer than its header of {length}", where=where, hint=hint)
    return 8 + length, file.read(length)


def _stored(name: str, entry: Any, start: int, where: str) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _no_safetensors(where, f"the tensor {name!r} does not have just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_AS:
        what, expected = f"the tensor {name!r} has the dtype {dtype!r}", f"one of {', '.join(STORED_AS)}"
        raise InputError(what, where=where, expected=expected)
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise _no_safetensors(where, f"the tensor {name!r} has a faulty shape or data_offsets")
    begin, end = offsets
    needed = math.prod(shape) * STORED_AS[dtype].bytes
    if end - begin != needed:
        expected = f"{needed} for {dtype} {tuple(shape)}"
        raise InputError(f"the tensor {name!r} has {end - begin} bytes", where=where, expected=expected)
    return StoredTensor(dtype, tuple(shape), start + begin, needed)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _no_safetensors(where: str, why: str) -> InputError:
    return InputError(f"is not a safetensors file: {why}", where=where)
