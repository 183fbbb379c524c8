"""`generate --restore`: the video that is gone on with is the one that was never interrupted."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from forcingkv.runtime import Session
from forcingkv.runtime.mp4 import read_fragments
from forcingkv.runtime.tensors import TensorWriter
from forcingkv.runtime.video import Mp4Writer
from tests.conftest import Ran
from tests.runtime.conftest import small_bundle

Run = Callable[..., Ran]
SEED, CHUNKS, SAVED = 7, 7, 4
"""The state is saved after four chunks of three frames; the run is killed after six of seven."""
OUTS = ("a.mp4", "a", "a.rgb")
SWITCHES = ("--switch", "0.3:d e", "--switch", "1.1:b")
"""From chunks 2 and 6 on: one before the state, one to come."""


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Frames of 12x8 pixels, three a chunk, at 16 frames a second."""
    return small_bundle("forcing-kv")


Words = Callable[..., list[object]]


@pytest.fixture(scope="module")
def words(bundle: Path) -> Words:
    """The command for a video of that many chunks in a folder, which saves its state beside it."""

    def given(folder: Path, out: str, *more: object, chunks: int = CHUNKS) -> list[object]:
        what = ["--prompt", "a b c", "--seed", SEED, "--enlarge", 2, "--fps", 16, *SWITCHES]
        saving = ["--save", folder / "state", "--save-every", SAVED]
        where = ["--bundle", bundle, "--out", folder / out]
        return ["generate", *where, *what, "--seconds", chunks * 3 / 16, *saving, *more]

    return given


@pytest.fixture(scope="module")
def made(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `whole` and `cut`: each kind of output of the whole video, and of one that was killed after six
    chunks, with the state after four of them."""
    from forcingkv import __main__ as command_line

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        for name, chunks in (("whole", CHUNKS), ("cut", 6)):
            for out in OUTS:
                given = words(folder / name, out, chunks=chunks)
                patch.setattr("sys.argv", ["forcingkv", *map(str, given)])
                with pytest.raises(SystemExit, match="0"):
                    command_line.main()
    (folder / "cut" / "a" / "frames.json").unlink()  # it comes last
    (folder / "cut" / "a" / ".frame-000019.png.0123abcd.new.forcingkv").write_bytes(b"half")
    return folder


@pytest.fixture
def cut(made: Path, tmp_path: Path) -> Path:
    """A copy of what is left of the killed runs, to go on with."""
    return Path(shutil.copytree(made / "cut", tmp_path / "cut"))


def content(path: Path) -> dict[str, bytes]:
    """All files of an output by their names."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("out", OUTS)
def test_the_same_words_with_restore_give_the_uninterrupted_video(
    out: str, words: Words, made: Path, cut: Path, run: Run
) -> None:
    wanted = content(made / "whole" / out)
    ran = run(*words(cut, out, "--restore", cut / "state", "--json"))
    assert ran.code == 0, ran.err
    assert content(cut / out) == wanted
    result = json.loads(ran.out)
    assert (result["kept_frames"], result["frames"], result["warnings"]) == (12, 9, [])
    assert f"{cut / out} keeps its first 12 frames, and the rest follows, from chunk 4 on" in ran.err
    # Once more from the same state, with nothing said again: it knows all, the switch to come among it.
    bare = ["generate", "--bundle", words(cut, out)[2], "--out", cut / out, "--restore", cut / "state"]
    longer = run(*bare, "--seconds", (CHUNKS + 1) * 3 / 16)
    assert longer.code == 0, longer.err
    found = content(cut / out)
    if out == "a":
        assert len(found) == len(wanted) + 3
        assert found.items() >= {n: c for n, c in wanted.items() if n != "frames.json"}.items()
    else:
        assert found[""].startswith(wanted[""])
        assert len(found[""]) > len(wanted[""])


def test_the_frames_are_those_of_a_session(bundle: Path, made: Path) -> None:
    """What the tests above compare with is right: switches of the command line are made in time."""
    with Session.open(bundle) as session:
        video = session.generate("a b c", seed=SEED, chunks=CHUNKS)
        frames = []
        for chunk in video:
            frames.append(chunk.frames)
            if video.index in (2, 6):
                video.switch({2: "d e", 6: "b"}[video.index])
    wanted = np.concatenate(frames).repeat(2, 1).repeat(2, 2)
    assert (made / "whole" / "a.rgb").read_bytes() == wanted.tobytes()


def test_a_fragment_needs_none_before_it(made: Path, tmp_path: Path) -> None:
    """The frames of an mp4 from a fragment on are decoded alike with and without those before."""
    path = made / "whole" / "a.mp4"
    found = read_fragments(path)
    assert [fragment.frames for fragment in found.all] == [3] * CHUNKS
    content = path.read_bytes()
    alone = tmp_path / "alone.mp4"
    alone.write_bytes(found.head + content[found.all[4].start :])
    assert np.array_equal(pictures(alone), pictures(path)[12:])


def pictures(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def about(path: Path) -> dict[str, str]:
    with av.open(str(path)) as video:
        return dict(video.metadata)


def test_a_video_says_its_prompts(made: Path) -> None:
    said = about(made / "whole" / "a.mp4")
    assert said["forcingkv.prompt"] == said["title"] == "a b c"
    switches = [
        (one["chunk"], one["prompt"], one["recache"]) for one in json.loads(said["forcingkv.switches"])
    ]
    assert switches == [(2, "d e", "replay"), (6, "b", "replay")]
    assert said == about(made / "cut" / "a.mp4")


@pytest.mark.parametrize("out", OUTS)
def test_a_new_place_gets_the_rest_alone_and_can_be_gone_on_with(
    out: str, words: Words, made: Path, cut: Path, run: Run
) -> None:
    place = out.replace("a", "rest", 1)
    for chunks in (5, CHUNKS):  # the second run finds the rest that the first one began
        ran = run(*words(cut, place, "--restore", cut / "state", chunks=chunks))
        assert ran.code == 0, ran.err
        assert "gets the rest alone, from chunk 4 on" in ran.err
    if out == "a.rgb":
        whole = (made / "whole" / out).read_bytes()
        assert (cut / place).read_bytes() == whole[12 * len(whole) // 21 :]
    elif out == "a":
        wanted = [file for name, file in content(made / "whole" / out).items() if name.endswith("png")]
        assert list(content(cut / place).values())[:9] == wanted[12:]
        assert (
            json.loads((cut / place / "frames.json").read_text())["metadata"]["forcingkv.first_chunk"] == "4"
        )
    else:
        assert np.array_equal(pictures(cut / place), pictures(made / "whole" / out)[12:])
        assert about(cut / place)["forcingkv.first_chunk"] == "4"


@pytest.mark.parametrize("out", OUTS)
def test_a_rest_that_was_saved_goes_on_after_its_own_frames(
    out: str, words: Words, made: Path, cut: Path, run: Run
) -> None:
    place = out.replace("a", "rest", 1)
    saving = ("--save", cut / "state", "--save-every", 5)
    assert run(*words(cut, place, "--restore", cut / "state", *saving, chunks=6)).code == 0
    ran = run(*words(cut, place, "--restore", cut / "state"))
    assert ran.code == 0, ran.err
    assert "keeps its first 3 frames" in ran.err
    whole = made / "whole" / out
    if out == "a.rgb":
        assert (cut / place).read_bytes() == whole.read_bytes()[12 * len(whole.read_bytes()) // 21 :]
    elif out == "a":
        assert [*content(cut / place).values()][:9] == [*content(whole).values()][12:21]
    else:
        assert np.array_equal(pictures(cut / place), pictures(whole)[12:])


def tail(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Spoils the end of what the killed run left."""

    def spoil(path: Path) -> None:
        path = path / "frame-000018.png" if path.is_dir() else path
        path.write_bytes(change(path.read_bytes()))

    return spoil


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(tail(lambda content: content[:-7]), id="cut short"),
        pytest.param(tail(lambda content: content + bytes(8) + b"moof"), id="a write that was cut off"),
    ],
)
def test_a_damaged_end_is_cut_off(
    out: str, spoil: Callable[[Path], object], words: Words, made: Path, cut: Path, run: Run
) -> None:
    spoil(cut / out)
    ran = run(*words(cut, out, "--restore", cut / "state"))
    assert ran.code == 0, ran.err
    assert content(cut / out) == content(made / "whole" / out)


def shorten(path: Path) -> None:
    """Leaves less than the twelve frames that the state goes on after."""
    if path.is_dir():
        (path / "frame-000012.png").unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)


def another(seed: int) -> Callable[[Path], object]:
    """A video of the same look with that seed in its place."""

    def replace(path: Path) -> None:
        frames = np.random.default_rng(seed).integers(0, 256, (18, 16, 24, 3), np.uint8)
        if path.suffix == ".rgb":
            path.write_bytes(frames.tobytes())
        elif path.suffix == ".mp4":
            with Mp4Writer(path, 16.0) as writer:
                writer.write(frames)
        else:
            shutil.copy(path / "frame-000001.png", path / "frame-000012.png")

    return replace


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (shorten, (), "expected 12 or more, which the saved state goes on after"),
        (another(0), (), "of which video it is|not known to be the one that the saved video has there"),
        (lambda path: None, ("--fps", 8), "--fps is 8, and the saved video has 16"),
        (lambda path: None, ("--enlarge", 3), "--enlarge is 3, and the saved video has 2"),
        (lambda path: None, ("--seed", 8), "--seed is 8, and the saved video has 7"),
        (lambda path: None, ("--prompt", "a b"), "--prompt is 'a b', and the saved video has 'a b c'"),
        (lambda path: None, ("--switch", "0.5:e"), "asks for 'e' from chunk 3 on, .* no such switch"),
        (lambda path: None, ("--no-recache",), "asks for 'd e' from chunk 2 on without rebuilding, .* 'd e'"),
        (lambda path: None, ("--seconds", 0.5), "the saved video is complete"),
        (lambda path: None, ("--backend", "nosuch"), "nosuch"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_lost(
    out: str,
    spoil: Callable[[Path], object],
    more: tuple[object, ...],
    message: str,
    words: Words,
    cut: Path,
    run: Run,
) -> None:
    if out == "a.rgb" and spoil is shorten:
        message = "holds other frames than the rest of the saved video"
    spoil(cut / out)
    before = content(cut / out), content(cut / "state")
    ran = run(*words(cut, out, "--restore", cut / "state", *more))
    assert ran.code == 2
    assert re.search(message, ran.err), ran.err
    assert (content(cut / out), content(cut / "state")) == before


@pytest.mark.parametrize("out", OUTS)
def test_a_new_switch_to_come_is_taken_and_said(
    out: str, words: Words, cut: Path, tmp_path: Path, run: Run
) -> None:
    """An mp4 gets a new head then, and the frames that it has stay."""
    new = ("--switch", "0.9:c")
    assert run(*words(tmp_path / "wanted", out, *new)).code == 0
    ran = run(*words(cut, out, "--restore", cut / "state", *new))
    assert ran.code == 0, ran.err
    assert content(cut / out) == content(tmp_path / "wanted" / out)
    assert sorted(os.listdir(cut)) == sorted([*OUTS, "state"])


def older(state: Path) -> None:
    """Makes a state what it was before states knew their prompt."""
    known = json.loads((state / "state.json").read_text())
    for name in ("prompt", "switches", "planned", "notes", "digest"):
        del known[name]
    (state / "state.json").write_text(json.dumps(known))


@pytest.mark.parametrize("out", OUTS)
def test_a_state_of_an_earlier_version_gives_the_rest_alone(
    out: str, bundle: Path, made: Path, cut: Path, run: Run
) -> None:
    older(cut / "state")
    bare = ["generate", "--bundle", bundle, "--restore", cut / "state", "--enlarge", 2, "--seconds", 1]
    before = content(cut / out)
    ran = run(*bare, "--out", cut / out)
    assert ran.code == 2
    assert "cannot be compared" in ran.err or "its state does not know its frames" in ran.err
    for more, message in (
        (
            ("--prompt", "a b c"),
            "a version that does not keep the prompt, so the one given cannot be compared",
        ),
        (("--switch", "0.3:d e"), "what was saved by a version that does not keep switches"),
    ):
        ran = run(*bare, "--out", cut / f"new-{out}", *more)
        assert (ran.code, message in ran.err) == (2, True), ran.err
    assert content(cut / out) == before
    new = cut / out.replace("a", "rest", 1)
    ran = run(*bare, "--out", new)
    assert ran.code == 0, ran.err
    assert "from chunk 4 on (its state does not know its prompt)" in ran.err
    if out == "a.mp4":
        assert "forcingkv.prompt" not in about(new)
        assert np.array_equal(pictures(new)[:6], pictures(made / "whole" / out)[12:18])


def test_a_state_that_cannot_be_saved_is_a_warning(
    words: Words, made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The video goes on, and the state before stays."""
    calls = []

    def fails_from_the_second_on(self: Any, name: str, data: Any) -> None:
        calls.append(name)
        if len(set(calls)) != len(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, data)

    write = TensorWriter.write
    monkeypatch.setattr(TensorWriter, "write", fails_from_the_second_on)
    ran = run(*words(tmp_path, "a.mp4", "--save-every", 2, "--json"))
    assert ran.code == 0, ran.err
    assert (tmp_path / "a.mp4").read_bytes() == (made / "whole" / "a.mp4").read_bytes()
    told = json.loads(ran.out)["warnings"]
    assert [f"before chunk {n}" in text for n, text in zip((4, 6), told, strict=True)] == [True, True]
    assert all(f"warning: {text}" in ran.err and "No space left on device" in text for text in told)
    assert sorted(os.listdir(tmp_path / "state")) == ["state-000002.safetensors", "state.json"]
    monkeypatch.undo()
    os.truncate(tmp_path / "a.mp4", read_fragments(tmp_path / "a.mp4").all[3].end)
    assert run(*words(tmp_path, "a.mp4", "--restore", tmp_path / "state")).code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (made / "whole" / "a.mp4").read_bytes()


def test_a_place_for_states_that_cannot_be_one_is_refused_first(
    words: Words, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes.txt").write_text("mine")
    ran = run(*words(tmp_path, "a.mp4"))
    assert (ran.code, "holds other files than a saved state (notes.txt)" in ran.err) == (2, True)
    ran = run(*words(tmp_path, "a.mp4", "--save", tmp_path / "state" / "notes.txt" / "s"))
    assert (ran.code, "cannot be written (Not a directory)" in ran.err) == (2, True)
    assert os.listdir(tmp_path) == ["state"]
