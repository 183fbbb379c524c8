"""Going on with a saved video: options agree with its state, and new frames follow those that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcingkv import __version__
from forcingkv.commands.console import say
from forcingkv.commands.models import text_input
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.reading import parse_json
from forcingkv.runtime import Session, Video
from forcingkv.runtime.frames import FrameWriter, Kept, RawWriter
from forcingkv.runtime.mp4 import metadata_of, read_fragments
from forcingkv.runtime.pictures import PngWriter, read_record
from forcingkv.runtime.script import PromptRecord, Switch
from forcingkv.runtime.spec import Recache
from forcingkv.runtime.text import TextInput
from forcingkv.runtime.video import open_writer

BUNDLE, SEED, PROMPT = "forcingkv.bundle", "forcingkv.seed", "forcingkv.prompt_digest"
SWITCHES, FIRST = "forcingkv.switches", "forcingkv.first_chunk"
_ANOTHER = "Choose another --out: it gets the rest of the video."


@dataclass(frozen=True)
class Look:
    """How frames are shown."""

    fps: float
    enlarge: int


def look_of(video: Video, model_fps: float, fps: float | None, enlarge: int | None) -> Look:
    """How a saved video is shown, as far as its state knows, and else as the options say.

    Raises InputError where they differ.
    """
    rate = agreed("--fps", fps, video.notes.get("fps")) or model_fps
    return Look(rate, int(agreed("--enlarge", enlarge, video.notes.get("enlarge")) or 1))


def agreed(option: str, given: float | None, saved: str | None) -> float | None:
    """The value of an option, or that of the saved state where it was not given.

    Raises InputError where both are there and differ.
    """
    if saved is None:
        return given
    try:
        known = float(saved)
    except ValueError:
        raise InputError(f"has {saved[:40]!r} for {option}", where="the saved state") from None
    if given is not None and given != known:
        raise _contradiction(option, f"is {given:g}", f"{known:g}")
    return known


def check_prompt(
    session: Session, video: Video, prompt: str | None, embeds: Path | None, *, random: bool = False
) -> None:
    """Refuse a prompt that a saved video does not begin with. `random`: as `text_input` has it."""
    if video.prompt is None:
        raise InputError(
            "was saved by a version that does not keep the prompt, so the one given cannot be compared",
            where="the saved state",
            expected="no --prompt and no --embeds",
        )
    text = text_input(session.spec, prompt, embeds, random=random)
    if PromptRecord.of(session.spec, text)[0].digest != video.prompt.digest:
        option = "--prompt" if prompt is not None else "--embeds"
        raise _contradiction(option, f"is {text.text!r}", str(video.prompt))


def take_switches(
    session: Session,
    video: Video,
    asked: Sequence[tuple[int, TextInput, Recache, int]],
    recache: Recache | None,
) -> None:
    """Let a video make the switches that were asked for: chunk, prompt, recache and chunks of both prompts.

    Those that a saved video has made or is to make are left to it. Raises InputError for a switch that
    contradicts them, and where those to come are not the ones asked for: where none are, `recache` may still
    say how (None: it does not).
    """
    known = {_key(switch): switch for switch in video.switches}
    coming = {key: switch for key, switch in known.items() if switch.chunk >= video.index}
    given = {}
    for chunk, text, how, fade in asked:
        switch = Switch(chunk, PromptRecord.of(session.spec, text)[0], how, fade or None)
        given[_key(switch)] = switch
        if _key(switch) in known:
            continue
        there = [str(other) for other in known.values() if other.chunk == chunk]
        if chunk < video.index and video.prompt is None:
            there = ["what was saved by a version that does not keep switches"]
        if chunk < video.index or there:
            raise _contradiction("--switch", f"asks for {switch}", " and ".join(there) or "no such switch")
        video.switch(text, recache=how, at=chunk, fade=fade)
    left = [switch for key, switch in coming.items() if key not in given]
    if left and (given or (recache and any(switch.recache != recache for switch in left))):
        raise _contradiction("--switch", f"does not ask for {left[0]}", str(left[0]))


def _key(switch: Switch) -> tuple[int, str, Recache, int]:
    return switch.chunk, switch.prompt.digest, switch.recache, switch.fade or 0


def _contradiction(option: str, what: str, saved: str) -> InputError:
    return InputError(
        f"{what}, and the saved video has {saved}",
        where=option,
        expected=f"what the saved state has, or no {option}",
        hint="A saved video goes on as it began; to make another, leave out --restore.",
    )


def about(session: Session, video: Video, first: int) -> dict[str, str]:
    """What a file says of a video whose frames it has from the chunk `first` on."""
    manifest, name = session.bundle.manifest, session.spec.name
    said = {
        "title": (video.prompt.text if video.prompt else None) or name,
        "comment": f"{name}, policy {manifest.policy.name}, seed {video.seed}, forcingkv {__version__}",
        SEED: str(video.seed),
        "forcingkv.model": name,
        "forcingkv.policy": manifest.policy.name,
        BUNDLE: session.bundle.digest,
        "forcingkv.version": __version__,
    }
    if video.prompt:
        said |= {"forcingkv.prompt": video.prompt.text or "", PROMPT: video.prompt.digest}
        said[SWITCHES] = json.dumps([_told(switch) for switch in video.switches])
    said |= {f"forcingkv.{what}": digest for what, digest in video.given_digests.items()}
    return said | ({FIRST: str(first)} if first else {})


def _told(switch: Switch) -> dict[str, Any]:
    prompt = switch.prompt
    told = {
        "chunk": switch.chunk,
        "prompt": prompt.text,
        "prompt_digest": prompt.digest,
        "recache": switch.recache,
    }
    return told | ({"fade": switch.fade} if switch.fade else {})


def writer_for(
    out: str, session: Session, video: Video, look: Look, *, restored: bool
) -> tuple[FrameWriter, int, int]:
    """The writer for a place, which goes on after the frames that a saved video has there already.

    Returns it with the chunk that the frames of the place begin with, and the number of those that stay.
    Raises InputError where the place holds another video, or less than the saved state goes on after.
    """

    def opened(metadata: Mapping[str, str]) -> FrameWriter:
        return open_writer(out, fps=look.fps, enlarge=look.enlarge, metadata=metadata, going_on=restored)

    holds = restored and _holds_something(out)
    first = _first_chunk(opened({}), session, video) if holds else video.index
    writer = opened(about(session, video, first))
    writer.expect(*session.bundle.manifest.frame_size)
    kept = session.spec.frames_of(video.index) - session.spec.frames_of(first)
    if holds and (kept or isinstance(writer, RawWriter)):
        writer.keep(Kept(kept, session.bundle.manifest.frame_size, video.notes.get("last_frame")))
    if restored:
        gets = f"keeps its first {kept} frames, and the rest follows" if kept else "gets the rest alone"
        unknown = "" if video.prompt else " (its state does not know its prompt)"
        say(f"{out} {gets}, from chunk {video.index} on{unknown}", error=True)
    return writer, first, kept


def _holds_something(out: str) -> bool:
    """Whether there is something that is not to be lost: not so for pipes and empty folders."""
    path = Path(out)
    return out != "-" and (path.is_file() or (path.is_dir() and any(path.iterdir())))


def _first_chunk(writer: FrameWriter, session: Session, video: Video) -> int:
    """The chunk that the frames of a place begin with. Raises InputError where it holds another video."""
    first = first_of_file(_metadata(writer), session, video, str(writer.path))
    if isinstance(writer, RawWriter):
        before = session.spec.frames_of(video.index) - session.spec.frames_of(first)
        if writer.frames_there(session.bundle.manifest.frame_size) < before:
            return video.index  # the rest alone, which was begun already: its frames are compared
    return first


def first_of_file(said: Mapping[str, str] | None, session: Session, video: Video, where: str) -> int:
    """The chunk that a file begins with which says that of itself; None: it says nothing, and its frames are
    compared. Raises InputError where it is of another video than the saved one."""
    if said is not None:
        _same_video(said, about(session, video, 0), video.index, where)
    first = video.notes.get("first_chunk", "0") if said is None else said.get(FIRST, "0")
    if not re.fullmatch("[0-9]{1,15}", first) or int(first) > video.index:
        what = f"begins with chunk {first[:20]}, and the saved video goes on with chunk {video.index}"
        raise InputError(what, where=where, hint=_ANOTHER)
    return int(first)


def _metadata(writer: FrameWriter) -> Mapping[str, str] | None:
    """What a place says of its frames; None: it cannot, and they are compared themselves."""
    if isinstance(writer, RawWriter):
        return None
    if not isinstance(writer, PngWriter):
        return metadata_of(writer.path, read_fragments(writer.path))
    record = read_record(writer.path)
    if record is None:
        return None  # the run that wrote it was cut short
    if record.get("fps") != writer.fps:
        what, expected = f"has {record.get('fps')} frames a second", f"{writer.fps:g}"
        raise InputError(what, where=str(writer.path), expected=expected, hint=_ANOTHER)
    said = record.get("metadata")
    return {str(name): str(text) for name, text in said.items()} if isinstance(said, dict) else {}


def _same_video(said: Mapping[str, str], own: Mapping[str, str], index: int, where: str) -> None:
    for name in (BUNDLE, SEED, PROMPT):
        if name not in own:
            what = "cannot be compared with a state of a version that does not keep the prompt"
        elif name not in said:
            what = f"does not say of which video it is (it has no {name})"
        elif said[name] != own[name]:
            shown = said.get("forcingkv.prompt") if name == PROMPT else said[name]
            what = f"is another video: its {name.partition('.')[2].partition('_')[0]} is {shown!r}"
        else:
            continue
        raise InputError(what, where=where, expected="the video of the saved state", hint=_ANOTHER)
    for what in ("noise", "start"):
        if said.get(f"forcingkv.{what}") != own.get(f"forcingkv.{what}"):
            raise InputError(
                f"is another video: its {what} was another",
                where=where,
                expected="the video of the saved state",
                hint=_ANOTHER,
            )
    if list(_before(said.get(SWITCHES), index)) != list(_before(own[SWITCHES], index)):
        what = "is another video: its prompt was switched in another way"
        raise InputError(what, where=where, expected="the video of the saved state", hint=_ANOTHER)


def _before(switches: str | None, index: int) -> Iterator[Any]:
    """The switches in a file's metadata that come before a chunk."""
    try:
        listed = parse_json(switches or "[]", SWITCHES)
        for one in listed:
            if one["chunk"] < index:
                # Earlier versions said yes or no.
                yield {**one, "recache": {True: "replay", False: "none"}.get(one["recache"], one["recache"])}
    except (InputError, TypeError, KeyError):
        yield "unreadable"
