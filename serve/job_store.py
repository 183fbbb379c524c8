"""Jobs that outlive the process: a table of SQLite, and a file for each video."""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.locks import BusyError, take

Status = Literal["queued", "in_progress", "completed", "failed"]
SCHEMA = 1
"""Of the table: `PRAGMA user_version`. A folder of another one is refused."""
INTERRUPTED = "The service was stopped before the video was finished: ask for it again."


@dataclass(frozen=True)
class Job:
    """A video that was asked for over HTTP."""

    id: str
    client: str
    bundle: str
    prompt: str
    seed: int
    chunks: int
    seconds: str
    """As it was asked for."""
    size: str
    status: Status = "queued"
    made: int = 0
    """Chunks."""
    created: int = 0
    """Unix seconds, as the next."""
    completed: int | None = None
    code: str | None = None
    """Of a failure."""
    message: str | None = None
    owner: str = ""
    """The process that makes it, or will."""

    @property
    def progress(self) -> int:
        """In hundredths. 100 only where the video is there."""
        if self.status == "completed":
            return 100
        return min(99, 100 * self.made // max(self.chunks, 1))

    @property
    def over(self) -> bool:
        return self.status in ("completed", "failed")


ALONE = "alone"
"""The name of a process that shares its folder with no other."""
COLUMNS = tuple(field.name for field in fields(Job))


class JobStore:
    """Jobs in `jobs.sqlite` of a folder, and their videos in `videos/`. Of any thread, one at a time.

    Several processes may have one folder. Each job belongs to one of them, whose life is a lock that it
    holds: what a dead one left is taken over by any other.

    Args:
        folder: the service's.
        kept: jobs at most: the oldest that are over go first.
        shared: whether other processes have the folder too. Else the one that is there is alone.

    Raises InputError where the file is no such table, where another service has the folder, and for a shared
    folder whose file system has no locks.
    """

    def __init__(self, folder: Path, kept: int, *, shared: bool = False) -> None:
        self._videos, self._kept, self._turn = folder / "videos", kept, Lock()
        self._lives = folder / "processes"
        try:
            for place in (self._videos, self._lives):
                place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot be made ({error.strerror})"
            raise InputError(what, where=str(folder), expected="a folder that may be written") from error
        self._owner = secrets.token_hex(8) if shared else ALONE
        self._life: int | None = self._live(folder, shared)
        self._file = folder / "jobs.sqlite"
        self._base = sqlite3.connect(self._file, timeout=30.0, check_same_thread=False, isolation_level=None)
        try:
            self._base.execute("PRAGMA journal_mode=WAL")
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA):
                raise InputError(
                    f"has tables of version {version}", where=str(self._file), expected=str(SCHEMA)
                )
            self._base.execute(f"CREATE TABLE IF NOT EXISTS jobs ({', '.join(COLUMNS)}, PRIMARY KEY (id))")
            self._base.execute(f"PRAGMA user_version={SCHEMA}")
        except sqlite3.DatabaseError as error:
            self.close()
            raise InputError(f"is no table of jobs ({error})", where=str(self._file)) from error
        except InputError:
            self.close()
            raise
        if not shared:  # what is there is of a process that ended
            self._change_all("owner='ended'", "status IN ('queued', 'in_progress')")
        self.take_over()
        self._remove_leftovers()

    def _live(self, folder: Path, shared: bool) -> int:
        """Hold the lock that says that this process lives; its file's number."""
        place = self._lives / self._owner
        number = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not take(number, folder) and shared:
                what = "is on a file system without locks, by which replicas know who of them lives"
                raise InputError(what, where=str(folder), expected="one with locks, or one replica")
        except BusyError as error:
            os.close(number)
            hint = "Stop it, or choose another --data."
            raise InputError("is another service's", where=str(folder), hint=hint) from error
        except BaseException:
            os.close(number)
            raise
        return number

    def _is_dead(self, owner: str) -> bool:
        """Whether the process of that name has ended."""
        try:
            number = os.open(self._lives / owner, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            take(number, self._lives)
        except BusyError:
            return False
        finally:
            os.close(number)
        return True

    def take_over(self) -> list[Job]:
        """Take over the jobs of processes that ended: those at work are said to be interrupted.

        Returns all jobs of this process that wait.
        """
        with self._turn, closing(self._base.cursor()) as cursor:
            unfinished = "status IN ('queued', 'in_progress')"
            rows = cursor.execute(f"SELECT DISTINCT owner FROM jobs WHERE {unfinished}").fetchall()
        for (owner,) in rows:
            if owner != self._owner and self._is_dead(owner):
                said = "status='failed', code='interrupted', message=?, completed=?"
                self._change_all(
                    said, "status='in_progress' AND owner=?", INTERRUPTED, int(time.time()), owner
                )
                self._change_all("owner=?", "status='queued' AND owner=?", self._owner, owner)
        return [job for job in self.all() if job.status == "queued" and job.owner == self._owner]

    def _change_all(self, values: str, which: str, *parameters: object) -> None:
        with self._turn:
            self._base.execute(f"UPDATE jobs SET {values} WHERE {which}", parameters)

    def _remove_leftovers(self) -> None:
        """Remove files that belong to no video, and to none that is being made."""
        there = list(self._videos.iterdir())  # before the jobs: one that comes now has its row
        jobs = {job.id: job for job in self.all()}
        for path in there:
            job = jobs.get(path.name.split(".")[0])
            at_work = job is not None and job.status == "in_progress"
            done = job is not None and job.status == "completed" and path == self.video(job.id)
            if not at_work and not done:
                path.unlink(missing_ok=True)
        for life in self._lives.iterdir():
            if life.name != self._owner and self._is_dead(life.name):
                life.unlink(missing_ok=True)

    def add(self, job: Job) -> Job:
        """A new job, with its name and time. Those that are over make room."""
        job = replace(job, id=f"video_{secrets.token_hex(16)}", created=int(time.time()), owner=self._owner)
        with self._turn:
            marks = ", ".join("?" * len(COLUMNS))
            self._base.execute(f"INSERT INTO jobs VALUES ({marks})", [getattr(job, name) for name in COLUMNS])
        old = [one for one in self.all() if one.over]
        for one in old[: max(0, len(self.all()) - self._kept)]:
            self.remove(one.id)
        return job

    def change(self, name: str, **values: Any) -> bool:
        """Other values of a job; False: it was removed meanwhile, and stays away."""
        unknown = values.keys() - set(COLUMNS)
        assert not unknown, unknown
        with self._turn:
            sets = ", ".join(f"{column}=?" for column in values)
            done = self._base.execute(f"UPDATE jobs SET {sets} WHERE id=?", [*values.values(), name])
        return done.rowcount > 0

    def get(self, name: str) -> Job:
        """A job by its name. Raises KeyError."""
        with self._turn, closing(self._base.cursor()) as cursor:
            row = cursor.execute("SELECT * FROM jobs WHERE id=?", [name]).fetchone()
        if row is None:
            raise KeyError(name)
        return Job(*row)

    def all(self) -> list[Job]:
        """All jobs, the oldest first."""
        with self._turn, closing(self._base.cursor()) as cursor:
            return [Job(*row) for row in cursor.execute("SELECT * FROM jobs ORDER BY created, rowid")]

    def remove(self, name: str) -> None:
        """Remove a job and its video."""
        with self._turn:
            self._base.execute("DELETE FROM jobs WHERE id=?", [name])
        self.video(name).unlink(missing_ok=True)

    def video(self, name: str) -> Path:
        """Where the video of a job is once it is completed. The name is one that `add` gave."""
        return self._videos / f"{name}.mp4"

    @contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """Where the video of a job grows; gone when the block ends, unless it was given its own name."""
        path = self._videos / f"{name}.part.mp4"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the table, and say that this process is no more."""
        with self._turn:
            self._base.close()
            if self._life is not None:
                os.close(self._life)
                self._life = None
