"""How a video of a client begins: what was asked for, checked before anybody waits for a place."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from forcingkv.runtime import Session, Video
from forcingkv.runtime.clip_starts import picture_start
from forcingkv.runtime.text import Prompt
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.engine import Engine
from forcingkv.serve.frame_coding import FrameCoder
from forcingkv.serve.messages import Start, Started
from forcingkv.serve.refusals import RefusalError
from forcingkv.serve.states import SavedState


class Named(Protocol):
    """A session, as a client finds it again."""

    id: str
    key: str


@dataclass(frozen=True)
class Beginning:
    """What a video begins with."""

    bundle: ServedBundle
    start: Start
    prompts: tuple[tuple[int, Prompt], ...]
    """By the chunk they begin with; the first is of chunk 0, but where a state goes on."""
    picture: bytes | None = None
    state: SavedState | None = None
    folder: Path = Path()
    """For the picture, while it is read."""

    def video(self, session: Session) -> Video:
        """Begin it in a session. Raises InputError for what only the session can find out."""
        start = self.start
        if self.state:
            video = session.restore(self.state.folder, chunks=start.chunks)
            later = self.prompts
        else:
            (_, first), *rest = self.prompts
            latents = None
            if self.picture is not None:
                with _file(self.folder, self.picture) as path:
                    latents, _ = picture_start(session, path)
            video = session.generate(first, seed=start.seed, chunks=start.chunks, start=latents)
            later = tuple(rest)
        for chunk, prompt in later:
            video.switch(prompt, at=chunk)
        return video


async def check_start(engine: Engine, start: Start, picture: bytes | None) -> Beginning:
    """What a client asked for, with its prompts as the model takes them.

    Raises RefusalError and InputError for what cannot be begun.
    """
    state = await engine.aside(engine.states.find, start.state) if start.state else None
    if state and start.bundle not in (None, state.bundle):
        raise RefusalError(
            "bad_request", f"The state is of the bundle {state.bundle!r}, not of {start.bundle!r}."
        )
    bundle = engine.bundle(state.bundle if state else start.bundle)
    lines = [(line.chunk, line.prompt) for line in start.script]
    if state and (start.prompt is not None or picture is not None):
        raise RefusalError("bad_request", "A state has its own prompt and pictures: give neither.")
    if not state and start.prompt is not None:
        lines.insert(0, (0, start.prompt))
    chunks = [chunk for chunk, _ in lines]
    if chunks != sorted(set(chunks)):
        raise RefusalError("bad_request", "The prompts of a script begin with chunks that rise.")
    if not state and chunks[:1] != [0]:
        raise RefusalError(
            "bad_request", "There is no prompt: give one, or a script whose first line is of chunk 0."
        )
    if start.chunks is not None and chunks and chunks[-1] >= start.chunks:
        raise RefusalError(
            "bad_request", f"The script goes to chunk {chunks[-1]}, behind the end of the video."
        )
    if len(lines) > engine.limits.script:
        raise RefusalError("too_large", f"A script has at most {engine.limits.script} prompts.")
    if picture is not None and not bundle.info.picture:
        raise RefusalError(
            "bad_request", f"The bundle {bundle.name!r} has no encoder, which a picture takes."
        )
    prompts = [(chunk, await engine.prompt(bundle, words)) for chunk, words in lines]
    return Beginning(bundle, start, tuple(prompts), picture, state, engine.scratch)


def words_at(video: Video, chunk: int | None = None) -> str:
    """The words that a chunk follows; None: those of the chunk that comes next."""
    at = video.index if chunk is None else chunk
    records = [video.prompt, *(switch.prompt for switch in video.switches if switch.chunk <= at)]
    last = records[-1]
    return (last.text or "") if last else ""


def started(session: Named, beginning: Beginning, video: Video, coder: FrameCoder) -> Started:
    """What a client is told when its video begins."""
    bundle, start = beginning.bundle, beginning.start
    return Started(
        session=session.id,
        key=session.key,
        bundle=bundle.name,
        prompt=words_at(video),
        seed=video.seed,
        chunks=video.chunks,
        next_chunk=video.index,
        frames=start.frames,
        codec=coder.codec,
        width=coder.width,
        height=coder.height,
        fps=bundle.bundle.plan.spec.fps,
        parts=len(coder.head),
    )


@contextmanager
def _file(folder: Path, picture: bytes) -> Iterator[Path]:
    """A picture of a client as a file of a name of our own."""
    path = folder / f"{secrets.token_hex(8)}.picture"
    path.write_bytes(picture)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
