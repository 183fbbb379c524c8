"""Reading files: names that stay inside a folder, digests. Writing them: `writing` and `folders`."""

from __future__ import annotations

import hashlib
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from forcingkv.headmaps.errors import InputError


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.bytes < 1 << 63:
            raise InputError(f"bytes is {self.bytes:.3g}", where="a file's record", expected="0 or more")


def check_name(name: str, where: str) -> None:
    """Raise InputError for the name of a file that is absolute, or climbs out of its folder."""
    pure = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        raise InputError(
            f"names the file {name!r}, which is not inside the folder",
            where=where,
            expected="relative names without '..'",
        )


def inside(folder: Path, name: str) -> Path:
    """The path of a file named relative to a folder. It may be a link to a file in the folder.

    In the cache of a hub (`REPOSITORY/snapshots/REVISION/...`) it may be a link into `REPOSITORY/blobs` too,
    where all files of such a repository lie. No other link is followed (docs/decisions/0023).

    Raises InputError for a name that is absolute, climbs out, or leads anywhere else through a link.
    """
    check_name(name, str(folder))
    path = folder / PurePosixPath(name)
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
