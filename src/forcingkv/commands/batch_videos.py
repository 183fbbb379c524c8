"""One video of a batch: whether it is there, and making it. What a Ray worker does, too."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from forcingkv.commands.going_on import BUNDLE, PROMPT, SEED, about
from forcingkv.commands.models import text_input
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import new_file
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.mp4 import metadata_of, read_fragments
from forcingkv.runtime.script import PromptRecord
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.video import Mp4Writer


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
    dtype: Any
    threads: int | None
    cuda_graphs: bool = False
    compiled: bool = False

    def with_threads(self, threads: int) -> Self:
        return replace(self, threads=threads)

    @classmethod
    def of(cls, bundle: Bundle, seconds: float, fps: float | None, enlarge: int, embeds: Path | None, on: LaneOptions) -> Self:
        """Of a bundle that is opened. `seconds` as they are shown, at `fps` frames a second (None: the model's)."""
        spec = bundle.plan.spec
        rate = fps or spec.fps
        return cls(
            str(bundle.path.resolve()),
            bundle.digest,
            spec.chunks_for(seconds * (rate / spec.fps)),
            rate,
            enlarge,
            None if embeds is None else str(embeds.resolve()),
            on.backend or None,
            on.device,
            on.provider,
            on.dtype,
            on.threads,
            on.cuda_graphs,
            on.compiled,
        )


class VideoMaker:
    """Makes videos in one session. A context manager."""

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @property
    def runs_on(self) -> str:
        return self._session.runs_on

    def make(self, video: VideoToMake) -> dict[str, Any]:
        """Make one: it has its name once it is whole. Returns what is said of it."""
        run, session, began = self._run, self._session, time.perf_counter()
        embeds = None if run.embeds is None else Path(run.embeds)
        text = text_input(session.spec, video.prompt, embeds)
        made = session.generate(text, seed=video.seed, chunks=run.chunks)
        frames = 0
        with (
            new_file(Path(video.file)) as partial,
            Mp4Writer(partial, run.fps, run.enlarge, about(session, made, 0)) as writer,
        ):
            for chunk in made:
                writer.write(chunk.frames)
                frames += len(chunk.frames)
        seconds = time.perf_counter() - began
        return {
            "file": video.file,
            "prompt": video.prompt,
            "index": video.index,
            "seed": video.seed,
            "frames": frames,
            "seconds": seconds,
            "frames_per_second": frames / seconds,
        }


def is_there(video: VideoToMake, run: BatchRun, spec: ModelSpec) -> bool:
    """Whether a video of that model is there already. Raises InputError where its file is of another one."""
    path = Path(video.file)
    if not path.exists():
        return False
    text = text_input(spec, video.prompt, None if run.embeds is None else Path(run.embeds))
    found = read_fragments(path)
    said = metadata_of(path, found)
    wanted = {BUNDLE: run.digest, SEED: str(video.seed), PROMPT: PromptRecord.of(spec, text)[0].digest}
    other = [name for name, value in wanted.items() if said.get(name) != value]
    if not other and found.frames != spec.frames_of(run.chunks):
        other = [f"{found.frames} frames, not {spec.frames_of(run.chunks)}"]
    if other:
        raise InputError(
            f"is another video ({other[0]})",
            where=str(path),
            hint="Choose another --out, or remove it.",
        )
    return True
