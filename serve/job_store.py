"""Jobs that outlive the process: a table of SQLite, and a file for each video."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.serve.lives import ALONE, Life

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


COLUMNS = tuple(field.name for field in fields(Job))


class JobStore:
    """Jobs in `jobs.sqlite` of a folder, and their videos in `videos/`. Of any thread, one at a time.

    Several processes may have one folder. Each job belongs to one of them: what a dead one left is taken over
    by any other.

    Args:
        folder: the service's.
        kept: jobs at most: the oldest that are over go first.
        life: this process among those that have the folder.

    Attributes:
        life: the same.

    Raises InputError where the file is no such table, or cannot be written.
    """

    def __init__(self, folder: Path, kept: int, life: Life) -> None:
        self._videos, self._kept, self.life, self._turn = folder / "videos", kept, life, Lock()
        self._file = folder / "jobs.sqlite"
        try:
            self._videos.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot be made ({error.strerror})"
            raise InputError(
                what, where=str(self._videos), expected="a folder that may be written"
            ) from error
        with ExitStack() as opened:
            try:
                self._base = sqlite3.connect(
                    self._file, timeout=30.0, check_same_thread=False, isolation_level=None
                )
                opened.callback(self._base.close)
                self._open()
            except sqlite3.OperationalError as error:  # the system's fault, not that of its contents
                raise InputError(f"cannot be used ({error})", where=str(self._file)) from error
            except sqlite3.DatabaseError as error:
                raise InputError(f"is no table of jobs ({error})", where=str(self._file)) from error
            opened.pop_all()

    def _open(self) -> None:
        self._base.execute("PRAGMA journal_mode=WAL")
        (version,) = self._base.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA):
            raise InputError(f"has tables of version {version}", where=str(self._file), expected=str(SCHEMA))
        self._base.execute(f"CREATE TABLE IF NOT EXISTS jobs ({', '.join(COLUMNS)}, PRIMARY KEY (id))")
        self._base.execute(f"PRAGMA user_version={SCHEMA}")
        if self.life.name == ALONE:  # what is there is of a process that ended
            self._change_all("owner='ended'", "status IN ('queued', 'in_progress')")
        self.take_over()
        self._remove_leftovers()

    def take_over(self) -> list[Job]:
        """Take over the jobs of processes that ended: those at work are said to be interrupted.

        Returns all jobs of this process that wait.
        """
        with self._turn, closing(self._base.cursor()) as cursor:
            unfinished = "status IN ('queued', 'in_progress')"
            rows = cursor.execute(f"SELECT DISTINCT owner FROM jobs WHERE {unfinished}").fetchall()
        for (owner,) in rows:
            if self.life.is_dead(owner):
                said = "status='failed', code='interrupted', message=?, completed=?"
                self._change_all(
                    said, "status='in_progress' AND owner=?", INTERRUPTED, int(time.time()), owner
                )
                self._change_all("owner=?", "status='queued' AND owner=?", self.life.name, owner)
        return [job for job in self.all() if job.status == "queued" and job.owner == self.life.name]

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

    def add(self, job: Job) -> Job:
        """A new job, with its name and time. Those that are over make room."""
        job = replace(
            job, id=f"video_{secrets.token_hex(16)}", created=int(time.time()), owner=self.life.name
        )
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
        """Where the video of a job grows; gone when the block ends, unless it was moved to its place."""
        path = self.life.scratch / f"{name}.mp4"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the table."""
        with self._turn:
            self._base.close()
