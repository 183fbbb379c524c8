"""The product on other systems, as this one plays them (`tests/systems.py`): from export to a video.

Everything runs once as it is and once on the other system; what comes of it is the same.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from forcingkv import __main__ as command_line
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import write_text
from forcingkv.measure.bench import turns
from forcingkv.measure.process import resident
from forcingkv.runtime import memory
from forcingkv.runtime.memory import available, bound_memory, give_back, peak_bytes, what_limits
from forcingkv.runtime.threads import cpu_threads
from tests import systems
from tests.conftest import Ran, headmap_of, small_spec
from tests.kept_traces import traced_anew

Run = Callable[..., Ran]
SPEC = """
base = "demo"
name = "little"
layers = 1
[schedule]
denoising_steps = [1000.0, 500.0]
redraw_from = 0
"""
PROMPT = "a 3 moving left"


def pictures(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def whole_way(run: Run, folder: Path, *, briefly: bool = False) -> dict[str, Any]:
    """Export, generate, save and restore, and unless `briefly` measure; what came of it."""

    def done(*words: object) -> str:
        ran = run(*words)
        assert ran.code == 0, ran.err
        return ran.out

    folder.mkdir()
    (folder / "little.toml").write_text(SPEC, encoding="utf-8")
    model = ("--model", folder / "little.toml", "--random-weights")
    export = ("export", *model, "--policy", "window", "--no-verify", "--out", folder / "bundle", "--json")
    if sys.platform == "win32":  # where replacing is refused most often
        with traced_anew():
            done(*export)
    made = done(*export)
    bundle = ("--bundle", folder / "bundle", "--json")
    asked = ("--prompt", PROMPT, "--seed", 3, "--enlarge", 2)
    state = ("--save", folder / "state", "--save-every", 1)
    done("generate", *bundle, *asked, *state, "--seconds", 0.7, "--out", folder / "a.mp4")
    done("generate", *bundle, *asked, "--seconds", 0.7, "--out", folder / "pictures")
    rest = ("--restore", folder / "state", "--seconds", 1.1, "--out", folder / "rest.rgb")
    done("generate", *bundle, *rest)
    found = {
        "digests": json.loads(made)["files"],
        "video": pictures(folder / "a.mp4").tobytes(),
        "pictures": sorted(path.name for path in (folder / "pictures").iterdir()),
        "rest": (folder / "rest.rgb").read_bytes(),
    }
    return found if briefly else found | measured(done, folder)


def measured(done: Callable[..., str], folder: Path) -> dict[str, Any]:
    """What commands say that measure: of the bundle, of the video, and of the model's heads."""
    (folder / "p.txt").write_text(PROMPT, encoding="utf-8")
    timed = json.loads(done("bench", "--bundle", folder / "bundle", "--rounds", 1, "--json"))
    watched = json.loads(done("evaluate", "--video", folder / "a.mp4", "--out", folder / "all.csv", "--json"))
    model = ("--model", folder / "little.toml", "--random-weights", "--prompts", folder / "p.txt")
    heads = done(
        "analyze", "heads", *model, "--samples", 1, "--chunks", 3, "--out", folder / "heads", "--json"
    )
    done("inspect", folder / "bundle", "--picture", folder / "memory.png")
    return {
        "timed": [row["policy"] for row in timed["rows"]],
        "values": [one["values"] for one in watched["videos"]],
        "headmap": json.loads(heads)["digest"],
        "files": sorted(path.name for path in folder.iterdir()),
    }


@pytest.fixture
def _quickly(white_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TIMED_SECONDS", 0.01)


@pytest.fixture
def here(_quickly: None, run: Run, tmp_path: Path) -> dict[str, Any]:
    """What comes of the whole way on this system."""
    if not _HERE:
        _HERE.append(whole_way(run, tmp_path / "here"))
    return _HERE[0]


_HERE: list[dict[str, Any]] = []


@pytest.fixture(params=["win32", "darwin"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[pytest.MonkeyPatch], None]:
    """Turns this system into another for as long as a patch lasts."""

    def turn(patch: pytest.MonkeyPatch) -> None:
        systems.windows(patch, tmp_path) if request.param == "win32" else systems.macos(patch)

    return turn


@pytest.mark.usefixtures("_quickly")
def test_the_whole_way_is_the_same_on_other_systems(
    run: Run, tmp_path: Path, here: dict[str, Any], other: Callable[[pytest.MonkeyPatch], None]
) -> None:
    assert len(here["pictures"]) == 7, "6 pictures and their record"
    assert len(here["rest"]) == 3 * 96 * 64 * 3, "3 frames, enlarged as those before"
    with pytest.MonkeyPatch.context() as patch:
        other(patch)
        there = whole_way(run, tmp_path / "there", briefly=sys.platform == "darwin")
    assert there == {name: here[name] for name in there}


def test_what_a_reader_has_open_on_windows_is_kept_and_named(tmp_path: Path) -> None:
    """There no open file is replaced: the old one stays whole, and nothing is left beside it."""
    file = tmp_path / "map.json"
    file.write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        systems.windows(patch, tmp_path)
        with (
            file.open("rb"),
            pytest.raises(InputError, match=r"map\.json cannot be written \(The process.*Close the program"),
        ):
            write_text(file, "new")
        assert [path.name for path in tmp_path.iterdir()] == ["map.json"]
        assert file.read_bytes() == b"old"
        write_text(file, "new")
        with pytest.raises(InputError, match=r"con\.json cannot be written \(The filename"):
            write_text(tmp_path / "con.json", "new")
    assert file.read_bytes() == b"new"


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "utf-8"])
def test_a_console_of_any_encoding_shows_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    place = tmp_path / "h \u65e5\u672c \u00fc \U0001f3a5.json"
    headmap_of(small_spec(layers=2), [[0], [1]]).write(place)
    shown = place.name.encode(encoding, "backslashreplace").decode(encoding)
    for words, code, stream in (
        (("headmap", "show", str(place)), 0, "stdout"),
        (("headmap", "validate", str(place)), 0, "stdout"),
        (("headmap", "show", f"{place}.not"), 2, "stderr"),
        (("generate", "--help"), 0, "stdout"),
        (("plan", "--model", "demo", "--policy", "full"), 0, "stdout"),
    ):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, "strict") for name in ("stdout", "stderr")}
        for name, wrapper in streams.items():
            monkeypatch.setattr(sys, name, wrapper)
        monkeypatch.setattr(sys, "argv", ["forcingkv", *words])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        assert int(ended.value.code or 0) == code
        streams[stream].flush()
        told = streams[stream].buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert told.strip()
        if words[1] == "validate" or code:
            assert shown in told.replace("\n", ""), words


def test_memory_and_threads_are_found_without_proc(other: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        other(patch)
        assert available() == (8 << 30, None)
        assert what_limits() == ""
        assert cpu_threads() == (2, "cores of the machine")
        assert resident() == (180 if sys.platform == "win32" else 150) << 20
        assert resident("VmRSS") == 200 << 20
        assert peak_bytes() == 250 << 20 if sys.platform == "win32" else peak_bytes() > 0
        bound_memory(1)  # nothing can be bound here
        give_back()


def test_what_plays_windows_refuses_what_windows_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would show nothing."""
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"1")
    with pytest.MonkeyPatch.context() as patch:
        systems.windows(patch, tmp_path)
        with file.open("rb"):
            for change in (file.unlink, lambda: os.replace(file, other), lambda: os.rename(tmp_path, other)):
                with pytest.raises(PermissionError, match="used by another process"):
                    change()
        other.write_bytes(b"2")
        with other.open("rb"), pytest.raises(PermissionError):
            file.replace(other)
        with pytest.raises(FileExistsError):
            file.rename(other)
        for name in ("a:b", "con", "nul.mp4", "what?", "ends.", "ends "):
            with pytest.raises(OSError, match="incorrect"):
                (tmp_path / name).mkdir()
        with pytest.raises(OSError, match="privilege"):
            other.symlink_to(file)
        with pytest.raises(PermissionError):
            os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(FileNotFoundError):
            Path("/proc/self/status").read_text(encoding="utf-8")
        with pytest.raises(TypeError):
            ctypes.CDLL(None)
        with pytest.raises(ImportError):
            import resource  # noqa: F401
        assert not hasattr(os, "sysconf")
        assert not hasattr(signal, "SIGPIPE")
        assert not Path("/sys").exists()
        file.replace(other)
    assert other.read_bytes() == b"1"
    assert Path("/proc/self/status").is_file()
    assert memory.STATUS.is_file()
