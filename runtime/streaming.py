"""One video of a session: an iterator of chunks that can be switched to another prompt, and saved."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.chunks import Begun, ChunkMaker, NoiseSource
from forcingkv.runtime.faults import MemoryShortError
from forcingkv.runtime.noise import chunk_noise
from forcingkv.runtime.recache import LatentHistory
from forcingkv.runtime.results import Chunk
from forcingkv.runtime.snapshot import SavedState, Snapshot, write_snapshot
from forcingkv.runtime.text import Prompt, prompt_input


class Video:
    """A video on its way. Iterate over it for its chunks; `Session.generate` and `Session.restore` make it.

    Attributes:
        seed: of the noise.
        chunks: how many there will be; None: without end.
        index: of the chunk that is handed out next.
    """

    def __init__(
        self,
        bundle: Bundle,
        lookahead: int,
        maker_of: Callable[[Video], ChunkMaker],
        *,
        seed: int,
        chunks: int | None,
        noise: NoiseSource | None,
    ) -> None:
        seed = operator.index(seed)  # numpy's whole numbers would not go into JSON
        if seed < 0:
            raise InputError(f"is {seed}", where="seed", expected="0 or more")
        self.seed, self.index = seed, 0
        self.chunks = None if chunks is None else operator.index(chunks)
        self._bundle, self._lookahead, self._maker_of = bundle, lookahead, maker_of
        self._own_noise = noise is not None
        self._noise = noise or (lambda chunk, step, shape: chunk_noise(seed, chunk, step, shape))
        self._begun: deque[Begun] = deque()
        self._made = 0
        """Chunks whose passes were put into the queue."""
        self._ready: deque[Chunk] = deque()
        self._history = LatentHistory(bundle.plan)
        self._failed = False

    @property
    def _maker(self) -> ChunkMaker:
        """Asked for each time: a video that has ended keeps no memory of the session's."""
        return self._maker_of(self)

    def start(self, text: npt.NDArray[np.float32]) -> None:
        """Begin with a text, as `prompt_input` gives it; what the session made before is forgotten."""
        self._guarded(lambda: self._start(text))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """The next chunk, as soon as it is decoded.

        Raises:
            RuntimeError: the session was closed, or began another video.
            SessionError: memory ran out, the latents are not finite, or the device failed. The video has
                ended; the session can begin another.
        """
        if self._ended():
            raise StopIteration
        self._maker_of(self)
        while not self._ready:
            self._guarded(self._advance)
        self.index += 1
        return self._ready.popleft()

    def switch(self, prompt: Prompt, *, recache: bool = True) -> int:
        """Follow another prompt from the next chunk that was not yet begun.

        Args:
            prompt: words or text embeddings, as for `Session.generate`.
            recache: make the caches anew, from the latents of the last chunks under the new prompt. It
                takes as many clean passes as chunks fill the cache, and for models that were not trained
                with switches denoising passes too (`Schedule.redraw_from`). Without it the keys and values
                of the old prompt go on ruling what is shown.

        Returns the index of the first chunk that follows the new prompt.

        Raises InputError for a prompt that cannot be used (nothing has changed then), RuntimeError for a
        video that failed, and what `__next__` raises.
        """
        text = prompt_input(self._bundle.plan.spec, prompt)
        self._check()
        self._guarded(lambda: self._switch(text, recache))
        return self._made

    def save(self, folder: Path | str) -> None:
        """Save the whole state to a folder: `Session.restore` goes on from it, to the bit.

        A state saved there before is replaced once this one is whole.

        Raises InputError where the folder cannot be written, or holds anything else, and for a video with
        a noise source of its own, which cannot be saved; RuntimeError for a video that failed.
        """
        self._check()
        if self._own_noise:
            raise InputError(
                "a video with a noise source of its own cannot be saved",
                where="noise",
                expected="noise of a seed",
            )
        self._guarded(self._finish_begun)
        snapshot = Snapshot(
            bundle=self._bundle.digest,
            seed=self.seed,
            chunks=self.chunks,
            index=self.index,
            made=self._made,
            passes=self._maker.cache.passes,
            decoder_calls=self._maker.decoder.called,
        )
        write_snapshot(Path(folder), snapshot, self._maker, self._history.get(self._made), tuple(self._ready))

    @classmethod
    def resume(
        cls,
        bundle: Bundle,
        maker: ChunkMaker,
        lookahead: int,
        maker_of: Callable[[Video], ChunkMaker],
        saved: SavedState,
    ) -> Self:
        """The video that was saved. Raises InputError for a state that does not fit; nothing has changed."""
        state = saved.snapshot
        video = cls(bundle, lookahead, maker_of, seed=state.seed, chunks=state.chunks, noise=None)
        video.index, video._made = state.index, state.made
        video._ready.extend(saved.ready)
        for index, latents in sorted(saved.latents.items()):
            video._history.add(index, latents)
        maker.restore(state.passes, state.decoder_calls, saved.arrays)
        return video

    def _check(self) -> None:
        """Raise RuntimeError unless the caches are this video's, and whole."""
        self._maker_of(self)
        if self._failed:
            raise RuntimeError("this video ended with an error: begin another")

    def _ended(self) -> bool:
        return self._failed or (self.chunks is not None and self.index >= self.chunks)

    def _advance(self) -> None:
        """Begin chunks as far ahead as the backend likes, and finish the first of them."""
        while len(self._begun) <= self._lookahead and (self.chunks is None or self._made < self.chunks):
            self._begun.append(self._maker.begin(self._made, self._noise))
            self._made += 1
        self._finish()

    def _finish(self) -> None:
        chunk = self._maker.finish(self._begun.popleft())
        self._history.add(chunk.index, chunk.latents)
        self._ready.append(chunk)

    def _finish_begun(self) -> None:
        while self._begun:
            self._finish()

    def _start(self, text: npt.NDArray[np.float32]) -> None:
        self._maker.cache.restart()
        self._maker.decoder.restart()
        self._maker.prompt(text)

    def _switch(self, text: npt.NDArray[np.float32], recache: bool) -> None:
        self._finish_begun()
        self._maker.prompt(text)
        if recache:
            redraw_from = self._bundle.plan.spec.schedule.redraw_from
            self._maker.cache.restart()
            for index, latents in self._history.get(self._made).items():
                self._maker.replay(index, latents, self._noise, redraw_from)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do it; whatever goes wrong ends the video, since its caches may be half written."""
        try:
            work()
        except BaseException as error:
            self._failed = True
            self._begun.clear()
            if isinstance(error, MemoryError):  # of numpy's: noise, or a copy of what is shown
                raise MemoryShortError(f"memory ran out on the host ({error})") from error
            raise
