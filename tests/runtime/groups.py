"""Control groups as Linux shows them, in a folder of a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from forcingkv.runtime import control_groups


class Groups:
    """Folders in the place of /proc/self and /sys/fs/cgroup: at first without any group."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.process, self.mounted = place / "proc self", place / "cgroup"
        self.process.mkdir()
        self.mounted.mkdir()
        monkeypatch.setattr(control_groups, "PROCESS", self.process)
        monkeypatch.setattr(control_groups, "MOUNTED", self.mounted)

    def mine(self, *lines: str) -> None:
        """What /proc/self/cgroup says."""
        (self.process / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mount(self, place: Path, kind: str, options: str, root: str = "/") -> None:
        """A line of /proc/self/mountinfo."""
        shown = str(place).replace(" ", "\\040")
        with (self.process / "mountinfo").open("a") as file:
            file.write(f"31 23 0:28 {root} {shown} rw,relatime shared:9 - {kind} {kind} {options}\n")

    def group(self, folder: str, **files: object) -> Path:
        """A group with files; `__` stands for the point in their names."""
        path = self.mounted / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (path / name.replace("__", ".")).write_text(f"{text}\n")
        return path
