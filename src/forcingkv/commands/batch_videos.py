"""One video of a batch: whether it is there, and making it. What a Ray worker does, too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from forcingkv.commands.going_on import BUNDLE, PROMPT, SEED, about
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import new_file
from forcingkv.runtime import Session
from forcingkv.runtime.mp4 import metadata_of, read_fragments
from forcingkv.runtime.script import PromptRecord
from forcingkv.runtime.spec import Dtype, ModelSpec
from forcingkv.runtime.text import TextInput, encode_words, read_embeds
from forcingkv.runtime.video import Mp4Writer

FPS, ENLARGE = "forcingkv.fps", "forcingkv.enlarge"


@dataclass(frozen=True)
class VideoToMake:
    """A prompt with one of its seeds."""

    prompt: str
    index: int
    """Which of the prompt's videos."""
    seed: int
    file: str


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

    Raises InputError and SessionError as `Session.open` does.
    """

    def __init__(self, run: BatchRun) -> None:
        self._run = run
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
        self._text = texts(self._session.spec, run.embeds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @property
    def runs_on(self) -> str:
        """What the session runs on, in words."""
        return self._session.runs_on

    def make(self, video: VideoToMake) -> dict[str, Any]:
        """Make one: it has its name once it is whole. Returns what is said of it.

        Raises InputError where it cannot be written, SessionError where the device fails.
        """
        run, session, began = self._run, self._session, time.perf_counter()
        made = session.generate(self._text(video.prompt), seed=video.seed, chunks=run.chunks)
        said = about(session, made, 0) | {FPS: repr(run.fps), ENLARGE: str(run.enlarge)}
        frames = 0
        with (
            new_file(Path(video.file)) as partial,
            Mp4Writer(partial, run.fps, run.enlarge, said) as writer,
        ):
            for chunk in made:
                writer.write(chunk.frames)
                frames += len(chunk.frames)
        seconds = time.perf_counter() - began
        return told(video, frames, made=True) | {"seconds": seconds, "frames_per_second": frames / seconds}


def told(video: VideoToMake, frames: int, *, made: bool) -> dict[str, Any]:
    """What is said of a video; `made`: just now."""
    return {
        "file": video.file,
        "prompt": video.prompt,
        "index": video.index,
        "seed": video.seed,
        "frames": frames,
        "made": made,
    }


def is_there(video: VideoToMake, run: BatchRun, spec: ModelSpec, text: TextInput) -> bool:
    """Whether a video is there already. Raises InputError where its file is another one."""
    path = Path(video.file)
    if not path.exists():
        return False
    found = read_fragments(path)
    said = metadata_of(path, found)
    wanted = {
        BUNDLE: run.digest,
        SEED: str(video.seed),
        PROMPT: PromptRecord.of(spec, text)[0].digest,
        FPS: repr(run.fps),
        ENLARGE: str(run.enlarge),
    }
    other = [
        f"{name.removeprefix('forcingkv.')} is {said.get(name)}, not {value}"
        for name, value in wanted.items()
        if said.get(name) != value
    ]
    if found.frames != spec.frames_of(run.chunks):
        other.append(f"it has {found.frames} frames, not {spec.frames_of(run.chunks)}")
    if other:
        hint = "Choose another --out, or remove it."
        raise InputError(f"is another video: {other[0]}", where=str(path), hint=hint)
    return True
