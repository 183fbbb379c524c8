"""Repositories on the Hugging Face hub: what they hold, and fetching of it what is used and nothing else."""

from __future__ import annotations

import glob
import importlib.util
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from forcingkv.headmaps.errors import InputError, MissingExtraError, first_line
from forcingkv.runtime.footprint import readable

_REPOSITORY = r"[\w.-]+/[\w.-]+"
_HUB_ID = re.compile(rf"^{_REPOSITORY}$")
_PLACE = re.compile(rf"^(?P<repository>{_REPOSITORY})(?:@(?P<revision>[^:]+))?(?::(?P<path>.+))?$")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json", ".gguf")

FORM = "owner/name, owner/name@revision or owner/name@revision:path/in/it"
"""How a place on the hub is written."""


@dataclass(frozen=True)
class HubPlace:
    """A repository, a revision of it (a branch, a tag or a commit), and a file or folder in it."""

    repository: str
    revision: str | None = None
    """None: the newest of the main branch."""
    path: str | None = None

    def __str__(self) -> str:
        revision, path = (
            (f"@{self.revision}" if self.revision else ""),
            (f":{self.path}" if self.path else ""),
        )
        return f"{self.repository}{revision}{path}"


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    place: HubPlace
    commit: str
    sizes: Mapping[str, int]
    """Name in the repository -> bytes."""
    folder: Path | None = None
    """Where they lie on this machine, if the hub could not be asked; then there are no others."""
    remark: str = ""
    """Why it could not be asked."""


def hub_place(place: str | Path, local: str, option: str = "") -> HubPlace:
    """What a place that is not on this machine names on the hub.

    Raises InputError where it can be none; `local` is what may be on this machine, `option` what named it.
    """
    where = f"{option} {place}".strip()
    match = _PLACE.match(str(place))
    if match is None or match["repository"].endswith(_FILES):
        what = "cannot be read: there is no such file or folder"
        raise InputError(what, where=where, expected=f"{local}, or a repository on the hub ({FORM})")
    path, revision = match["path"], match["revision"]
    inner = f"{revision or 'main'}/{path or '.'}"
    if (path or "").startswith("/") or "\\" in inner or ".." in PurePosixPath(inner).parts:
        what = f"names {inner!r}, which is no place in a repository"
        raise InputError(what, where=where, expected="a relative name without '..'")
    return HubPlace(match["repository"], revision, path and str(PurePosixPath(path)))


def hub_id(place: str | Path, local: str) -> str:
    """The repository (`owner/name`) on the hub that a place which is not on this machine names.

    Raises InputError where it can be none; `local` is what may be on this machine.
    """
    name = str(place)
    if not _HUB_ID.match(name) or name.endswith(_FILES):
        what = "cannot be read: there is no such file or folder"
        raise InputError(what, where=name, expected=f"{local}, or a repository on the hub (owner/name)")
    return name


def list_files(place: HubPlace) -> Listing:
    """What a repository holds: as the hub says or, where it cannot be asked, what of it was fetched before.

    Raises InputError where neither is known, MissingExtraError without huggingface_hub.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtraError("huggingface_hub", "hub")
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        api = huggingface_hub.HfApi()
        found = api.model_info(place.repository, revision=place.revision, files_metadata=True)
        sizes = {file.rfilename: int(file.size or 0) for file in found.siblings or ()}
        return Listing(place, str(found.sha), sizes)
    except RevisionNotFoundError as error:
        what = f"has no revision {place.revision!r}"
        raise InputError(
            what, where=place.repository, expected="a branch, a tag or a commit of it"
        ) from error
    except Exception as error:  # whatever the client of the day raises: offline, HTTP, connection, names
        folder = _fetched_before(place)
        if folder is None:
            what = f"is no file or folder here, and cannot be fetched from the hub ({first_line(error)})"
            hint = "Check the name, the network and the access rights, or fetch it by other means."
            raise InputError(what, where=str(place), hint=hint) from error
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return Listing(place, folder.name, sizes, folder, f"the hub cannot be asked: {first_line(error)}")


def _fetched_before(place: HubPlace) -> Path | None:
    """The folder in the cache that holds what was fetched of a revision."""
    import huggingface_hub
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{place.repository.replace('/', '--')}"
    if place.revision and (home / "snapshots" / place.revision).is_dir():
        return home / "snapshots" / place.revision
    try:
        return Path(
            huggingface_hub.snapshot_download(
                place.repository, revision=place.revision, local_files_only=True, allow_patterns=[]
            )
        )
    except Exception:  # it holds nothing of it: every release of the client has its own error
        return None


def fetch(listing: Listing, names: Sequence[str], progress: Callable[[str], None]) -> Path:
    """Fetch files of a repository, unless they lie in the cache; returns the folder that then holds them.

    Says their size, and where they go, before. Raises InputError where there is no room for them, or they
    cannot be fetched.
    """
    if listing.folder:
        return listing.folder
    import huggingface_hub
    from huggingface_hub import constants

    place, cache = listing.place, Path(constants.HF_HUB_CACHE)
    found = {
        name: huggingface_hub.try_to_load_from_cache(place.repository, name, revision=listing.commit)
        for name in names
    }
    absent = [name for name in names if not isinstance(found[name], str)]
    size = sum(listing.sizes[name] for name in absent)
    if absent:
        _require_room(cache, size, str(place))
        progress(
            f"fetching {readable(size)} of {place.repository}, revision {listing.commit[:12]}, to {cache}: "
            + ", ".join(absent)
        )
    try:
        # By the revision's own name: the cache then knows it, and it is found without the hub.
        patterns = [glob.escape(name) for name in names]
        folder = Path(
            huggingface_hub.snapshot_download(
                place.repository, revision=place.revision, allow_patterns=patterns
            )
        )
    except (OSError, ValueError) as error:  # HTTP, connection and repository errors are OSErrors
        what = f"cannot be fetched from the hub ({first_line(error)})"
        hint = "Check the network and the access rights, or fetch it by other means."
        raise InputError(what, where=str(place), hint=hint) from error
    if folder.name != listing.commit:
        what = f"has changed from {listing.commit[:12]} to {folder.name[:12]} while it was fetched"
        raise InputError(what, where=str(place), hint="Try again, or name a revision.")
    return folder


def _require_room(cache: Path, size: int, where: str) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if size > free:
        what = f"needs {readable(size)} in {cache}, where {readable(free)} are free"
        raise InputError(what, where=where, hint="Set HF_HOME to a folder with more room.")
