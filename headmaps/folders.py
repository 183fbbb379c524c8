"""Writing folders whole or not at all, in the place of an earlier result (docs/decisions/0025).

A folder is built beside its place (TOKEN.new), has its name changed when it is whole (TOKEN.ready), and is
swapped with what is there in one step. Where the system cannot do that, what is there is set aside first
(TOKEN.old). Where the place itself cannot be renamed, as a mount point, it is built inside, and the files are
moved one by one: the file that makes the folder a result goes first and comes last, so that nobody takes a
mixture for one.

What a process that was killed left is settled by the next that writes there: `_settle` brings each of these
states to the old or the new folder, whole, and removes the rest. Files that are no part of an earlier result
are never removed: they are moved to where the new one is.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.locks import held, held_folder
from forcingkv.headmaps.renames import can_be_renamed, exchange, sync_folder, sync_tree
from forcingkv.headmaps.writing import (
    NEW,
    is_ours,
    left,
    lock_of,
    nearest,
    new_token,
    parents_of,
    refuse_name,
    temporary,
    try_folder,
    unwritable,
    unwritable_where,
)

READY, OLD = "ready", "old"
INSIDE = "result"
"""What temporary names inside a folder are made of: a mounted folder has another name in each container."""
_NOT_FOLDERS = (errno.EXDEV, errno.EBUSY)
"""What a system says that cannot rename a folder: one that is mounted, or in a lower layer of a container."""


@dataclass(frozen=True)
class Kind:
    """A kind of result that is a folder.

    Attributes:
        mark: the file that makes a folder such a result.
        files: gives the names of all files of the result in a folder, `mark` among them. Raises InputError
            where the folder holds none.
    """

    mark: str
    files: Callable[[Path], Collection[str]]


@dataclass(frozen=True)
class Room:
    """Where a folder is built: beside its place, or inside it."""

    path: Path
    kind: Kind
    inside: bool

    @classmethod
    def of(cls, path: Path, kind: Kind) -> Room:
        """The room for a place: inside where the folder that is there cannot be renamed."""
        return cls(path, kind, path.is_dir() and not can_be_renamed(path))

    @property
    def folder(self) -> Path:
        """The folder that temporary names are in."""
        return self.path if self.inside else self.path.parent

    @property
    def name(self) -> str:
        """What temporary names are made of."""
        return INSIDE if self.inside else self.path.name

    def at(self, token: str, state: str) -> Path:
        """The temporary name of a state."""
        return temporary(self.folder, self.name, token, state)


@contextmanager
def new_folder(path: Path, kind: Kind, names: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    A folder that is there is replaced only then, and only if it is empty or holds an earlier result of that
    kind: the files of that go, and all others stay (`check_folder` gives them).

    Args:
        path: the folder.
        kind: what is recognised as an earlier result.
        names: files and folders that the new one may have at its top.

    Raises InputError where the folder holds something else, cannot be written, as errors of the system in the
    block are taken to say, or another writer is at it.
    """
    path = _resolved(path)
    room = Room.of(path, kind)
    with (
        unwritable_where(path, within=path),
        parents_of(room.folder / room.name),
        held(lock_of(room.folder, room.name), path) as real,
        held_folder(path),
    ):
        if real:
            _settle_all(room)
        _refuse_collisions(path, set(_kept(path, kind)) & set(names))
        token = new_token()
        try:
            room.at(token, NEW).mkdir()
            yield room.at(token, NEW)
            _swap(room, token)
        finally:
            if not room.inside and path.is_dir():
                _settle(Room(path, kind, inside=True), token)
            _settle(room, token)


def check_folder(path: Path, kind: Kind, names: Collection[str] = ()) -> list[str]:
    """What `new_folder` would keep of the folder that is there: what is no part of an earlier result.

    For before long work: raises InputError unless `new_folder` can write there now. Nothing is left of the
    trial.
    """
    path = _resolved(path)
    room = Room.of(path, kind)
    with unwritable_where(path, within=path):
        if room.folder.is_dir():
            with held(lock_of(room.folder, room.name), path), held_folder(path):
                pass
        else:
            try_folder(nearest(room.folder))
        kept = _kept(path, kind)
    _refuse_collisions(path, set(kept) & set(names))
    return kept


def built_in(path: Path) -> Path:
    """A folder that is there, on the disk that a new folder `path` is built on."""
    path = _resolved(path)
    return path if path.is_dir() and not can_be_renamed(path) else nearest(path)


def interrupted(path: Path, kind: Kind) -> list[Path]:
    """What a process left when it was killed while it replaced the result at `path`.

    Results that are whole come first; there may be none, where the files were being moved one by one.
    """
    path = Path(os.path.realpath(path))
    found = []
    for folder, name in ((path, INSIDE), (path.parent, path.name)):
        with suppress(OSError):
            found += [one for state in (READY, OLD) for _, one in left(folder, name, state)]
    return sorted(found, key=lambda one: not is_whole(one, kind))


def is_whole(folder: Path, kind: Kind) -> bool:
    """Whether a folder has all files of a result."""
    with suppress(InputError):
        return all((folder / name).is_file() for name in kind.files(folder))
    return False


def _resolved(path: Path) -> Path:
    """The folder that is meant. Raises InputError for a name that no folder can have here."""
    refuse_name(path)
    path = Path(os.path.realpath(path))
    with unwritable_where(path):
        if os.path.lexists(path) and not path.is_dir():
            raise InputError("is a file", where=str(path), expected="the name of a folder")
    if path == path.parent:
        raise InputError("is the root of all folders", where=str(path), expected="a folder of its own")
    return path


def _kept(path: Path, kind: Kind) -> list[str]:
    """What is in a folder beside an earlier result. Raises InputError where it holds none, but others."""
    if not path.is_dir():
        return []
    if not os.access(path, os.W_OK | os.X_OK | os.R_OK):
        raise unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if not _entries(path):
        return []
    try:
        files = kind.files(path)
    except InputError as error:
        raise InputError(
            f"holds other files than an earlier result ({error.what})",
            where=str(path),
            hint="Choose a new or empty folder: this one would be replaced.",
        ) from error
    return _others(path, files)


def _entries(path: Path) -> list[str]:
    """What people see in a folder; every disk of ext4 has a lost+found at its top."""
    return [name for name in sorted(os.listdir(path)) if not is_ours(name) and name != "lost+found"]


def _others(path: Path, files: Collection[str]) -> list[str]:
    """What is in a folder beside those files: folders without any of them as a whole."""
    above = {parent.as_posix() for name in files for parent in Path(name).parents}
    found, folders = [], [""]
    while folders:
        at = folders.pop()
        for name in _entries(path / at) if not at else sorted(os.listdir(path / at)):
            entry = f"{at}/{name}" if at else name
            if entry in above and (path / entry).is_dir() and not (path / entry).is_symlink():
                folders.append(entry)
            elif entry not in files:
                found.append(entry)
    return sorted(found)


def _refuse_collisions(path: Path, names: Collection[str]) -> None:
    if names:
        what = f"holds {', '.join(sorted(names)[:5])}, which is no part of the earlier result"
        hint = "It would be replaced: move it away, or choose another folder."
        raise InputError(what, where=str(path), hint=hint)


def _swap(room: Room, token: str) -> None:
    """Put the folder that was built in its place."""
    path, new, ready = room.path, room.at(token, NEW), room.at(token, READY)
    sync_tree(new)
    _refuse_collisions(path, [name for name in _kept(path, room.kind) if _is_taken(new, name)])
    if path.is_dir() and not room.inside:
        shutil.copymode(path, new)
    os.rename(new, ready)
    sync_folder(room.folder)
    if room.inside:
        _begin_contents(room, token)
        _finish_contents(room, token)
        return
    try:
        if not os.path.lexists(path):
            os.rename(ready, path)
        elif not exchange(ready, path):
            os.rename(path, room.at(token, OLD))
            os.rename(ready, path)
    except OSError as error:
        if error.errno not in _NOT_FOLDERS or not path.is_dir():
            raise
        within = Room(path, room.kind, inside=True)  # here files can be renamed, if not folders
        os.rename(ready, within.at(token, READY))
        _begin_contents(within, token)
        _finish_contents(within, token)
    sync_folder(room.folder)


def _is_taken(new: Path, name: str) -> bool:
    """Whether a folder has a file of that name, or one in the place of a folder that it would be in."""
    above = [new / parent for parent in Path(name).parents]
    return os.path.lexists(new / name) or any(os.path.lexists(one) and not one.is_dir() for one in above)


def _settle_all(room: Room) -> None:
    """Settle what killed processes left: the lock is held, so they are gone."""
    if room.path.is_dir():
        _settle_tokens(Room(room.path, room.kind, inside=True))
    if not room.inside:
        with suppress(InputError):  # what is there now is nothing of ours: it is refused next
            _kept(room.path, room.kind)
            _settle_tokens(room)


def _settle_tokens(room: Room) -> None:
    for token in sorted({token for token, _ in left(room.folder, room.name, NEW, READY, OLD)}):
        _settle(room, token)


def _settle(room: Room, token: str) -> None:
    """Bring what is left of a token to an end, from whatever state: nothing of those names stays."""
    new, ready, old = (room.at(token, state) for state in (NEW, READY, OLD))
    _remove(new)
    if room.inside:
        if old.is_dir() or (ready / room.kind.mark).is_file():
            _settle_contents(room, token)
        _discard(ready, room)
        return
    if not os.path.lexists(room.path):
        for whole in (ready, old):
            if whole.is_dir():
                os.rename(whole, room.path)
                sync_folder(room.folder)
                break
    for gone in (ready, old):
        if gone.is_dir():
            _move_others(gone, room)
            _discard(gone, room)
    sync_folder(room.folder)


def _move_others(gone: Path, room: Room) -> None:
    """Move what is no part of a result out of a folder that goes, to where the new one is."""
    if not _entries(gone):
        return
    for name in _others(gone, room.kind.files(gone)):
        target = room.path / name
        if os.path.lexists(target):
            raise InputError(
                f"is there, and in {gone} too, where it was when a writer was stopped",
                where=str(target),
                hint="Keep one of them: move the other away.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(gone / name, target)
    sync_folder(room.path)


def _discard(gone: Path, room: Room) -> None:
    """Remove a folder, which first gets a name of those that nobody takes for whole."""
    if gone.is_dir():
        junk = room.at(new_token(), NEW)
        os.rename(gone, junk)
        _remove(junk)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # the result stands; the next writer tries again


def _begin_contents(room: Room, token: str) -> None:
    """From now on the folder is the new one's."""
    room.at(token, OLD).mkdir()
    sync_folder(room.path)


def _settle_contents(room: Room, token: str) -> None:
    """Finish a swap inside a folder that had begun; drop the new folder of one that had not."""
    path, mark = room.path, room.kind.mark
    ready, old = room.at(token, READY), room.at(token, OLD)
    if (ready / mark).is_file() and not old.is_dir() and (path / mark).is_file():
        return
    if (ready / mark).is_file():
        old.mkdir(exist_ok=True)
        _finish_contents(room, token)
    else:
        _discard(old, room)


def _finish_contents(room: Room, token: str) -> None:
    """Move the old result out and the new one in, from wherever that was left."""
    path, mark = room.path, room.kind.mark
    ready, old = room.at(token, READY), room.at(token, OLD)
    names = {*room.kind.files(ready), *_files(ready)}
    if os.path.lexists(path / mark) and not os.path.lexists(old / mark):
        room.kind.files(path)  # it is one of ours, or this raises
        os.rename(path / mark, old / mark)
        sync_folder(path)
        sync_folder(old)
    if os.path.lexists(old / mark):
        for name in sorted(set(room.kind.files(old)) - {mark}):
            # What the new one has, and what is gone from where it was made, was moved in already.
            if os.path.lexists(path / name) and (name not in names or os.path.lexists(ready / name)):
                _move(path / name, old / name)
                _remove_empty((path / name).parent, path)
    for name in sorted(set(names) - {mark}):
        if os.path.lexists(ready / name):
            _move(ready / name, path / name)
    sync_folder(path)
    os.rename(ready / mark, path / mark)
    sync_folder(path)
    for gone in (old, ready):
        _discard(gone, room)


def _files(folder: Path) -> set[str]:
    """All files in a folder, by their names from there."""
    return {
        Path(place, name).relative_to(folder).as_posix()
        for place, _, names in os.walk(folder)
        for name in names
    }


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)


def _remove_empty(folder: Path, root: Path) -> None:
    with suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent
