"""The folder of a service: its jobs, whose they are, and what is left there."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forcingkv.headmaps import locks
from forcingkv.headmaps.errors import InputError
from forcingkv.serve.job_store import Job, JobStore
from forcingkv.serve.lives import Life
from forcingkv.serve.refusals import RefusalError, refusal_of
from forcingkv.serve.states import States
from tests.serve.served import PROMPT


@contextmanager
def opened(folder: Path, kept: int = 10, *, shared: bool = False) -> Iterator[JobStore]:
    """The jobs of a folder, of a process of their own."""
    life = Life(folder, shared=shared)
    try:
        store = JobStore(folder, kept, life)
        try:
            yield store
        finally:
            store.close()
    finally:
        life.close()


def a_job() -> Job:
    return Job("", "a", "window", PROMPT, 0, 4, "1", "12x8")


def test_old_jobs_make_room(tmp_path: Path) -> None:
    with opened(tmp_path, kept=3) as store:
        jobs = [store.add(a_job()) for _ in range(2)]
        for job in jobs:
            store.video(job.id).write_bytes(b"video")
            store.change(job.id, status="completed")
        more = [store.add(a_job()) for _ in range(2)]
        assert [job.id for job in store.all()] == [jobs[1].id, *(job.id for job in more)]
        assert not store.video(jobs[0].id).exists()


@pytest.mark.parametrize("content", [b"no table", b""], ids=["another file", "an empty file"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(content)
    if content:
        with pytest.raises(InputError, match="is no table of jobs"), opened(tmp_path):
            pass
    else:
        with opened(tmp_path) as store:
            assert not store.all()


def test_a_table_of_another_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as base:
        base.execute("PRAGMA user_version=7")
    base.close()
    with pytest.raises(InputError, match="has tables of version 7; expected 1"), opened(tmp_path):
        pass
    assert not any((tmp_path / "processes").iterdir()), "who was refused holds nothing"


@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("", False, "cannot be written"),
        ("processes", False, "cannot be written"),
        ("scratch", False, "cannot be written"),
        ("videos", False, "cannot be made"),
        ("jobs.sqlite", True, "cannot be used"),
    ],
)
def test_what_stands_in_the_way_is_said(tmp_path: Path, name: str, folder: bool, said: str) -> None:
    place = tmp_path / "data" / name
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if folder else place.write_text("mine")
    with pytest.raises(InputError, match=said), opened(tmp_path / "data"):
        pass
    assert folder or place.read_text() == "mine"


def test_a_second_service_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        opened(tmp_path) as first,
        pytest.raises(InputError, match="is another service's"),
        opened(tmp_path),
    ):
        pass
    with pytest.raises(sqlite3.ProgrammingError):
        first.all()
    with opened(tmp_path) as again:
        assert not again.all()


def test_what_a_replica_leaves_is_taken_over_by_another(tmp_path: Path) -> None:
    """Those that live keep theirs; of one that died the job at work is said to be interrupted."""
    with opened(tmp_path, shared=True) as two, opened(tmp_path, shared=True) as three:
        with opened(tmp_path, shared=True) as one:
            working, waiting, mine = one.add(a_job()), one.add(a_job()), two.add(a_job())
            one.change(working.id, status="in_progress")
            with one.unfinished(working.id) as grows:
                grows.write_bytes(b"half a video")
                assert two.take_over() == [two.get(mine.id)]
                with opened(tmp_path, shared=True):
                    assert grows.exists(), "another that begins leaves it alone"
        assert {job.id for job in three.take_over()} == {waiting.id}
        assert three.take_over() == [three.get(waiting.id)]
        assert two.take_over() == [two.get(mine.id)]
        cut = two.get(working.id)
        assert (cut.status, cut.code) == ("failed", "interrupted")


@pytest.mark.parametrize("readable", [True, False])
def test_a_process_of_another_user_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """Its lock cannot be opened to be written, and perhaps not at all."""
    real = os.open

    def opens(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_RDWR or not readable:
            raise PermissionError(errno.EACCES, "another user's")
        return real(path, flags, *more)

    with opened(tmp_path, shared=True) as one, opened(tmp_path, shared=True) as two:
        monkeypatch.setattr(locks.os, "open", opens)
        assert not two.life.is_dead(one.life.name)
        if readable:
            lock = tmp_path / "processes" / "0123"
            lock.touch()
            assert two.life.is_dead(lock.name), "nobody holds it"
        monkeypatch.undo()


def test_a_job_that_another_replica_removed_is_not_made(tmp_path: Path) -> None:
    with opened(tmp_path, shared=True) as one, opened(tmp_path, shared=True) as two:
        job = one.add(a_job())
        two.remove(job.id)
        assert not one.change(job.id, status="in_progress")


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "among others"])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, shared: bool) -> None:
    """Half a video, a sleeping session, a client's picture: nobody can use them any more."""
    dead = tmp_path / "scratch" / ("0" * 16 if shared else "alone") / "0123" / "state"
    dead.mkdir(parents=True)
    (dead / "tensors").write_bytes(b"of a session that slept")
    with opened(tmp_path, shared=shared) as lives:
        mine = tmp_path / "scratch" / lives.life.name / "mine"
        mine.write_text("kept")
        with opened(tmp_path, shared=True) if shared else pytest.raises(InputError), opened(tmp_path):
            pass
        assert mine.read_text() == "kept"
        assert not dead.exists()
    assert not any((tmp_path / "scratch").iterdir())
    assert not any((tmp_path / "processes").iterdir())


def test_a_state_is_found_only_once_it_is_whole(tmp_path: Path) -> None:
    """A process that is killed while it saves leaves none that could be begun with."""
    states = States(tmp_path / "states", tmp_path / "scratch", kept=2)
    state = states.new("window")
    state.folder.mkdir(parents=True)
    with pytest.raises(RefusalError, match="no such state"):
        states.find(state.name)
    states.keep(state)
    found = states.find(state.name)
    assert (found.bundle, found.folder.is_dir()) == ("window", True)
    for _ in range(2):
        more = states.new("window")
        more.folder.mkdir(parents=True)
        states.keep(more)
    with pytest.raises(RefusalError, match="made room for others"):
        states.find(state.name)


def test_a_full_disk_is_not_the_clients_fault(tmp_path: Path) -> None:
    """SQLite says it in its way: here of a table that may not grow."""
    with opened(tmp_path) as store:
        (pages,) = store._base.execute("PRAGMA page_count").fetchone()
        store._base.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(sqlite3.OperationalError) as full:
            store.add(Job("", "a", "window", PROMPT * 20_000, 0, 4, "1", "12x8"))
        refusal = refusal_of(full.value)
        assert (refusal.code, refusal.status, refusal.is_the_clients) == ("full", 507, False)
