"""The safetensors format: the same files as the safetensors library reads and writes."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from forcingkv.headmaps import InputError
from forcingkv.runtime.tensors import TensorWriter, new_tensors, read_arrays, read_header

KINDS = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}


@st.composite
def files(draw: st.DrawFn) -> dict[str, npt.NDArray[Any]]:
    names = draw(st.lists(st.text('ab.é"0 ', min_size=1, max_size=4), unique=True, max_size=4))
    arrays = {}
    for name in names:
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        size = int(np.prod(shape)) * 8
        bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
        kind = np.dtype(KINDS[draw(st.sampled_from(sorted(KINDS)))])
        arrays[name] = bits[: int(np.prod(shape)) * kind.itemsize].view(kind).reshape(shape)
    return arrays


metadata_of_files = st.dictionaries(st.text("ab é", min_size=1), st.text('xyé\n"'), max_size=3)


def name_of(array: npt.NDArray[Any]) -> str:
    return next(name for name, kind in KINDS.items() if array.dtype == kind)


def planned(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (name_of(array), array.shape) for name, array in arrays.items()}


def assert_same(found: dict[str, npt.NDArray[Any]], expected: dict[str, npt.NDArray[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


@given(files(), metadata_of_files)
def test_the_library_reads_what_was_written(
    arrays: dict[str, npt.NDArray[Any]], metadata: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        with new_tensors(path, planned(arrays), metadata) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
        assert_same(load_file(path), arrays)
        assert_same(read_arrays(path), arrays)
        with safe_open(path, "numpy") as opened:
            assert (opened.metadata() or {}) == metadata
        tensors, again = read_header(path)
        assert (tensors, again) == (writer.tensors, metadata)
        content = path.read_bytes()
        for name, tensor in tensors.items():
            assert content[tensor.offset :][: tensor.bytes] == arrays[name].tobytes()
        assert min((tensor.offset for tensor in tensors.values()), default=0) % 8 == 0


@given(files(), metadata_of_files)
def test_what_the_library_wrote_is_read(
    arrays: dict[str, npt.NDArray[Any]], metadata: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file(arrays, path, metadata or None)
        assert_same(dict(sorted(read_arrays(path).items())), dict(sorted(arrays.items())))
        assert read_header(path)[1] == metadata


def test_bfloat16_is_read_as_float32_and_written_as_bits(tmp_path: Path) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch({"a": values}, tmp_path / "a")
    read = read_arrays(tmp_path / "a")["a"]
    np.testing.assert_array_equal(read, values.float().numpy(), strict=True)
    with new_tensors(tmp_path / "b", {"a": ("BF16", (3, 5))}) as writer:
        writer.write("a", values.view(torch.uint16).numpy())
    np.testing.assert_array_equal(read_arrays(tmp_path / "b")["a"], read)


def test_bytes_and_memoryviews_are_written(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32).tobytes()
    with new_tensors(tmp_path / "a", {"a": ("F32", (6,)), "b": ("F32", (2, 3))}) as writer:
        writer.write("a", data)
        writer.write("b", memoryview(data))
    found = read_arrays(tmp_path / "a")
    np.testing.assert_array_equal(found["a"], found["b"].reshape(-1))


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file: it has 0 bytes"),
        (b"{}", "it has 2 bytes"),
        (b"PK\x03\x04" + b"\0" * 60, "has 64 bytes, fewer than its header of 67324752"),
        (b"\x80\x02}q\x00(X\x05\x00\x00" * 4, "its header would have"),
        (packed({}, length=1), "its header would have 1 bytes"),
        (packed({}, length=9), "fewer than its header of 9"),
        (packed(b"{]"), "its header is not JSON"),
        (packed(b"\xff\xff"), "its header is not JSON"),
        (packed(b"[" * 100_000), "its header is not JSON"),
        (packed(b'{"a": 1, "a": 1}'), "'a' is given twice in a table"),
        (packed([]), "is not a table of tensors"),
        (packed({"__metadata__": {"a": 1}}), "__metadata__ is not a table of texts"),
        (packed({"a": [1]}), "does not have just dtype, shape and data_offsets"),
        (packed({"a": {"dtype": "F32"}}), "does not have just dtype, shape and data_offsets"),
        (packed({"a": entry(0, 4, dtype="F33")}, b"1234"), "has the dtype 'F33'; expected one of BOOL"),
        (packed({"a": entry(0, 4, dtype=[])}, b"1234"), "has the dtype []"),
        (packed({"a": entry(0, 4, [-1])}, b"1234"), "has a faulty shape"),
        (packed({"a": entry(0, 4, [True])}, b"1234"), "has a faulty shape"),
        (packed({"a": entry(0, 4, [1.0])}, b"1234"), "has a faulty shape"),
        (packed({"a": entry(0, 4, [2])}, b"1234"), "has 4 bytes; expected 8 for F32 (2,)"),
        (packed({"a": entry(4, 0, [1])}, b"1234"), "has -4 bytes"),
        (packed({"a": entry(0, 8)}, b"1234"), "cut short"),
        (packed({"a": entry(0, 4)}, b"12345"), "as its header says"),
        (packed({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "'b' overlaps the one before it"),
        (packed({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12), "'b' leaves a gap before it"),
    ],
)
def test_a_faulty_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_header(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_absent_files_and_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "absent")
    with new_tensors(tmp_path / "a", {"a": ("F8_E4M3", (1,))}) as writer:
        writer.write("a", b"1")
    with pytest.raises(InputError, match="'a' is F8_E4M3, which numpy lacks"):
        read_arrays(tmp_path / "a")


def late(writer: TensorWriter) -> None:
    writer.write("a", b"1234")
    writer.write("b", b"1234")
    writer.write("b", b"1234")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda w: w.write("b", b"1234"), "'b' is not the next tensor; expected a"),
        (late, "expected none"),
        (lambda w: w.write("a", b"123"), "has 3 bytes, expected 4"),
        (lambda w: w.write("a", np.zeros(2, np.float16)), "is float16 \\(2,\\), expected float32 \\(1,\\)"),
        (lambda w: w.write("a", b"1234"), "b was not written"),
    ],
)
def test_a_writer_that_is_misused_leaves_nothing(
    act: Callable[[TensorWriter], object], message: str, tmp_path: Path
) -> None:
    plan: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("F32", (1,)), "b": ("F32", (1,))}
    with pytest.raises(ValueError, match=message), new_tensors(tmp_path / "a", plan) as writer:
        act(writer)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_keeps_the_old_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), new_tensors(path, {"a": ("U8", (1,))}):
        raise KeyError
    assert path.read_text() == "old"
    with pytest.raises(ValueError, match="cannot be stored"):
        new_tensors(path, {"a": ("F33", (1,))}).__enter__()
    with pytest.raises(InputError, match="cannot be written"), new_tensors(path / "b", {}):
        pass
    assert list(tmp_path.iterdir()) == [path]
