"""Processes that have one folder: which of them live, and what each has lying there for itself."""

from __future__ import annotations

import secrets
import shutil
from contextlib import ExitStack
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.locks import BusyError, held, is_held

ALONE = "alone"
"""The name of a process that shares its folder with no other."""


class Life:
    """A process of the service, as those see it that have the same folder.

    It is a lock, which the system lets go of however the process ends.

    Args:
        folder: the service's.
        shared: whether other processes have the folder too. Else the one that is there is alone.

    Attributes:
        name: of this process.
        scratch: a folder for files that mean nothing without it: they go with it, or once it is found dead.

    Raises InputError where the folder cannot be written, where another service has it, and for a shared
    folder whose file system has no locks.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.name = secrets.token_hex(8) if shared else ALONE
        self._locks, scratches = folder / "processes", folder / "scratch"
        self.scratch = scratches / self.name
        with ExitStack() as kept:
            try:
                self._locks.mkdir(parents=True, exist_ok=True)
                if not kept.enter_context(held(self._locks / self.name, folder)) and shared:
                    what = "is on a file system without locks, by which replicas know who of them lives"
                    raise InputError(what, where=str(folder), expected="one with locks, or one replica")
                self._remove_what_dead_ones_left(scratches)
                self.scratch.mkdir(parents=True)
            except BusyError as error:
                hint = "Stop it, or choose another --data."
                raise InputError("is another service's", where=str(folder), hint=hint) from error
            except OSError as error:
                what, hint = f"cannot be written ({error.strerror})", "Choose another one: --data."
                expected = "a folder for jobs, their videos, and saved states"
                raise InputError(what, where=str(folder), expected=expected, hint=hint) from error
            kept.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            self._kept = kept.pop_all()

    def is_dead(self, name: str) -> bool:
        """Whether the process of that name has ended."""
        return name != self.name and not is_held(self._locks / name)

    def _remove_what_dead_ones_left(self, scratches: Path) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)  # of one of the same name
        for place in list(scratches.iterdir()) if scratches.is_dir() else ():
            if self.is_dead(place.name):
                shutil.rmtree(place, ignore_errors=True)
        for lock in list(self._locks.iterdir()):
            if self.is_dead(lock.name):
                lock.unlink(missing_ok=True)

    def close(self) -> None:
        """This process is no more."""
        self._kept.close()
