"""Folders that are mounted, read-only or full disks: real ones, where this machine lets a test make some."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.faults.test_folders import python


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen on disks of their own."""
    room = tmp_path_factory.mktemp("disks")
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(room)]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip(
            "no disk is mounted, and none filled: this machine does not let tests do that (unshare -rm)"
        )
    ran = python("-m", "tests.faults.mounts", str(room), before=("unshare", "-rm"))
    assert ran.returncode == 0, ran.stderr
    seen: dict[str, Any] = json.loads(ran.stdout)
    return seen


@pytest.mark.parametrize("way", ["mounted", "mounted, read-only parent"])
def test_a_bundle_is_written_into_a_mounted_folder(way: str, found: dict[str, Any]) -> None:
    """CASES.md 12: `docker run -v $PWD/out:/out ... --out /out`, with what a user put there."""
    assert found[way] == {
        "empty": "",
        "first": "old",
        "checked": "",
        "again": "",
        "seen": "new",
        "lost": [],
        "hidden": [],
        "built_in": True,
    }


def test_a_folder_of_the_same_disk_is_mounted(found: dict[str, Any]) -> None:
    """`os.path.ismount` does not see it, and it can be renamed as little."""
    seen = found["bound"]
    assert (seen["again"], seen["seen"], seen["hidden"], seen["text"]) == ("", "new", [], "old")
    for name in ("check", "file"):
        assert "file.json is mounted by itself, and cannot be replaced whole. Mount its folder" in seen[name]


def test_what_is_mounted_and_no_bundle_is_left_alone(found: dict[str, Any]) -> None:
    assert found["foreign"]["left"] == ["manifest.json", "src.js"]
    assert "holds other files than an earlier result" in found["foreign"]["said"]


def test_a_read_only_disk_is_refused_before_the_work(found: dict[str, Any]) -> None:
    seen = dict(found["read only"])
    assert seen.pop("seen") == "old"
    assert list(seen) == ["bundle", "new bundle", "file", "video"]
    for name, said in seen.items():
        assert "cannot be written (" in said, name


@pytest.mark.parametrize("name", ["text", "tensors", "embeds", "bundle"])
def test_disks_of_every_size(name: str, found: dict[str, Any]) -> None:
    """FAULTS.md F13 and F18: an error that says so, the old result whole, nothing half-written."""
    tried = [one for one in found["full"] if one["name"] == name]
    assert tried[-1]["error"] == "", "no disk was large enough"
    assert tried[0]["error"], "every disk was large enough"
    for one in tried:
        assert one["hidden"] == [], one
        if one["error"]:
            assert "cannot be written (No space left on device). Make room there" in one["error"], one
            assert one["whole"] == ("old" if one["before"] else name == "bundle" and "none"), one
