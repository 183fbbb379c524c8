"""A folder is replaced so that the old or the new one is there, whole, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import forcingkv
from forcingkv.headmaps import InputError, folders
from forcingkv.headmaps.folders import check_folder, interrupted, new_folder
from forcingkv.headmaps.locks import held
from forcingkv.headmaps.writing import lock_of
from forcingkv.runtime import Bundle
from forcingkv.runtime.bundle_files import BUNDLE, files_of_bundle
from tests.faults import small_bundles as small
from tests.faults.injection import at_each_operation, fails_at

ROOT = Path(__file__).parents[2]


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A small Python of its own that finds forcingkv and the tests."""
    places = os.pathsep.join([str(Path(forcingkv.__file__).parents[1]), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": places}
    return subprocess.run(
        [*options.pop("before", ()), sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="module")
def kills() -> list[dict[str, Any]]:
    """What was seen after a kill before each operation of each way of replacing."""
    ran = python("-m", "tests.faults.swaps")
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    assert {(one["way"], one["killed"]) for one in found} >= {
        (way, killed)
        for way in ("exchange", "two renames", "inside", "other layer")
        for killed in (True, False)
    }
    assert sum(one["killed"] for one in found) > 150, "hardly any operation was found to kill at"
    return found


def test_after_any_kill_the_next_run_leaves_the_new_one_alone(kills: list[dict[str, Any]]) -> None:
    """FAULTS.md F2, F13 and CASES.md 11, 26: whole, with the user's files, and nothing else."""
    for one in kills:
        assert one["again"] == "new", one
        assert (one["strangers"], one["lost"], one["hidden"]) == ([], [], []), one


def test_where_names_are_exchanged_a_bundle_is_there_at_every_moment(kills: list[dict[str, Any]]) -> None:
    seen = {(one["first"], one["seen"]) for one in kills if one["way"] == "exchange" and one["killed"]}
    assert seen == {("none", "none"), ("none", "new"), ("old", "old"), ("old", "new")}


def test_with_two_renames_the_new_one_lies_beside_for_one_moment(kills: list[dict[str, Any]]) -> None:
    """FAULTS.md F2: between the renames nothing has the name, and both are whole."""
    of = [one for one in kills if (one["way"], one["first"], one["killed"]) == ("two renames", "old", True)]
    assert {one["seen"] for one in of} == {"old", "new", "none"}
    (moment,) = (one for one in of if one["seen"] == "none")
    assert moment["whole_at"] == "new"


@pytest.mark.parametrize("way", ["inside", "other layer"])
def test_a_mixture_is_never_taken_for_a_bundle(way: str, kills: list[dict[str, Any]]) -> None:
    """CASES.md 12: files are moved one by one, and meanwhile the folder has no manifest."""
    of = [one for one in kills if (one["way"], one["first"], one["killed"]) == (way, "old", True)]
    assert {one["seen"] for one in of} == {"old", "new", "unfinished"}
    for one in of:
        if one["seen"] == "unfinished":
            assert one["whole_at"] in ("old", "new"), one


@pytest.mark.parametrize("way", ["exchange", "two renames", "inside", "other layer"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_operation_that_fails_leaves_the_old_or_the_new(
    way: str, error: type[BaseException], quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or EIO at each operation in turn: the error says where, and what is there is whole."""
    from tests.faults.swaps import WAYS

    made: Callable[[], BaseException] = KeyboardInterrupt
    if error is OSError:
        made = lambda: OSError(errno.EIO, "Input/output error")  # noqa: E731
    for name, patch in WAYS[way].items():
        monkeypatch.setattr(folders, name, patch)
    raised, seen = [], set()
    for number in range(200):
        place = quick / str(number) / "b"
        small.write(place, "old")
        small.add_own(place)
        left = number

        def hear() -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise made()

        with suppress(KeyboardInterrupt), at_each_operation(hear):
            try:
                small.write(place, "new")
            except InputError as found:
                raised.append(str(found))
        if left >= 0:
            break
        seen.add(small.seen(place))
        small.write(place, "new")
        assert small.seen(place) == "new"
        assert (small.strangers(place, "new"), small.own_lost(place), small.hidden(place.parent)) == (
            set(),
            set(),
            [],
        )
    assert seen == {"old", "new"}
    assert len(raised) > 10 if error is OSError else not raised
    assert [message for message in raised if "b cannot be written (Input/output error)" not in message] == []


FOREIGN = {
    "a web extension": {"manifest.json": '{"manifest_version": 3, "name": "x"}', "src/a.js": "1"},
    "a web app": {"manifest.json": '{"name": "x", "icons": []}', "package.json": "{}", ".git/HEAD": "ref"},
    "a list": {"manifest.json": "[1, 2]"},
    "no JSON": {"manifest.json": "version: 3"},
    "another schema": {"manifest.json": '{"schema": "forcingkv.frames/1", "files": {"a": {}}}', "a": "1"},
    "a schema that is no text": {"manifest.json": '{"schema": 1}', "a": "1"},
    "a repository": {".git/HEAD": "ref", "README": "x"},
    "other files": {"a.txt": "1"},
    "a hidden file": {".env": "SECRET=1"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_was_never_a_bundle_is_refused_untouched(name: str, tmp_path: Path) -> None:
    """FAULTS.md F3: many things have a manifest.json; only the schema tells a bundle's."""
    place = tmp_path / "project"
    for file, text in FOREIGN[name].items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(text)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    for refused in (lambda: check_folder(place, BUNDLE), lambda: small.write(place, "new")):
        with pytest.raises(InputError, match="project holds other files than an earlier result"):
            refused()
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert small.hidden(tmp_path) == []


def test_of_a_bundle_only_what_its_manifest_names_is_replaced(tmp_path: Path) -> None:
    """CASES.md 11: a user's video, notes and hidden files stay, and `check_folder` names them."""
    place = tmp_path / "b"
    small.write(place, "old")
    small.add_own(place)
    (place / "link").symlink_to("../elsewhere")
    (place / "empty").mkdir()
    kept = [".git", "empty", "engines/mine.txt", "link", "my-video.mp4", "notes"]
    assert check_folder(place, BUNDLE) == kept
    small.write(place, "new")
    assert (small.seen(place), small.own_lost(place), small.strangers(place, "new")) == (
        "new",
        set(),
        {"link"},
    )
    assert os.readlink(place / "link") == "../elsewhere"
    assert (place / "empty").is_dir()
    assert not (place / "gone.bin").exists(), "a file of the old bundle alone"
    assert check_folder(place, BUNDLE) == kept


def test_a_head_map_that_no_manifest_names_is_the_user_s(tmp_path: Path) -> None:
    place = tmp_path / "b"
    with new_folder(place, BUNDLE) as folder:
        (folder / "manifest.json").write_text(
            '{"schema": "forcingkv.bundle/1", "files": {}, "headmap": null}'
        )
    (place / "headmap.json").write_text("mine")
    assert check_folder(place, BUNDLE) == ["headmap.json"]
    with pytest.raises(InputError, match=r"b holds headmap.json, which is no part of the earlier result"):
        check_folder(place, BUNDLE, ["headmap.json"])
    with pytest.raises(InputError, match=r"holds headmap\.json, which is no part"):
        small.write(place, "new")
    assert (place / "headmap.json").read_text() == "mine"


@pytest.mark.parametrize(
    "names", [["../../etc/passwd"], ["/etc/passwd"], ["a/../../x"], [""], ["."], ["./a"]]
)
def test_a_manifest_cannot_have_files_elsewhere_removed(names: list[str], tmp_path: Path) -> None:
    place = tmp_path / "b"
    place.mkdir()
    listed = {name: {} for name in names}
    text = json.dumps({"schema": "forcingkv.bundle/1", "files": listed})
    (place / "manifest.json").write_text(text)
    assert files_of_bundle(place) == {"manifest.json"}


def test_a_bundle_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    """What `Bundle.open` says where a process was killed between the two renames."""
    place = tmp_path / "b"
    small.write(tmp_path / ".b.0123abcd.ready.forcingkv", "new")
    with pytest.raises(
        InputError, match=r"b is not a bundle.*Or move .*\.b\.0123abcd\.ready\.forcingkv here"
    ):
        Bundle.open(place)
    assert interrupted(place, BUNDLE) == [tmp_path / ".b.0123abcd.ready.forcingkv"]
    small.write(place, "new")
    assert small.hidden(tmp_path) == []
    with pytest.raises(InputError, match=r"Make one with: forcingkv export$"):
        Bundle.open(tmp_path / "another")


def test_what_is_found_is_not_moved_into_a_folder_of_others(tmp_path: Path) -> None:
    """A user gave the name to something else after a kill: that is refused, and both stay."""
    left = tmp_path / ".b.0123abcd.ready.forcingkv"
    small.write(left, "old")
    small.add_own(left)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds other files than an earlier result"):
        small.write(tmp_path / "b", "new")
    assert os.listdir(tmp_path / "b") == ["thesis.tex"]
    assert (small.seen(left), small.own_lost(left)) == ("old", set())


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    place = tmp_path / "b"
    small.write(place, "old")
    for second in (place, tmp_path / "other" / ".." / "b"):
        with new_folder(place, BUNDLE) as folder:
            small.fill(folder, "new")
            for refused in (lambda: small.write(second, "old"), lambda: check_folder(second, BUNDLE)):  # noqa: B023
                with pytest.raises(InputError, match="b is being written by another process"):
                    refused()
            assert small.seen(place) == "old" if second is place else "new"
            assert folder.is_dir(), "a living writer's folder is not cleaned away"
    assert (small.seen(place), small.hidden(tmp_path)) == ("new", [])


def test_one_folder_by_two_names_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted in a container it has another parent: the folder itself is locked too."""
    small.write(tmp_path / "b", "old")
    monkeypatch.setattr(folders, "can_be_renamed", lambda path: False)
    with held(lock_of(tmp_path, "unrelated"), tmp_path), new_folder(tmp_path / "b", BUNDLE) as folder:
        small.fill(folder, "new")
        with monkeypatch.context() as patch:
            patch.setattr(folders, "can_be_renamed", lambda path: True)
            with pytest.raises(InputError, match="is being written by another process"):
                small.write(tmp_path / "b", "old")
    assert (small.seen(tmp_path / "b"), small.hidden(tmp_path)) == ("new", [])


def test_errors_of_what_is_read_in_the_block_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights\.bin"), new_folder(tmp_path / "b", BUNDLE):
        (tmp_path / "weights.bin").read_bytes()
    assert os.listdir(tmp_path) == []


def test_the_temporary_folder_vanishes_under_the_writer(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(InputError, match=r"b cannot be written \(No such file or directory\)"),
        new_folder(tmp_path / "sub" / "b", BUNDLE) as folder,
    ):
        shutil.rmtree(tmp_path / "sub")
        (folder / "a.bin").write_bytes(b"")
    assert os.listdir(tmp_path) == []


def test_an_audited_failure_is_one(tmp_path: Path) -> None:
    """That the faults of these tests happen at all."""
    with pytest.raises(OSError, match="x"), at_each_operation(fails_at(1, lambda: OSError("x"))):
        [(tmp_path / name).mkdir() for name in "ab"]
    assert os.listdir(tmp_path) == ["a"]
