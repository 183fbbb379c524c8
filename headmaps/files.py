"""Files: names that stay inside a folder, digests, reading JSON, and writing that is all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from forcingkv.headmaps.errors import InputError


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    sha256: str
    bytes: int


def inside(folder: Path, name: str) -> Path:
    """The path of a file named relative to a folder. It may be a link to a file in the folder.

    In the cache of a hub (`REPOSITORY/snapshots/REVISION/...`) it may be a link into `REPOSITORY/blobs` too,
    where all files of such a repository lie. No other link is followed (docs/decisions/0023).

    Raises InputError for a name that is absolute, climbs out, or leads anywhere else through a link.
    """
    pure = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        raise InputError(
            f"names the file {name!r}, which is not inside the folder",
            where=str(folder),
            expected="relative names without '..'",
        )
    path = folder / pure
    try:
        root, target = folder.resolve(), path.resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, no text
        raise InputError(
            f"names the file {name[:80]!r}, which no file can be called ({error})", where=str(folder)
        ) from error
    blobs = _blobs_of(root)
    if not target.is_relative_to(root) and (blobs is None or not target.is_relative_to(blobs)):
        raise InputError(
            f"names the file {name!r}, which is not inside the folder: it is a link to {target}",
            where=str(folder),
            expected="a file in the folder" + (f", or a link to one in {blobs}" if blobs else ""),
            hint="Put the file itself in the place of the link, or a hard link to it:"
            f" cp --remove-destination -- {shlex.quote(str(target))} {shlex.quote(str(path))}"
            " (DVC: dvc unprotect; git-annex: git annex unlock).",
        )
    return path


def there(path: Path | str) -> bool:
    """Whether there is such a file or folder: not so for a name that none can have, as one that is too long.

    Raises InputError where the system does not let us look.
    """
    try:
        return bool(str(path)) and Path(path).exists()
    except PermissionError as error:
        raise InputError("cannot be read (Permission denied)", where=str(path)) from error
    except (OSError, ValueError):
        return False


def _blobs_of(root: Path) -> Path | None:
    """Where the files of a hub's repository lie, for a folder in one of its snapshots."""
    for revision in (root, *root.parents):
        if revision.parent.name == "snapshots":
            return revision.parents[1] / "blobs"
    return None


def record_file(path: Path) -> FileRecord:
    """The record of a file as it is."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(digest, path.stat().st_size)


def verify_file(folder: Path, name: str, record: FileRecord) -> Path:
    """The path of a file, once it is known to be what its record says. Raises InputError otherwise."""
    path = inside(folder, name)
    if not path.is_file():
        if path.is_symlink():
            raise InputError(
                f"is missing: it is a link to {path.resolve()}, which is not there",
                where=str(path),
                hint="Fetch the bundle again, or copy its files rather than links to them.",
            )
        raise InputError("is missing", where=str(path), hint="Export the bundle again.")
    size = path.stat().st_size
    if size != record.bytes:
        raise InputError(
            f"has {size} bytes",
            where=str(path),
            expected=f"{record.bytes}, as its manifest says",
            hint="The file was changed or cut short: export or copy the bundle again.",
        )
    found = record_file(path).sha256
    if found != record.sha256:
        raise InputError(
            f"has the digest {found[:12]}...",
            where=str(path),
            expected=f"{record.sha256[:12]}..., as its manifest says",
            hint="The file was changed: export or copy the bundle again.",
        )
    return path


MOST_TEXT = 1 << 26
"""Bytes, more than any file of text has that is read here: weights given by mistake would take the memory."""


def read_content(path: Path | str) -> bytes:
    """The bytes of a file of text. Raises InputError where it cannot be read, or is too large for one."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_TEXT + 1)
    except (OSError, ValueError) as error:  # ValueError: U+0000 in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be read ({reason})", where=str(path)) from error
    if len(content) > MOST_TEXT:
        raise InputError(f"has more than {MOST_TEXT} bytes", where=str(path), expected="a file of text")
    return content


def read_json(path: Path | str) -> Any:
    """The content of a JSON file. Raises InputError where it cannot be read, or is not JSON."""
    return json_of(read_content(path), str(path))


def json_of(content: bytes, where: str) -> Any:
    """What the bytes of a JSON file hold. Raises InputError, beginning with `where`, where they are not."""
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error})", where=where) from error


def unwritable(path: Path, error: OSError) -> InputError:
    """The error for an output that cannot be written."""
    hint = "Choose a place that you may write to."
    return InputError(f"cannot be written ({error.strerror})", where=str(path), hint=hint)


def refuse_url(path: Path | str) -> None:
    """Raise InputError for what was a URL: as the name of a file it would be a folder `s3:` here."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        hint = "Write it to a folder, and copy that; statistics of an analysis may lie at a URL: --stats."
        raise InputError("is a URL", where=str(path), expected="a file or folder here", hint=hint)


def place_to_write(path: Path) -> Path:
    """The file that is written by a name: that itself or, of a link, what it leads to.

    Raises InputError where no file can be: a folder, a pipe or a device would be replaced by the file.
    """
    refuse_url(path)
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


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block ends well; nothing is left behind when it does not.

    Makes the folder. Raises InputError where the file cannot be written.
    """
    path = place_to_write(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises InputError where it cannot be written."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file of text whole or not at all, in UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def new_folder(path: Path, mark: str) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    A folder already at `path` is replaced only then, and only if it is empty or holds the file `mark`,
    as those made before do. Raises InputError for any other, and where nothing can be written.
    """
    refuse_url(path)
    path = path.resolve()
    if there(path) and path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise InputError(
            f"holds other files than an earlier result (it has no {mark})",
            where=str(path),
            hint="Choose a new or empty folder: this one would be replaced.",
        )
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
