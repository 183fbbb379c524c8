"""Writing files whole or not at all (docs/decisions/0025); `folders` does the same for folders.

A file is written under a temporary name beside its place that no other has, and renamed once the disk holds
it. Meanwhile its lock (`locks`) is held: a second writer is refused at once, and so temporary names that are
found when the lock is taken are of processes that were killed, and are removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.locks import held, take
from forcingkv.headmaps.renames import can_be_renamed, is_mount_point, sync_file, sync_folder

OURS = ".forcingkv"
"""What the names of temporary files and locks end in, which begin with a dot."""
NEW = "new"
"""Kind of a temporary name: what is still being written."""
_LONGEST = 180
"""Bytes of a name that a temporary name repeats."""
_IN_USE = 32
"""What Windows says of a file that is open: ERROR_SHARING_VIOLATION."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def unwritable(path: Path, error: OSError) -> InputError:
    """The error for an output that cannot be written."""
    hint = "Choose a place that you may write to."
    if error.errno in NO_ROOM:
        hint = "Make room there, or choose another disk."
    if getattr(error, "winerror", None) == _IN_USE:
        hint = "Close the program that has it open."
    return InputError(f"cannot be written ({error.strerror or error})", where=str(path), hint=hint)


@contextmanager
def unwritable_where(path: Path, within: Path | None = None) -> Iterator[None]:
    """Errors of the system in the block become the one that says that `path` cannot be written.

    One that names a file which is neither on the way there, nor temporary, nor in the folder `within`, is of
    something that is read, and stays what it is.
    """
    try:
        yield
    except OSError as error:
        named = error.filename
        if isinstance(named, str | bytes):
            file, place = (Path(os.path.abspath(os.fsdecode(name))) for name in (named, path))
            on_the_way = place.is_relative_to(file) or _is_temporary(file)
            if not on_the_way and not (within and file.is_relative_to(os.path.abspath(within))):
                raise
        raise unwritable(path, error) from error
    except InputError as error:  # of a file in a folder that is being built, whose name nobody knows
        cause = error.__cause__
        if isinstance(cause, OSError) and _is_temporary(error.where or "") and not _is_temporary(path):
            raise unwritable(path, cause) from error
        raise


def _is_temporary(path: Path | str) -> bool:
    return any(part.endswith(OURS) for part in Path(path).parts)


def refuse_url(path: Path | str) -> None:
    """Raise InputError for what was a URL: as the name of a file it would be a folder `s3:` here."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        hint = "Write it to a folder, and copy that; statistics of an analysis may lie at a URL: --stats."
        raise InputError("is a URL", where=str(path), expected="a file or folder here", hint=hint)


def refuse_name(path: Path) -> None:
    """Raise InputError for a name that no file can have, or of which the system does not let us look."""
    refuse_url(path)
    if "\0" in str(path):
        raise InputError("is no name of a file (it has U+0000)", where=repr(str(path)))
    there = nearest(path)
    if not there.is_dir():
        raise unwritable(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    for part in path.parts[len(there.parts) :]:
        with unwritable_where(path), suppress(FileNotFoundError, NotADirectoryError):
            (there / part).lstat()


def place_to_write(path: Path) -> Path:
    """The file that is written by a name: that itself or, of a link, what it leads to.

    Raises InputError where no file can be: a folder, a pipe or a device would be replaced by the file.
    """
    refuse_name(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        raise unwritable(path, error) from error
    is_folder = path.name in ("", "..") or stat.S_ISDIR(mode)
    if is_folder or not stat.S_ISREG(mode):
        kind = "a folder" if is_folder else "a pipe or a device"
        raise InputError(f"is {kind}", where=str(path), expected="the name of a file to write")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def nearest(path: Path) -> Path:
    """The nearest of the folders above a place that is there; what is made comes onto its disk."""
    return next((folder for folder in path.parents if os.path.lexists(folder)), path.parent)


def check_file(path: Path) -> None:
    """Raise InputError unless `new_file` can write there now. For before long work; nothing is left of it."""
    place = _replaceable(path)
    with unwritable_where(path, place):
        if nearest(place) == place.parent:
            with held(lock_of(place.parent, place.name), path):
                pass
        else:
            try_folder(nearest(place))


def try_folder(folder: Path) -> None:
    """Make a file in a folder, and remove it. Raises OSError."""
    with _fresh(folder, "trial"):
        pass


def _replaceable(path: Path) -> Path:
    """The place of a file that may be written, or replaced if it is there. Raises InputError for another."""
    place = place_to_write(path)
    if place.exists():
        if not os.access(place, os.W_OK):
            raise unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        if is_mount_point(place.absolute()):
            hint = "Mount its folder, and write into that."
            raise InputError("is mounted by itself, and cannot be replaced whole", where=str(path), hint=hint)
        if not can_be_renamed(place.absolute()):
            raise unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return place


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block ends well; nothing is left behind when it does not.

    There is an empty file of that name. Makes the folder. Raises InputError where the file cannot be written,
    as errors of the system in the block are taken to say, or another writer is at it.
    """
    place = _replaceable(path)
    with unwritable_where(path, place), parents_of(place), held_alone(place):
        with _fresh(place.parent, place.name) as partial:
            yield partial
            sync_file(partial)
            os.replace(partial, place)
        sync_folder(place.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises InputError where it cannot be written."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file of text whole or not at all, in UTF-8."""
    write_bytes(path, text.encode())


def put(path: Path, content: bytes) -> None:
    """Write one of many files, in a folder that is held: whole or not at all, for the disk to hold later.

    Raises OSError.
    """
    with _fresh(path.parent, path.name) as partial:
        partial.write_bytes(content)
        os.replace(partial, path)


@contextmanager
def held_alone(place: Path) -> Iterator[None]:
    """Hold the lock of a file, and remove what killed processes left of it."""
    with held(lock_of(place.parent, place.name), place) as real:
        if real:
            remove_leftovers(place.parent, place.name)
        yield


@dataclass
class Hold:
    """A folder that is held while files are written into it.

    Attributes:
        was_left: whether a process was killed while it held the folder.
        unfinished: whether the folder is left as if this one had been: set while what is in it is no result.
    """

    was_left: bool
    unfinished: bool = False


@contextmanager
def held_inside(folder: Path, writing: str, *stems: str) -> Iterator[Hold]:
    """Hold a folder that files are written into: a lock in it, named after what is being written.

    Makes the folder, and removes it again if it stays empty. The lock stays where the process is killed, and
    so says that the folder is unfinished. Temporary files of the names `stems` are removed; of a stem that
    ends in -, those of all names that begin with it. Raises OSError, or InputError for another writer.
    """
    with parents_of(folder / writing):
        lock = lock_of(folder, writing)
        hold = Hold(was_left=lock.exists())
        with held(lock, folder, stays=lambda: hold.unfinished) as real:
            if real:
                for stem in stems:
                    remove_leftovers(folder, stem)
                    remove_free_locks(folder, stem)
            yield hold


def open_alone(path: Path, *, anew: bool = True) -> FileIO:
    """Open a file to write it under its own name, for this writer alone; `anew`: without what it holds.

    A pipe or a device has no lock. Makes the folder. Raises OSError, or InputError for another writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR if not anew else os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        if stat.S_ISREG(os.fstat(number).st_mode):
            take(number, path)
            if anew:
                os.ftruncate(number, 0)
        return FileIO(number, "wb" if anew else "r+b")
    except BaseException:
        os.close(number)
        raise


@contextmanager
def parents_of(place: Path) -> Iterator[None]:
    """Make the folders above a place. Those that are empty when the block ends are removed again."""
    absent = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        sync_folder(folder.parent)
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in absent:
                folder.rmdir()


def lock_of(folder: Path, name: str) -> Path:
    """The lock of what is called `name` in a folder."""
    return folder / f".{stem_of(name)}.lock{OURS}"


def temporary(folder: Path, name: str, token: str, kind: str) -> Path:
    """A temporary name in a folder for what is to be called `name` there."""
    return folder / f".{stem_of(name)}.{token}.{kind}{OURS}"


def new_token() -> str:
    """What makes temporary names differ."""
    return secrets.token_hex(4)


def left(folder: Path, name: str, *kinds: str) -> list[tuple[str, Path]]:
    """The temporary names of those kinds that are in a folder for `name`, each with its token.

    If `name` ends in -, those for all that begin with it.
    """
    end = rf"\.([0-9a-f]{{8}})\.({'|'.join(kinds)}){re.escape(OURS)}"
    pattern = re.compile(_start_of(name) + end, re.DOTALL)
    matches = (pattern.fullmatch(entry) for entry in sorted(os.listdir(folder)))
    return [(found[2], folder / found[0]) for found in matches if found]


def _start_of(name: str) -> str:
    """A pattern of what temporary names and locks for `name` begin with; its group is the stem."""
    return rf"\.({re.escape(stem_of(name))}{'[^/]*' if name.endswith('-') else ''})"


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files for `name`, whose writers are gone: its lock is held."""
    for _, file in left(folder, name, NEW):
        with suppress(OSError):
            file.unlink()


def remove_free_locks(folder: Path, name: str) -> None:
    """Remove locks for `name` whose holders were killed, with the temporary files that were left beside them.

    If `name` ends in -, those for all names that begin with it. A living writer's lock stays. Raises nothing.
    """
    pattern = re.compile(_start_of(name) + re.escape(f".lock{OURS}"), re.DOTALL)
    with suppress(OSError):
        for entry in sorted(os.listdir(folder)):
            if found := pattern.fullmatch(entry):
                with suppress(OSError, InputError), held(folder / entry, folder) as real:
                    if real:
                        remove_leftovers(folder, found[1])


def is_ours(name: str) -> bool:
    """Whether a file of that name is a lock or a temporary one."""
    return name.startswith(".") and name.endswith(OURS)


def stem_of(name: str) -> str:
    """What temporary names repeat of a name; of one that is too long for that, its digest."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else hashlib.sha256(encoded).hexdigest()[:32]


@contextmanager
def _fresh(folder: Path, name: str) -> Iterator[Path]:
    """An empty file of a name that no other has; gone at the end, unless it was given another name."""
    while True:
        partial = temporary(folder, name, new_token(), NEW)
        with suppress(FileExistsError):
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            break
    try:
        yield partial
    finally:
        with suppress(OSError):
            partial.unlink()
