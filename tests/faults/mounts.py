"""Replace bundles in mounted folders: `unshare -rm python -m tests.faults.mounts ROOM`. Prints JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from forcingkv.headmaps import InputError
from forcingkv.headmaps.folders import built_in, check_folder
from forcingkv.headmaps.writing import check_file, write_text
from forcingkv.runtime.bundle_files import BUNDLE
from forcingkv.runtime.embeds_writer import growing_embeds
from forcingkv.runtime.frames import RawWriter
from forcingkv.runtime.tensors import new_tensors
from tests.faults import small_bundles as small


def mounted(place: Path, *options: str) -> Path:
    """A folder with a disk of its own."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "none", place], check=True)
    return place


def said(act: Callable[[], object]) -> str:
    """What that raises as InputError, or "" for nothing."""
    try:
        act()
    except InputError as error:
        return str(error)
    return ""


def into_a_mounted_folder(place: Path, parent_is_read_only: bool) -> dict[str, Any]:
    """CASES.md 12: an old bundle with a user's files, then an empty disk with lost+found."""
    mounted(place.parent)
    mounted(place)
    (place / "lost+found").mkdir()
    if parent_is_read_only:
        subprocess.run(["mount", "-o", "remount,ro", place.parent], check=True)
    found: dict[str, Any] = {"empty": said(lambda: small.write(place, "old")), "first": small.seen(place)}
    small.add_own(place)
    kept = said(lambda: check_folder(place, BUNDLE))
    found |= {"checked": kept, "again": said(lambda: small.write(place, "new")), "seen": small.seen(place)}
    found |= {"lost": sorted(small.own_lost(place)), "hidden": small.hidden(place.parent)}
    found["built_in"] = str(built_in(place)) == str(place)
    return found


def bound(room: Path) -> dict[str, Any]:
    """A folder of the same disk that is mounted, and a file."""
    (room / "real").mkdir(parents=True)
    (room / "place").mkdir()
    (room / "real.json").write_text("old")
    (room / "file.json").write_text("")
    for real, place in (("real", "place"), ("real.json", "file.json")):
        subprocess.run(["mount", "--bind", room / real, room / place], check=True)
    small.write(room / "place", "old")
    found: dict[str, Any] = {"again": said(lambda: small.write(room / "place", "new"))}
    found |= {"seen": small.seen(room / "real"), "hidden": small.hidden(room)}
    found |= {"check": said(lambda: check_file(room / "file.json"))}
    found |= {
        "file": said(lambda: write_text(room / "file.json", "new")),
        "text": (room / "real.json").read_text(),
    }
    return found


def foreign(place: Path) -> dict[str, Any]:
    """FAULTS.md F3 on a disk of its own."""
    mounted(place)
    (place / "manifest.json").write_text('{"manifest_version": 3}')
    (place / "src.js").write_text("1")
    return {"said": said(lambda: small.write(place, "new")), "left": sorted(os.listdir(place))}


def read_only(place: Path) -> dict[str, Any]:
    """A disk that is read only is refused before the work."""
    mounted(place)
    small.write(place / "b", "old")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    writes = {
        "bundle": lambda: check_folder(place / "b", BUNDLE),
        "new bundle": lambda: check_folder(place / "c", BUNDLE),
        "file": lambda: check_file(place / "x.json"),
        "video": lambda: RawWriter(place / "x.rgb", 8.0),
    }
    return {name: said(act) for name, act in writes.items()} | {"seen": small.seen(place / "b")}


def full(place: Path) -> list[dict[str, Any]]:
    """Disks of every size from nothing to enough, for each kind of file that is written."""
    arrays = [np.full((400, 4), number, np.float32) for number in range(3)]

    def tensors(path: Path) -> None:
        with new_tensors(path, {str(n): ("F32", (400, 4)) for n in range(3)}) as writer:
            for number, array in enumerate(arrays):
                writer.write(str(number), array)

    def embeds(path: Path) -> None:
        names = ["a", "b", "c"]
        with growing_embeds(path, names, names, [400] * 3, [(400, 4)] * 3, {}) as growing:
            for array in arrays[growing.done :]:
                growing.write(array)

    writes: dict[str, Callable[[Path], None]] = {
        "text": lambda path: write_text(path, "x" * 20_000),
        "tensors": tensors,
        "embeds": embeds,
        "bundle": lambda path: small.write(path, "new"),
    }
    found = []
    for name, write in writes.items():
        for pages in range(3, 40):
            disk = mounted(place / f"{name}-{pages}", "-o", f"size={pages * 4}k")
            small.write(disk / "b", "old") if name == "bundle" and pages > 5 else None
            before = sorted(os.listdir(disk))
            error = said(lambda: write(disk / ("b" if name == "bundle" else "x")))  # noqa: B023
            left = [one for one in small.hidden(disk) if "growing" not in one]
            found.append({"name": name, "error": error, "hidden": left, "before": before})
            found[-1]["whole"] = (disk / "x").exists() or (name == "bundle" and small.seen(disk / "b"))
            subprocess.run(["umount", disk], check=True)
            if not error and pages > 11:
                break
    return found


def main(room: Path) -> None:
    """Try all of them."""
    found: dict[str, Any] = {
        "mounted": into_a_mounted_folder(room / "a" / "out", parent_is_read_only=False),
        "mounted, read-only parent": into_a_mounted_folder(room / "b" / "out", parent_is_read_only=True),
        "bound": bound(mounted(room / "c")),
        "foreign": foreign(room / "d"),
        "read only": read_only(room / "e"),
        "full": full(room / "f"),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
