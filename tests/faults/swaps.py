"""Kill a process before each operation of replacing a bundle, in each way: `python -m tests.faults.swaps`.

Prints a JSON list: for each way and number of an operation what was seen. A process of its own: each kill is
a fork, and this one is small.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from forcingkv.headmaps import folders
from forcingkv.runtime.bundle_files import BUNDLE
from tests.faults import small_bundles as small
from tests.faults.injection import at_each_operation, killed_at


def _cannot(*_: object) -> bool:
    return False


def _other_layer(*names: Path) -> bool:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(names[0]))


MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where nothing waits for a disk, thousands of times."""

WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "exchange": {},
    "two renames": {"exchange": _cannot},
    "inside": {"can_be_renamed": _cannot},
    "other layer": {"exchange": _other_layer},
}
"""How the new folder gets into the place of the old: what of `folders` is patched for it."""


def in_child(act: Callable[[], None]) -> int:
    """The wait status of a child that does that."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def tried(way: str, number: int, first: str) -> dict[str, Any]:
    """Kill a replacement before that operation, look, run it again, and look again."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as room:
        place = Path(room, "b")
        if first == "empty":
            place.mkdir()
        elif first != "none":
            small.write(place, first)
            small.add_own(place)

        def replace() -> None:
            with at_each_operation(killed_at(number)) if number >= 0 else nullcontext():
                small.write(place, "new")

        patched = {name: getattr(folders, name) for name in WAYS[way]}
        for name, patch in WAYS[way].items():
            setattr(folders, name, patch)
        try:
            status = in_child(replace)
            found: dict[str, Any] = {"way": way, "first": first, "number": number}
            found["killed"] = os.WIFSIGNALED(status)
            found["seen"] = small.seen(place)
            left = folders.interrupted(place, BUNDLE)
            whole = left and folders.is_whole(left[0], BUNDLE)
            found["whole_at"] = small.seen(left[0]) if whole else "parts" if left else "nothing"
            small.write(place, "new")
        finally:
            for name, call in patched.items():
                setattr(folders, name, call)
        found["again"] = small.seen(place)
        found["strangers"] = sorted(small.strangers(place, "new"))
        found["lost"] = sorted(small.own_lost(place)) if first == "old" else []
        found["hidden"] = small.hidden(Path(room))
        return found


def main() -> None:
    """Try all ways and operations."""
    found = []
    for way in WAYS:
        # Only a folder that is there can be one that cannot be renamed.
        for first in ("empty" if way == "inside" else "none", "old"):
            number = 0
            while True:
                found.append(tried(way, number, first))
                if not found[-1]["killed"]:
                    break
                number += 1
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
