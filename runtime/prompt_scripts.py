"""Scripts of videos whose prompt is switched on the way, as LongLive has them: a JSON object a line.

{"prompts": ["a dog runs", "the dog sits down"], "switch_frame_indices": [40]}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.headmaps.reading import parse_json
from forcingkv.runtime.prompts import read_text

FORM = '{"prompts": ["...", "..."], "switch_frame_indices": [40]}'
MOST_INDEX = 1 << 40


@dataclass(frozen=True)
class PromptScript:
    """The prompts of one video."""

    prompts: tuple[str, ...]
    """In their order, one at least."""
    frames: tuple[int, ...]
    """For each prompt but the first the latent frame with which it begins."""
    where: str
    """File and line, for messages."""

    def chunks(self, frames_per_chunk: int) -> tuple[int, ...]:
        """For each prompt but the first the chunk with which it begins: the first that begins at its frame or
        later. A chunk begins with one switch at most: a second one waits for the next chunk."""
        chunks: list[int] = []
        for frame in self.frames:
            chunks.append(max(-(-frame // frames_per_chunk), chunks[-1] + 1 if chunks else 0))
        return tuple(chunks)


def read_script(path: Path, line: int | None = None) -> PromptScript:
    """The script of one video, of a file that has one a line; `line`: which, counted from 1 as editors do.

    Raises InputError for a file that is not of that form, for indices that are not whole numbers above 0 in
    rising order, one for each prompt but the first, and for several scripts where no line is said.
    """
    lines = {n: text for n, text in enumerate(read_text(path).split("\n"), 1) if text.strip()}
    if not lines:
        raise InputError("is empty", where=str(path), expected=f"a line of the form {FORM}")
    if line is None and len(lines) > 1:
        raise InputError(
            f"has {len(lines)} videos, a line each",
            where=str(path),
            expected="one, or which of them",
            hint=f"Choose one: --script-line {min(lines)}.",
        )
    number = next(iter(lines)) if line is None else line
    if number not in lines:
        listed = ", ".join(map(str, [*lines][:20])) + (", ..." if len(lines) > 20 else "")
        raise InputError(f"has no video in line {number}", where=str(path), expected=f"one of {listed}")
    where = f"{path}, line {number}"
    return _script(parse_json(lines[number], where), where)


def _script(data: Any, where: str) -> PromptScript:
    prompts = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise InputError("is not the script of a video", where=where, expected=FORM)
    frames = data.get("switch_frame_indices", [])
    if not isinstance(frames, list):
        what = f"switch_frame_indices is {shown(frames)}"
        raise InputError(what, where=where, expected="a list of latent frames, such as [40, 80]")
    if len(frames) != len(prompts) - 1:
        count = f"{len(prompts)} prompt{'s'[: len(prompts) > 1]}"
        what = f"has {count} and {len(frames)} of switch_frame_indices"
        raise InputError(what, where=where, expected=f"{len(prompts) - 1}, one for each prompt but the first")
    before = 0
    for frame in frames:
        if type(frame) is not int or not 0 < frame <= MOST_INDEX:
            what = f"switch_frame_indices has {shown(frame)}"
            raise InputError(what, where=where, expected="latent frames: whole numbers above 0")
        if frame <= before:
            what = f"switch_frame_indices has {frame} after {before}"
            raise InputError(what, where=where, expected="latent frames in rising order")
        before = frame
    return PromptScript(tuple(prompt.strip() for prompt in prompts), tuple(frames), where)
