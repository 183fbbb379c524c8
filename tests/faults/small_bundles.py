"""The smallest folders that an export would take for bundles, in two versions, beside a user's own files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from forcingkv.headmaps.folders import new_folder
from forcingkv.headmaps.writing import is_ours
from forcingkv.runtime.bundle_files import BUNDLE

VERSIONS = {
    "old": {"a.bin": "old a", "engines/x.engine": "old x", "gone.bin": "old gone", "headmap.json": "old map"},
    "new": {
        "a.bin": "new a",
        "engines/x.engine": "new x",
        "kernels/y.cubin": "new y",
        "headmap.json": "new map",
    },
}
OWN = {"my-video.mp4": "video", "notes/one/n.txt": "note", "engines/mine.txt": "mine", ".git/HEAD": "ref"}
"""What a user has put into the folder."""


def fill(folder: Path, version: str) -> None:
    """Write a version into a folder."""
    files = VERSIONS[version]
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    listed = {name: {"sha256": "0", "bytes": len(text)} for name, text in files.items()}
    manifest = {"schema": "forcingkv.bundle/1", "version": version, "files": listed}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write(place: Path, version: str) -> None:
    """Write a version as an export does."""
    with new_folder(place, BUNDLE) as folder:
        fill(folder, version)


def add_own(place: Path) -> None:
    """Put the user's files into a folder."""
    for name, text in OWN.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def seen(place: Path) -> str:
    """The version that is there, "none", or "unfinished": what nobody would take for a bundle.

    Raises AssertionError for a mixture that says it is whole.
    """
    if not (place / "manifest.json").exists():
        return "unfinished" if place.exists() else "none"
    version: str = json.loads((place / "manifest.json").read_text())["version"]
    for name, text in VERSIONS[version].items():
        assert (place / name).exists(), f"{name} of {version} is not there"
        assert (place / name).read_text() == text, f"{name} is not of {version}"
    return version


def strangers(place: Path, version: str) -> set[str]:
    """What is in a folder beside a version and the user's files."""
    known = {"manifest.json", *VERSIONS[version], *OWN}
    found = (Path(at, name) for at, _, names in os.walk(place) for name in names)
    return {file.relative_to(place).as_posix() for file in found} - known


def own_lost(place: Path) -> set[str]:
    """The user's files that are not in a folder as they were."""
    return {
        name
        for name, text in OWN.items()
        if not (place / name).is_file() or (place / name).read_text() != text
    }


def hidden(folder: Path) -> list[str]:
    """Locks and temporary names that are left anywhere in a folder."""
    found = (Path(at, name) for at, folders, names in os.walk(folder) for name in (*folders, *names))
    return sorted(file.relative_to(folder).as_posix() for file in found if is_ours(file.name))
