"""One video of a batch: whether it is there, and making it. What a Ray worker does, too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from forcingkv.commands.going_on import BUNDLE, PROMPT, SEED, about
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import new_file, place_to_write
from forcingkv.runtime import Session
from forcingkv.runtime.mp4 import metadata_of, read_fragments
from forcingkv.runtime.script import PromptRecord
from forcingkv.runtime.spec import Dtype, ModelSpec
from forcingkv.runtime.text import TextInput, encode_words, read_embeds
from forcingkv.runtime.video import Mp4Writer

FPS, ENLARGE, LANE = "forcingkv.fps", "forcingkv.enlarge", "forcingkv.computed"


@dataclass(frozen=True)
class VideoToMake:
    """A prompt with one of its seeds."""

    prompt: str
    index: int
    """Which of the prompt's videos."""
    seed: int
    file: str
    """Where it is, for workers in whatever folder."""
    shown: str
    """The same as the user says it."""


@dataclass(frozen=True)
class BatchRun:
    """What all videos of a batch have in common. Small: each worker gets it."""

    bundle: str
    """A folder, which workers on other machines see too."""
    digest: str
    """Of the bundle."""
    chunks: int
    fps: float
    enlarge: int
    embeds: str | None
    backend: str | None
    device: str | None
    provider: str | None
    dtype: Dtype | None
    threads: int | None
    cuda_graphs: bool
    compiled: bool
    lane: str
    """What the user asked to compute in: another one makes another video."""
    has_graphs: bool = True
    """Whether the bundle has any: else torch runs it."""

    @property
    def on_torch(self) -> bool:
        """Whether torch runs it, by `Session.open`'s rule."""
        asked = bool(self.device or self.dtype or self.compiled) and not self.provider
        return self.backend == "torch" or (self.backend is None and (asked or not self.has_graphs))

    def with_threads(self, threads: int) -> Self:
        """The same on so many threads."""
        return replace(self, threads=threads)


def texts(spec: ModelSpec, embeds: str | None) -> Callable[[str], TextInput]:
    """What makes the model's input of a prompt, from a file of embeddings if given: read once.

    It raises InputError for a prompt that there is no embedding of, or with words that the model does not
    know.
    """
    known = read_embeds(Path(embeds)) if embeds else None

    def text(prompt: str) -> TextInput:
        return TextInput(prompt, known.get(prompt, spec) if known else encode_words(spec, prompt))

    return text


class VideoMaker:
    """Makes videos in one session. A context manager.

    Its session is opened with the first video: InputError and SessionError are raised as `Session.open` does.
    """

    _session: Session | None

    def __init__(self, run: BatchRun) -> None:
        self._run, self._session = run, None
        self._text: Callable[[str], TextInput] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()

    def session(self) -> Session:
        """The session, opened when it is first asked for: what is wrong with it a worker can tell then."""
        run = self._run
        if self._session is None:
            self._session = Session.open(
                run.bundle,
                backend=run.backend,
                device=run.device,
                provider=run.provider,
                dtype=run.dtype,
                threads=run.threads,
                cuda_graphs=run.cuda_graphs,
                compiled=run.compiled,
                expect_digest=run.digest,
            )
        return self._session

    def make(self, video: VideoToMake) -> dict[str, Any]:
        """Make one: it has its name once it is whole. Returns what is said of it.

        Raises InputError where it cannot be written, SessionError where the device fails.
        """
        run, session, began = self._run, self.session(), time.perf_counter()
        self._text = self._text or texts(session.spec, run.embeds)
        text = self._text(video.prompt)
        if is_there(video, run, session.spec, text):  # another run has made it meanwhile
            return told(video, session.spec.frames_of(run.chunks), made=False)
        made = session.generate(text, seed=video.seed, chunks=run.chunks)
        said = about(session, made, 0) | {FPS: repr(run.fps), ENLARGE: str(run.enlarge), LANE: run.lane}
        frames = 0
        with (
            new_file(Path(video.file)) as partial,
            Mp4Writer(partial, run.fps, run.enlarge, said) as writer,
        ):
            for chunk in made:
                writer.write(chunk.frames)
                frames += len(chunk.frames)
            # While it is locked: what another run has put there since then is not replaced, but by the same.
            is_there(video, run, session.spec, text)
        seconds = time.perf_counter() - began
        return told(video, frames, made=True) | {"seconds": seconds, "frames_per_second": frames / seconds}


def told(video: VideoToMake, frames: int, *, made: bool) -> dict[str, Any]:
    """What is said of a video; `made`: just now."""
    return {
        "file": video.shown,
        "prompt": video.prompt,
        "index": video.index,
        "seed": video.seed,
        "frames": frames,
        "made": made,
    }


def is_there(video: VideoToMake, run: BatchRun, spec: ModelSpec, text: TextInput) -> bool:
    """Whether a video is there already. Raises InputError where its file is another one, or not whole."""
    path = Path(video.file)
    if not path.exists():
        return False
    try:
        other = _what_is_other(place_to_write(path), video, run, spec, text)
    except InputError as error:
        other = f"is no video of such a batch: it {error.what}"
    if other:
        raise InputError(other, where=video.shown, hint="Choose another --out, or remove it.")
    return True


def _what_is_other(
    path: Path, video: VideoToMake, run: BatchRun, spec: ModelSpec, text: TextInput
) -> str | None:
    """What tells the file from that video; None: nothing. Raises InputError for what is no video of ours."""
    found = read_fragments(path)
    said = metadata_of(path, found)
    wanted = {
        BUNDLE: run.digest,
        SEED: str(video.seed),
        PROMPT: PromptRecord.of(spec, text)[0].digest,
        FPS: repr(run.fps),
        ENLARGE: str(run.enlarge),
        LANE: run.lane,
    }
    for name, value in wanted.items():
        if name not in said:
            return f"is no video of such a batch: it does not say its {name.removeprefix('forcingkv.')}"
        if said[name] != value:
            return f"is another video: {name.removeprefix('forcingkv.')} is {said[name]}, not {value}"
    if found.torn:
        return "is damaged: its end is no part of a video"
    if found.frames != spec.frames_of(run.chunks):
        return f"is another video: it has {found.frames} frames, not {spec.frames_of(run.chunks)}"
    return None
