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
    """A state that is there."""

    name: str
    folder: Path
    bundle: str


class States:
    """The states of a service. Replicas that share the folder find each other's.

    Args:
        folder: where they lie.
        kept: how many at most: the oldest go first.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self._folder, self._kept = folder, kept

    def new(self) -> SavedState:
        """A name and a folder for a state that is to be saved."""
        name = secrets.token_hex(16)
        return SavedState(name, self._folder / name / STATE, "")

    def done(self, state: SavedState, bundle: str) -> None:
        """A state was saved: from now on it is found. The oldest ones make room."""
        write_text(state.folder.parent / ABOUT, json.dumps({"bundle": bundle}))
        whole = [
            path for path in self._folder.iterdir() if NAME.fullmatch(path.name) and (path / ABOUT).exists()
        ]
        for old in sorted(whole, key=lambda path: (path / ABOUT).stat().st_mtime)[: -self._kept]:
            self.remove(old.name)

    def find(self, name: str) -> SavedState:
        """A state by its name. Raises RefusalError where there is none."""
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

    def remove(self, name: str) -> None:
        """Remove a state; nothing happens where there is none."""
        if NAME.fullmatch(name):
            shutil.rmtree(self._folder / name, ignore_errors=True)
