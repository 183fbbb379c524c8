"""Which files of a folder are a bundle's: what an export may replace, and nothing else."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.folders import Kind, interrupted, is_whole
from forcingkv.headmaps.reading import read_json

MANIFEST, HEADMAP, STATISTICS = "manifest.json", "headmap.json", "statistics.safetensors"
SCHEMAS = "forcingkv.bundle/"
"""What the schema of every version's manifest begins with."""


def files_of_bundle(folder: Path) -> frozenset[str]:
    """The names of a bundle's files, as its manifest has them, in any version of the format.

    Raises InputError where the folder has no manifest of a bundle: many things call a file manifest.json.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"it has no {MANIFEST}", where=str(folder))
    try:
        data = read_json(folder / MANIFEST)
    except InputError as error:
        raise InputError(f"its {MANIFEST} {error.what}", where=str(folder)) from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, str) or not schema.startswith(SCHEMAS):
        raise InputError(f"its {MANIFEST} is not that of a bundle", where=str(folder))
    listed = data.get("files")
    names = listed if isinstance(listed, dict) else {}
    with_map = {HEADMAP} if data.get("headmap") else set()
    return frozenset({MANIFEST, *with_map, *filter(_is_inside, names)})


def _is_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(pure.parts) and str(pure) == name and not pure.is_absolute() and ".." not in pure.parts


BUNDLE = Kind(MANIFEST, files_of_bundle)
"""Folders that an export writes."""


def no_bundle(folder: Path) -> InputError:
    """The error for a folder without a manifest; it says where the bundle is that was to be there."""
    left = interrupted(folder, BUNDLE)
    hint = "Make one with: forcingkv export"
    if left:
        hint = "An export was stopped while it replaced this bundle: run it again, which first finishes that."
        if is_whole(left[0], BUNDLE):
            hint += f" Or move {left[0]} here, which is whole."
    return InputError(f"is not a bundle: it has no {MANIFEST}", where=str(folder), hint=hint)
