"""Scripts of prompts, as LongLive has them: what they say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime.prompt_scripts import read_script


def script(folder: Path, *lines: object) -> Path:
    path = folder / "interactive.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def said(frames: object, prompts: object = ("a", "b", "c")) -> dict[str, object]:
    return {"prompts": prompts, "switch_frame_indices": frames}


@pytest.mark.parametrize(
    ("frames", "size", "chunks"),
    [
        ([40, 80], 3, (14, 27)),
        ([3, 6], 3, (1, 2)),
        ([1, 2], 3, (1, 2)),
        ([4, 5], 3, (2, 3)),
        ([40, 80], 1, (40, 80)),
    ],
)
def test_a_switch_waits_for_a_chunk_of_its_own(
    tmp_path: Path, frames: list[int], size: int, chunks: tuple[int, ...]
) -> None:
    """The first that begins at its frame or later, and one switch a chunk: as LongLive's loop."""
    one = read_script(script(tmp_path, said(frames)))
    assert one.prompts == ("a", "b", "c")
    assert one.chunks(size) == chunks


def test_one_prompt_needs_no_switches_and_other_fields_are_passed_over(tmp_path: Path) -> None:
    one = read_script(script(tmp_path, "", {"prompts": [" a dog "], "id": 7}, ""))
    assert (one.prompts, one.frames) == (("a dog",), ())
    assert one.where.endswith("interactive.jsonl, line 2")


def test_one_of_several_videos(tmp_path: Path) -> None:
    path = script(tmp_path, said([3, 6]), "", said([9, 12], ["d", "e", "f"]))
    assert read_script(path, 3).prompts == ("d", "e", "f")
    with pytest.raises(InputError, match=r"has 2 videos, a line each; expected one.*--script-line 1"):
        read_script(path)
    with pytest.raises(InputError, match="has no video in line 2; expected one of 1, 3"):
        read_script(path, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (said([6, 3]), "switch_frame_indices has 3 after 6; expected latent frames in rising order"),
        (said([6, 6]), "switch_frame_indices has 6 after 6"),
        (said([6]), "has 3 prompts and 1 of switch_frame_indices; expected 2"),
        ({"prompts": ["a", "b"]}, "has 2 prompts and 0 of switch_frame_indices; expected 1"),
        (said([], ["a", "b"]), "has 2 prompts and 0 of"),
        (said([3], ["a"]), "has 1 prompt and 1 of switch_frame_indices; expected 0"),
        (said([3, 6.0]), "has 6.0; expected latent frames: whole numbers above 0"),
        (said([True, 6]), "has True; expected"),
        (said([0, 6]), "has 0; expected"),
        (said([-3, 6]), "has -3; expected"),
        (said(["3", 6]), "has '3'; expected"),
        (said([3, 1 << 60]), "has 1152921504606846976; expected"),
        (said("3, 6"), "switch_frame_indices is '3, 6'; expected a list of latent frames"),
        (said([3, 6], ["a", 1, "b"]), "is not the script of a video"),
        (said([], []), "is not the script of a video"),
        ({"prompt": "a"}, "is not the script of a video"),
        ("[1]", "is not the script of a video"),
        ("a dog runs", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_script_is_refused_with_its_line(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read_script(script(tmp_path, line))
    assert "interactive.jsonl, line 1" in str(raised.value)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InputError, match="is empty"):
        read_script(path)
    path.write_bytes(b"\xff\xfe{\0")
    with pytest.raises(InputError, match="is UTF-16 text; expected UTF-8"):
        read_script(path)
    with pytest.raises(InputError):
        read_script(tmp_path / "nowhere.jsonl")
