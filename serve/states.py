"""Saved videos, in a folder of the service: under names that it drew, with what each is of."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.reading import parse_json
from forcingkv.headmaps.writing import write_text
from forcingkv.serve.refusals import RefusalError

NAME = re.compile(r"[0-9a-f]{32}")
ABOUT, STATE = "about.json", "state"


@dataclass(frozen=True)
class SavedState:
    """A state on disk.

    Attributes:
        name: by which clients ask for it.
        folder: that `Video.save` writes, in a folder of that name.
        bundle: that made it.
    """

    name: str
    folder: Path
    bundle: str


class States:
    """The states of a service. Replicas that share the folder find each other's.

    Args:
        folder: where those lie that are kept.
        scratch: where others do, which go with this process.
        kept: how many at most: the oldest go first.
    """

    def __init__(self, folder: Path, scratch: Path, kept: int) -> None:
        self._folder, self._scratch, self._kept = folder, scratch, kept

    def new(self, bundle: str) -> SavedState:
        """A name and a place for a state that is to be saved. Nobody finds it before it is kept."""
        name = secrets.token_hex(16)
        return SavedState(name, self._scratch / name / STATE, bundle)

    def keep(self, state: SavedState) -> None:
        """A state was saved: from now on it is found, whole. The oldest ones make room. Raises OSError."""
        place = state.folder.parent
        write_text(place / ABOUT, json.dumps({"bundle": state.bundle}))
        self._folder.mkdir(parents=True, exist_ok=True)
        place.rename(self._folder / state.name)
        whole = [
            path for path in self._folder.iterdir() if NAME.fullmatch(path.name) and (path / ABOUT).exists()
        ]
        for old in sorted(whole, key=_written)[: -self._kept]:
            shutil.rmtree(old, ignore_errors=True)

    def find(self, name: str) -> SavedState:
        """A state that was kept, by its name. Raises RefusalError where there is none."""
        if NAME.fullmatch(name):
            about = self._folder / name / ABOUT
            try:
                bundle = parse_json(about.read_text(encoding="utf-8"), "a saved state")["bundle"]
            except (OSError, InputError, KeyError, TypeError):
                pass
            else:
                return SavedState(name, self._folder / name / STATE, str(bundle))
        raise RefusalError(
            "not_found", "There is no such state: it was never saved here, or made room for others."
        )

    def drop(self, state: SavedState) -> None:
        """Remove a state that was not kept; nothing happens where it is not there."""
        shutil.rmtree(state.folder.parent, ignore_errors=True)


def _written(place: Path) -> float:
    """When a state was saved; 0.0: another one has just removed it."""
    try:
        return (place / ABOUT).stat().st_mtime
    except OSError:
        return 0.0
