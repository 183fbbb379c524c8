"""Jobs that outlive the process: a table of SQLite, and a file for each video."""

from __future__ import annotations

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

    Args:
        folder: the service's.
        kept: jobs at most: the oldest that are over go first.

    Raises InputError where the file is no such table.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self._videos, self._kept, self._turn = folder / "videos", kept, Lock()
        self._videos.mkdir(parents=True, exist_ok=True)
        self._file = folder / "jobs.sqlite"
        self._base = sqlite3.connect(self._file, check_same_thread=False, isolation_level=None)
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
            self._base.close()
            raise InputError(f"is no table of jobs ({error})", where=str(self._file)) from error
        except InputError:
            self._base.close()
            raise
        self._interrupted()

    def _interrupted(self) -> None:
        """Say of jobs that were at work when the process ended that they are not finished."""
        with self._turn:
            self._base.execute(
                "UPDATE jobs SET status='failed', code='interrupted', message=?, completed=?"
                " WHERE status='in_progress'",
                (INTERRUPTED, int(time.time())),
            )
        known = {job.id for job in self.all()}
        for path in self._videos.iterdir():
            if path.stem not in known or self.get(path.stem).status != "completed":
                path.unlink()

    def add(self, job: Job) -> Job:
        """A new job, with its name and time. Those that are over make room."""
        job = replace(job, id=f"video_{secrets.token_hex(16)}", created=int(time.time()))
        with self._turn:
            marks = ", ".join("?" * len(COLUMNS))
            self._base.execute(f"INSERT INTO jobs VALUES ({marks})", [getattr(job, name) for name in COLUMNS])
        old = [one for one in self.all() if one.over]
        for one in old[: max(0, len(self.all()) - self._kept)]:
            self.remove(one.id)
        return job

    def change(self, name: str, **values: Any) -> None:
        """Other values of a job. One that was removed meanwhile stays away."""
        unknown = values.keys() - set(COLUMNS)
        assert not unknown, unknown
        with self._turn:
            sets = ", ".join(f"{column}=?" for column in values)
            self._base.execute(f"UPDATE jobs SET {sets} WHERE id=?", [*values.values(), name])

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
        with self._turn:
            self._base.close()
