"""A file of embeddings that grows: what was written is kept, gone on with, and never taken for whole."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError, locks
from forcingkv.runtime.embeds_writer import GrowingEmbeds, check_place, growing_embeds
from forcingkv.runtime.text import read_embeds

PROMPTS = ["a", "b", "c"]
ARRAYS = [np.full((tokens, 4), tokens, np.float32) + np.arange(4, dtype=np.float32) for tokens in (2, 3, 5)]
HIDDEN = ".e.safetensors.growing.forcingkv"


def opened(path: Path, **made: Any) -> AbstractContextManager[GrowingEmbeds]:
    shapes = [(len(array), 4) for array in ARRAYS]
    return growing_embeds(path, PROMPTS, PROMPTS, [2, 3, 9], shapes, {"encoder": "one", **made})


def write(path: Path, until: int, **made: Any) -> int:
    """Write as far as that prompt, then stop as Ctrl-C does; how many were there already."""
    with opened(path, **made) as growing:
        before = growing.done
        for array in ARRAYS[before:until]:
            growing.write(array)
        if until < len(ARRAYS):
            raise KeyboardInterrupt
    return before


def stopped(path: Path, until: int, **made: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(path, until, **made)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    assert write(tmp_path / "whole", 3) == 0
    return (tmp_path / "whole").read_bytes()


def test_the_file_is_one_of_embeddings(tmp_path: Path) -> None:
    write(tmp_path / "e.safetensors", 3)
    embeds = read_embeds(tmp_path / "e.safetensors")
    assert (embeds.prompts, embeds.cleaned, embeds.tokens) == (("a", "b", "c"), ("a", "b", "c"), (2, 3, 9))
    for found, array in zip(embeds.arrays, ARRAYS, strict=True):
        np.testing.assert_array_equal(found, array, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("until", [1, 2])
def test_what_was_stopped_goes_on_to_the_same_file(until: int, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    stopped(path, until)
    assert not path.exists()
    with pytest.raises(InputError, match="cut short"):
        read_embeds(tmp_path / HIDDEN)
    assert write(path, 3) == until
    assert path.read_bytes() == whole
    assert not (tmp_path / HIDDEN).exists()


@pytest.mark.parametrize("cut", range(1, 140, 13))
def test_a_file_that_was_killed_at_any_byte_goes_on(cut: int, whole: bytes, tmp_path: Path) -> None:
    """SIGKILL leaves what had been written: whole embeddings are kept, the rest is written again."""
    data = sum(array.nbytes for array in ARRAYS)
    (tmp_path / HIDDEN).write_bytes(whole[: len(whole) - cut])
    ends = np.cumsum([array.nbytes for array in ARRAYS])
    assert write(tmp_path / "e.safetensors", 3) == int(sum(ends <= data - cut))
    assert (tmp_path / "e.safetensors").read_bytes() == whole


def test_all_written_but_not_renamed_is_only_renamed(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / HIDDEN).write_bytes(whole)
    assert write(tmp_path / "e.safetensors", 3) == 3
    assert (tmp_path / "e.safetensors").read_bytes() == whole


def test_what_another_command_left_is_not_gone_on_with(whole: bytes, tmp_path: Path) -> None:
    stopped(tmp_path / "e.safetensors", 2, encoder="another")
    with opened(tmp_path / "e.safetensors") as growing:
        assert (growing.done, growing.begun_anew) == (0, True)
        for array in ARRAYS:
            growing.write(array)
    assert (tmp_path / "e.safetensors").read_bytes() == whole


def test_longer_leftovers_are_cut(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / HIDDEN).write_bytes(b"x" * 10_000)
    assert write(tmp_path / "e.safetensors", 3) == 0
    assert (tmp_path / "e.safetensors").read_bytes() == whole


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    stopped(tmp_path / "e.safetensors", 0)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_one_is_whole(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    path.write_bytes(b"old")
    stopped(path, 2)
    assert path.read_bytes() == b"old"
    write(path, 3)
    assert path.read_bytes() == whole


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with opened(path) as growing:
        for refused in (lambda: check_place(path), lambda: write(path, 3)):
            with pytest.raises(InputError, match="is being written by another process"):
                refused()
        for array in ARRAYS:
            growing.write(array)
    check_place(path)
    assert len(read_embeds(path).prompts) == 3


def test_arrays_of_another_shape_and_too_few_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"embedding 0 of 3 has the shape \(3, 4\)"),
        opened(tmp_path / "e") as one,
    ):
        one.write(ARRAYS[1])
    with pytest.raises(ValueError, match="2 embeddings were not written"), opened(tmp_path / "e") as one:
        one.write(ARRAYS[0])
    assert not (tmp_path / "e").exists()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; expected the name of a file"):
        check_place(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_place(tmp_path / "file" / "e")
    check_place(tmp_path / "new" / "e")
    assert not (tmp_path / "new").exists()


def test_without_locks_it_writes_too(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_UNIX", None)
    write(tmp_path / "e.safetensors", 3)
    assert (tmp_path / "e.safetensors").read_bytes() == whole
