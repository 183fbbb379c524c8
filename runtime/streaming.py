"""A video on its way: its chunks in order, its switches of prompts, and saving it."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.chunks import ChunkMaker, NoiseSource, PendingChunk
from forcingkv.runtime.faults import MemoryShortError
from forcingkv.runtime.given import GivenNoise, start_digest
from forcingkv.runtime.kv.rebuild import kept_chunks
from forcingkv.runtime.positions import Floats, chunk_noise
from forcingkv.runtime.recaching import check_recache, make_anew
from forcingkv.runtime.results import Chunk
from forcingkv.runtime.script import PromptRecord, Script, Switch, check_fade, recache_of
from forcingkv.runtime.snapshot import write_snapshot
from forcingkv.runtime.sources import Source
from forcingkv.runtime.spec import Recache
from forcingkv.runtime.text import Prompt

if TYPE_CHECKING:
    from forcingkv.runtime.session import Session


@dataclass(frozen=True)
class Start:
    """What a video begins with, which is given and not generated: whole chunks, or frames of the first."""

    chunks: int
    latents: Mapping[int, Floats]
    """Of each that was not begun when the video was, or was saved: (1, channels, frames, height, width)."""
    digest: str | None
    """Of all of them (`given.start_digest`)."""
    held: Floats | None = None
    """First frames of chunk 0, fewer than it has."""

    @classmethod
    def of(cls, latents: Floats, frames_per_chunk: int) -> Self:
        """Of latents as `given.check_start` gives them."""
        if latents.shape[2] < frames_per_chunk:
            return cls(0, {}, start_digest(latents), latents)
        parts = np.split(latents, latents.shape[2] // frames_per_chunk, axis=2)
        return cls(len(parts), dict(enumerate(map(np.ascontiguousarray, parts))), start_digest(latents))

    def begin(self, maker: ChunkMaker) -> None:
        """Let a session's memory know what its chunks are to begin with."""
        maker.given = self.chunks
        if self.held is not None:
            maker.hold(self.held)


NO_START = Start(0, {}, None)


class Video:
    """A video on its way. Iterate over it for its chunks; `Session.generate` and `Session.restore` make it.

    Attributes:
        seed: of the noise.
        given: how many chunks at its start were given, and not generated.
        held: how many frames of its first chunk were, if no whole chunks.
        index: of the chunk that is handed out next.
        notes: what the program that saved it wanted to find again; nothing, if it was not restored.
    """

    def __init__(
        self,
        session: Session,
        seed: int,
        chunks: float | None,
        noise: NoiseSource | GivenNoise | None,
        script: Script,
        start: Start = NO_START,
        source: Source | None = None,
    ) -> None:
        """For the session. It is asked for its memory each time: a video that has ended keeps none of it."""
        seed = operator.index(seed)  # numpy's whole numbers would not go into JSON
        if seed < 0:
            raise InputError(f"is {seed}", where="seed", expected="0 or more")
        self.seed, self.given, self._start = seed, start.chunks, start
        self.held = 0 if start.held is None else start.held.shape[2]
        self._source = source
        self._given_noise = noise if isinstance(noise, GivenNoise) else None
        self.chunks = chunks
        self.index, self._script = 0, script
        self.notes: Mapping[str, str] = {}
        self._session, self._token = session, object()
        self._own_noise = None if isinstance(noise, GivenNoise) else noise
        self._begun = 0
        """Chunks whose passes were put into the queue."""
        self._pending: deque[PendingChunk] = deque()
        self._ready: deque[Chunk] = deque()
        self._latents: dict[int, Floats] = {}
        """Of the chunks that a rebuild of the cache needs, in order."""
        self._failed = False

    @property
    def chunks(self) -> int | None:
        """How many there will be, given ones among them; None: without end. May be set while it goes on.

        Raises InputError for what is no number of chunks, for fewer than are given, and for more than there
        is noise for.
        """
        return self._chunks

    @chunks.setter
    def chunks(self, chunks: float | None) -> None:
        count = _whole(chunks)
        if count is not None and count < self.given:
            what = f"is {count}, and {self.given} are given"
            raise InputError(what, where="chunks", expected=f"{self.given} or more: given chunks are shown")
        if self._given_noise:
            self._given_noise.check_chunks(None if count is None else count - self.given)
        self._chunks = count

    @property
    def noise(self) -> str | None:
        """What noise it is made of, if that came in a file; None: it is the seed's, or the caller's own."""
        return self._given_noise.described(self.seed) if self._given_noise else None

    @property
    def given_digests(self) -> dict[str, str]:
        """Digests of what was given: `noise` of a file, the latents of the `start`."""
        noise = self._given_noise.digest if self._given_noise else None
        return {name: d for name, d in (("noise", noise), ("start", self._start.digest)) if d}

    @property
    def prompt(self) -> PromptRecord | None:
        """The prompt that it began with. None: of a state of an earlier version, which does not know it."""
        return self._script.prompt

    @property
    def host_is_free(self) -> bool:
        """Whether chunks are made beside the host; else what it does meanwhile takes cores from them."""
        return self._session._memory().lookahead > 0

    @property
    def switches(self) -> tuple[Switch, ...]:
        """The changes of the prompt that were made, and those to come, in order."""
        return self._script.switches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """The next chunk, as soon as it is decoded.

        Raises:
            InUseError: the session is in use by another thread. The video is as it was.
            RuntimeError: the session was closed, or began another video.
            SessionError: memory ran out, the latents are not finite, or the device failed. The video has
                ended; the session can begin another.
        """
        if self._over:
            raise StopIteration
        with self._changing() as maker:
            # Another thread may have had the last chunk since.
            while not self._ready and not self._over:
                # On a device the passes of the next chunk are queued before this one is waited for: they run
                # while it is decoded, copied and shown, and the device never waits for the host.
                while len(self._pending) <= maker.lookahead and (
                    self.chunks is None or self._begun < self.chunks
                ):
                    self._switch_in_time(maker)
                    begun = self._begin(maker, self._begun)
                    if begun is None:
                        self._chunks = self._begun
                        break
                    self._pending.append(begun)
                    self._begun += 1
                if not self._ready and self._pending:  # a switch finishes what was begun
                    self._finish_one(maker)
            chunk = None if self._over else self._ready.popleft()
            self.index += chunk is not None
        if chunk is None:
            raise StopIteration
        if self._session._frames == "device":  # they went with the memory, if it was closed meanwhile
            self._session._memory(self._token)
        return chunk

    def _begin(self, maker: ChunkMaker, index: int) -> PendingChunk | None:
        """Put the passes of a chunk into the queue; None: the frames that it would be drawn from have
        ended."""
        if index < self.given:
            return maker.take(index, self._start.latents[index])
        before = self._latents.get(index - 1)
        if self._source is None:
            return maker.begin(index, self._noise, before=before)
        latents, strength = self._source.latents(index), self._source.strength
        return None if latents is None else maker.begin(index, self._noise, latents, strength, before)

    def _noise(self, chunk: int, step: int, shape: tuple[int, ...]) -> Floats:
        """The caller's own noise, that of a file, which begins with the first chunk that is generated, or the
        seed's."""
        if self._own_noise:
            return self._own_noise(chunk, step, shape)
        if self._given_noise:
            return self._given_noise.draw(self.seed, chunk, step, chunk - self.given, shape)
        return chunk_noise(self.seed, chunk, step, shape)

    @property
    def _over(self) -> bool:
        return self._failed or (self.chunks is not None and self.index >= self.chunks)

    def switch(
        self,
        prompt: Prompt,
        *,
        recache: Recache | bool | None = None,
        at: int | None = None,
        fade: int = 0,
    ) -> int:
        """Follow another prompt from a chunk on.

        Args:
            prompt: words or text embeddings, as for `Session.generate`.
            recache: how the caches are made anew under the new prompt, from latents that were made; else the
                keys and values of the old prompt go on ruling what is shown. `replay`: clean passes of the
                chunks that fill the cache, one by one, and for models that were not trained with switches
                denoising passes too (`Schedule.redraw_from`). `keep-sink`: one pass over the newest frames;
                the sink keeps the old prompt. `empty-sink`: the same, and the oldest of these frames become
                the sink. `none` (or False): not at all. None (or True): as the model was trained
                (`ModelSpec.recache`).
            at: the chunk, one that was not yet begun: the video switches when it comes there, and a saved
                state knows that it is to. None: now, with the next chunk that was not yet begun.
            fade: so many chunks first follow both prompts, ever less the old one: of n, chunk i from 0 on has
                the embeddings of the old one times (n - i) / (n + 1) and those of the new one times
                (i + 1) / (n + 1). The caches are made anew before each of them, and before the first of the
                new prompt alone. Another switch ends it.

        Returns the index of the first chunk that follows the new prompt.

        Raises InputError for a prompt, a chunk or a way that cannot be used (nothing has changed then),
        RuntimeError for a video that failed, and what `__next__` raises.
        """
        session = self._session
        record, text = PromptRecord.of(session.spec, prompt)
        how, blended = recache_of(session.spec, recache), check_fade(fade)
        with self._using() as maker:
            # Of a planned switch too: later the video would end with it.
            chunk = self._begun if at is None else operator.index(at)
            self._check_switch(maker, Switch(chunk, record, how, blended))
            if at is not None:
                self._script.plan(Switch(chunk, record, how, blended), text, self._begun)
                return chunk
        with self._changing() as maker:
            switch = Switch(self._begun, record, how, blended)
            self._follow(maker, switch, text)
            return switch.chunk

    def _check_switch(self, maker: ChunkMaker, switch: Switch) -> None:
        """Raise InputError where the cache could not be made anew at a switch, or nothing fades."""
        finished = self._begun - len(self._pending)
        made = range(switch.chunk, switch.last_blended + 2)

        def there(chunk: int) -> bool:  # no set of them: a client may name any chunk, however far
            return chunk in self._latents or finished <= chunk <= switch.last_blended

        if switch.chunk >= self._begun:  # others are refused as such
            check_recache(maker, switch.recache, made, there)
        if switch.fade and (self._script.text is None or self._script.prompt is None):
            what = "was saved by a version that does not keep the prompt's embeddings, so nothing fades"
            raise InputError(what, where="the state that the video goes on from", expected="no fade")

    def _switch_in_time(self, maker: ChunkMaker) -> None:
        """Make the switch with which the next chunk begins, or a further step of one that fades."""
        script = self._script
        if self._begun in script.due:
            self._follow(maker, *script.due[self._begun])
            del script.due[self._begun]
        elif script.fading and self._begun > script.made[-1].chunk:
            self._take_text(maker, script.made[-1], *script.fading)

    def _follow(self, maker: ChunkMaker, switch: Switch, text: Floats) -> None:
        old = self._script.text
        self._take_text(maker, switch, text if old is None else old, text)
        self._script.made.append(switch)

    def _take_text(self, maker: ChunkMaker, switch: Switch, old: Floats, new: Floats) -> None:
        """Follow what a switch has for the next chunk, and make the cache anew for it."""
        while self._pending:
            self._finish_one(maker)
        self._begin_text(maker, switch.blend(self._begun, old, new))
        self._script.fading = (old, new) if self._begun <= switch.last_blended else None
        make_anew(maker, switch.recache, self._latents, self._begun, self._noise)

    def _begin_text(self, maker: ChunkMaker, text: Floats) -> None:
        self._script.text = text
        maker.prompt(text)

    def save(self, folder: Path | str, *, notes: Mapping[str, str] = {}) -> None:
        """Save the whole state to a folder: `Session.restore` goes on from it, to the bit.

        A state saved there before is replaced once this one is whole.

        Args:
            folder: where.
            notes: what the caller wants to find again as `Video.notes`.

        Of noise that came in a file the digest is saved, and the same file is asked for.

        Raises InputError where the folder cannot be written, or holds anything else, and for a video with
        a noise source of its own, which cannot be saved: the state before stays then, and the video can go
        on. RuntimeError for a video that failed.
        """
        with self._using() as maker:
            with self._ending_with_errors():
                while self._pending:
                    self._finish_one(maker)
            if self._source is not None:
                raise InputError(
                    "a video that is drawn from another one cannot be saved",
                    where="source",
                    hint="Make it in one run; what was written stays.",
                )
            if self._own_noise:
                raise InputError(
                    "a video with a noise source of its own cannot be saved",
                    where="noise",
                    expected="noise of a seed, or of a file (runtime.given.read_noise)",
                )
            bundle, notes = self._session.bundle, dict(notes)
            known: dict[str, object] = {"bundle": bundle.digest, "compute": bundle.manifest.compute}
            known |= {"seed": self.seed, "chunks": self.chunks, "index": self.index}
            known |= {"given": self.given or None, **self.given_digests}
            to_come = {n: latents for n, latents in self._start.latents.items() if n >= self._begun}
            try:
                write_snapshot(
                    Path(folder),
                    maker,
                    self._latents,
                    self._ready,
                    self._script,
                    to_come,
                    self._start.held,
                    **known,
                    notes=notes,
                )
            except MemoryError as error:
                what = f"memory ran out on the host while a state was saved ({error})"
                raise MemoryShortError(what) from error

    def _finish_one(self, maker: ChunkMaker) -> None:
        chunk = maker.finish(self._pending.popleft())
        self._latents[chunk.index] = chunk.latents.copy()  # the caller may change the chunk's own
        needed = kept_chunks(self._session.plan, chunk.index + 1)
        # A state of an earlier version has those for a replay alone.
        self._latents = {index: self._latents[index] for index in needed if index in self._latents}
        self._ready.append(chunk)

    @contextmanager
    def _using(self) -> Iterator[ChunkMaker]:
        """The session's memory, which nobody else can use meanwhile.

        Raises RuntimeError for a video that the session no longer works on, or that failed, and InUseError.
        """
        with self._session._using(self._token) as maker:
            if self._failed:
                raise RuntimeError("this video ended with an error: begin another")
            yield maker

    @contextmanager
    def _changing(self) -> Iterator[ChunkMaker]:
        """The session's memory, to change it."""
        with self._using() as maker, self._ending_with_errors():
            yield maker

    @contextmanager
    def _ending_with_errors(self) -> Iterator[None]:
        """Whatever goes wrong ends the video, since its caches may be half written."""
        try:
            yield
        except BaseException as error:
            self._failed = True
            self._pending.clear()
            if isinstance(error, MemoryError):  # of numpy's: noise, or a copy of what is shown
                raise MemoryShortError(f"memory ran out on the host ({error})") from error
            raise


def _whole(chunks: float | None) -> int | None:
    """A number of chunks; None: without end. Raises InputError for one that is no whole number from 0 on."""
    if chunks is None or chunks == math.inf:
        return None
    try:
        count = operator.index(chunks)  # type: ignore[arg-type]
    except TypeError:
        count = -1
    if count < 0:
        raise InputError(f"is {chunks}", where="chunks", expected="a whole number from 0 on, or None")
    return count
