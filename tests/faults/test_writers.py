"""One writer at a time, of files and folders: the second is refused at once, and never is there a mixture."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest

from forcingkv.analyze.results import analyzed_alone
from forcingkv.analyze.storage import Storage
from forcingkv.headmaps import InputError, writing
from forcingkv.headmaps.locks import held
from forcingkv.headmaps.writing import (
    check_file,
    held_inside,
    lock_of,
    new_file,
    write_bytes,
    write_text,
)
from forcingkv.runtime.embeds_writer import check_place, growing_embeds
from forcingkv.runtime.frames import RawWriter
from forcingkv.runtime.pictures import PngWriter
from forcingkv.runtime.snapshot import check_states
from forcingkv.runtime.tensors import new_tensors
from forcingkv.runtime.video import Mp4Writer, open_writer
from tests.faults import small_bundles as small
from tests.faults.test_folders import python

FRAMES = np.zeros((2, 8, 8, 3), np.uint8)

TWO_WRITERS = """
import multiprocessing as mp, os, sys, tempfile
from pathlib import Path
import numpy as np
from forcingkv.headmaps import InputError
from forcingkv.runtime.text import read_embeds, write_embeds
from tests.faults.swaps import MEMORY

def write(path, value, start):
    start.wait()
    import time; time.sleep(0.02 * value)
    try:
        names, array = [f"{value}{n}" for n in range(4)], np.full((300, 2000), value, np.float32)
        write_embeds(path, names, [array] * 4, {})
    except InputError as error:
        os._exit(3 if "is being written by another process" in str(error) else 4)

fork = mp.get_context("fork")
for trial in range(25):
    with tempfile.TemporaryDirectory(dir=MEMORY) as room:
        path, start = Path(room, "e.safetensors"), fork.Barrier(2)
        both = [fork.Process(target=write, args=(path, value, start)) for value in (0, 1)]
        [one.start() for one in both]
        [one.join() for one in both]
        codes = sorted(one.exitcode for one in both)
        found = read_embeds(path)
        values = {float(v) for array in found.arrays for v in np.unique(array)}
        names = {prompt[0] for prompt in found.prompts}
        print(codes, values == {float(one) for one in names} and len(names) == 1, os.listdir(room))
"""


def test_two_processes_never_mix_a_file(tmp_path: Path) -> None:
    """FAULTS.md F4: 25 trials of two `write_embeds` 20 ms apart; 8 left a mixture that read as whole."""
    ran = python("-c", TWO_WRITERS)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 25
    assert set(lines) <= {f"[0, {code}] True ['e.safetensors']" for code in (0, 3)}, lines


@contextmanager
def png(path: Path) -> Iterator[None]:
    with PngWriter(path, 8.0) as writer:
        writer.write(FRAMES)
        yield


@contextmanager
def mp4(path: Path) -> Iterator[None]:
    with Mp4Writer(path, 8.0) as writer:
        writer.write(FRAMES)
        yield


@contextmanager
def raw(path: Path) -> Iterator[None]:
    with RawWriter(path, 8.0) as writer:
        writer.write(FRAMES)
        yield


@contextmanager
def text(path: Path) -> Iterator[None]:
    with new_file(path) as partial:
        partial.write_text("x")
        yield


@contextmanager
def tensors(path: Path) -> Iterator[None]:
    with new_tensors(path, {"a": ("F32", (2,))}) as writer:
        yield
        writer.write("a", np.zeros(2, np.float32))


@contextmanager
def embeds(path: Path) -> Iterator[None]:
    with growing_embeds(path, ["a"], ["a"], [1], [(1, 2)], {}) as growing:
        yield
        growing.write(np.zeros((1, 2), np.float32))


@contextmanager
def states(path: Path) -> Iterator[None]:
    with held_inside(path, "saving"):
        yield


@contextmanager
def analysis(path: Path) -> Iterator[None]:
    with analyzed_alone(path):
        yield


def second(writer: Callable[[Path], AbstractContextManager[None]]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with writer(path):
            pass

    return write


WRITERS: dict[str, tuple[Callable[[Path], AbstractContextManager[None]], list[Callable[[Path], object]]]] = {
    "text": (text, [lambda path: write_text(path, "y"), check_file, second(tensors)]),
    "tensors": (tensors, [second(tensors), check_file]),
    "embeds": (embeds, [second(embeds), check_place, second(text)]),
    "states": (states, [check_states]),
    "analysis": (analysis, [second(analysis)]),
    "frames": (png, [second(png), lambda path: open_writer(path, fps=8)]),
    "a.mp4": (mp4, [second(mp4), lambda path: open_writer(path, fps=8)]),
    "a.rgb": (raw, [second(raw), lambda path: open_writer(path, fps=8)]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_writer_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """The first is slow: it waits inside a write, as on a disk that does not answer."""
    writer, refused = WRITERS[name]
    path = tmp_path / name
    going, may_end = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def first() -> None:
        try:
            with writer(path):
                going.set()
                assert may_end.wait(30)
        except BaseException as error:
            failed.append(error)
            going.set()

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert going.wait(30)
        for write in refused:
            began = time.monotonic()
            with pytest.raises(InputError, match=f"{name} is being written by another process"):
                write(path)
            assert time.monotonic() - began < 2
    finally:
        may_end.set()
        thread.join()
    assert failed == []
    for write in refused:
        write(path)
    assert small.hidden(tmp_path) == []


def test_samples_of_one_folder_have_writers_of_their_own(tmp_path: Path) -> None:
    """Workers record different samples into one folder, and each its own file."""
    storage = Storage(tmp_path)
    with new_file(Path(storage.path(1))) as first:
        write_bytes(Path(storage.path(2)), b"two")
        with pytest.raises(InputError, match=r"sample-0001\.parquet is being written"):
            write_bytes(Path(storage.path(1)), b"other")
        first.write_bytes(b"one")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "sample-0001.parquet": b"one",
        "sample-0002.parquet": b"two",
    }


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """CASES.md 26: temporary names by their pattern, of the same place alone; another's look alike."""
    others = [
        *(
            ".a.json.0123abcd.new.forcingkv.txt",
            ".b.json.0123abcd.new.forcingkv",
            ".a.json.xyz.new.forcingkv",
        ),
        *("a.json.0123abcd.new.forcingkv", ".a.json.partial", ".a.json.lock"),
    ]
    for name in (*others, ".a.json.0123abcd.new.forcingkv", ".a.json.lock.forcingkv"):
        (tmp_path / name).write_text("left")
    write_text(tmp_path / "a.json", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.json"])


def test_locks_that_killed_writers_left_go_though_their_files_are_not_written_again(tmp_path: Path) -> None:
    """Killed between the new name and the end of the lock: the sample is whole, so no run writes it again."""
    storage = Storage(tmp_path)
    for name in ("sample-0001.parquet", "versions.json"):
        lock_of(tmp_path, name).write_text("")
    (tmp_path / ".sample-0001.parquet.0123abcd.new.forcingkv").write_text("half")
    (tmp_path / ".other.json.lock.forcingkv").write_text("")
    with new_file(Path(storage.path(2))) as partial:  # another worker, alive
        storage.remove_leftovers()
        assert {lock_of(tmp_path, "sample-0002.parquet"), partial} <= set(tmp_path.iterdir())
    assert sorted(os.listdir(tmp_path)) == [".other.json.lock.forcingkv", "sample-0002.parquet"]


def test_a_save_removes_the_locks_of_states_whose_saving_was_killed(tmp_path: Path) -> None:
    lock_of(tmp_path, "state-000001.safetensors").write_text("")
    with held_inside(tmp_path, "saving", "state-"):
        assert os.listdir(tmp_path) == [lock_of(tmp_path, "saving").name]


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    lock = lock_of(tmp_path, "a")
    lock.write_text("")
    with held(lock, tmp_path / "a") as real:
        assert real
    assert os.listdir(tmp_path) == []


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    lock_of(tmp_path, "a").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="a cannot be written"):
        write_text(tmp_path / "a", "x")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["a" * 250, "é" * 120, "a" * 255])
def test_names_that_leave_no_room_for_more(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]
    small.write(tmp_path / "folders" / name, "old")
    small.write(tmp_path / "folders" / name, "new")
    assert (small.seen(tmp_path / "folders" / name), small.hidden(tmp_path)) == ("new", [])


def test_a_read_only_file_and_folder_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user that is not root, whom mode bits do not stop."""
    real = os.access
    closed = {str(tmp_path / "closed.json"), str(tmp_path / "closed")}
    monkeypatch.setattr(writing.os, "access", lambda path, mode: str(path) not in closed and real(path, mode))
    (tmp_path / "closed.json").write_text("old")
    small.write(tmp_path / "closed" / "b", "old")
    for refused in (
        lambda: check_file(tmp_path / "closed.json"),
        lambda: write_text(tmp_path / "closed.json", "new"),
    ):
        with pytest.raises(InputError, match=r"closed\.json cannot be written \(Permission denied\)"):
            refused()
    assert (tmp_path / "closed.json").read_text() == "old"
    small.write(tmp_path / "closed" / "b", "new")  # the folder itself can be written: it is done inside
    assert (small.seen(tmp_path / "closed" / "b"), small.hidden(tmp_path)) == ("new", [])


def test_a_name_of_a_file_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "a\0b",
        tmp_path / "file" / "a",
        tmp_path / ("x" * 300),
        tmp_path / ("x" * 300) / "a",
    ):
        for refused in (lambda: check_file(path), lambda: small.write(path, "new")):  # noqa: B023
            with pytest.raises(
                InputError, match=r"is no name of a file|cannot be written \((Not a dir|File name)"
            ):
                refused()
    with pytest.raises(InputError, match="file is a file; expected the name of a folder"):
        small.write(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == ["file"]
