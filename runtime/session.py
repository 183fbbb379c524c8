"""A session: a bundle opened for streaming. Videos come out of it chunk by chunk."""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.backends import Lane, open_backend
from forcingkv.runtime.bundle import Bundle, check_digest
from forcingkv.runtime.chunks import Chunk, ChunkMaker, FramesOn, NoiseSource, PendingChunk
from forcingkv.runtime.faults import InUseError, MemoryShortError, SessionError
from forcingkv.runtime.kv.rebuild import replayed
from forcingkv.runtime.pass_timer import PassTimer
from forcingkv.runtime.positions import Floats, chunk_noise
from forcingkv.runtime.preflight import check_memory
from forcingkv.runtime.snapshot import read_snapshot, write_snapshot
from forcingkv.runtime.text import Prompt, prompt_input
from forcingkv.runtime.turn import Turn


class Session:
    """Generates videos from a bundle. Open it with `Session.open`, close it when done.

    A session makes one video at a time; starting a new one ends the one before. It may be used by any thread,
    but by one at a time: while a chunk is made, a video begun, switched, saved or restored, everything else
    but `sibling` and `close` raises InUseError at once. Sessions on the same weights (`sibling`) may run in
    threads of their own.

    A session that nobody holds gives its memory back, as `close` does. A video holds its session.

    Attributes:
        bundle: what it runs.
        plan: the bundle's cache plan.
        spec: the bundle's model.
    """

    def __init__(self, bundle: Bundle, backend: str, lane: Lane, frames: FramesOn) -> None:
        """For `open` and `sibling`: takes all memory of the session on a lane, and closes the lane if that
        fails."""
        self._maker: ChunkMaker | None = None
        self._closed, self._turn = False, Turn()
        self._user: object = None
        """Stands for the video, or the timer, that the memory is of. The video itself would be a circle."""
        self.bundle, self.plan, self.spec = bundle, bundle.plan, bundle.plan.spec
        self._backend, self._frames = backend, frames
        try:
            self._maker = ChunkMaker(bundle, lane, frames)
        except BaseException:
            lane.close()
            raise

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        backend: str = "onnxruntime",
        threads: int | None = None,
        frames: FramesOn = "host",
        cuda_graphs: bool = False,
        preflight: bool = True,
        expect_digest: str | None = None,
    ) -> Self:
        """Open a bundle. All memory of the session is taken now.

        Args:
            bundle: an opened bundle, or its folder.
            backend: what runs the graphs: `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
            threads: threads of a CPU backend; None leaves it to the backend.
            frames: where chunks' frames are: numpy arrays on the host, or left on the device (`Chunk`).
            cuda_graphs: TensorRT: whether passes that come again are captured and replayed.
            preflight: whether to refuse a bundle that needs more memory than there is, before any is
                taken.
            expect_digest: the digest that the bundle has to have (`Bundle.digest`), as someone said whom
                you trust.

        Raises:
            InputError: the bundle is damaged, is not as export writes it, is another than expected, was
                exported for another backend, or needs more memory than there is; or there is no such
                backend, or it is too old.
            MissingExtraError: what the backend runs on is not installed.
            SessionError: the backend could not be started.
        """
        one_of(FramesOn, frames, "place for frames")
        if threads is not None and threads < 1:
            raise InputError(f"is {threads}", where="threads", expected="1 or more, or None")
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, expect=expect_digest)
        check_digest(opened.path, opened.digest, expect_digest)
        if preflight:
            check_memory(opened, backend)
        lane = open_backend(backend, opened, threads=threads, cuda_graphs=cuda_graphs)
        return cls(opened, backend, lane, frames)

    def sibling(self, *, preflight: bool = True) -> Self:
        """Another session on the same weights, with caches of its own. Any thread may ask, at any time.

        Raises what `open` raises for want of memory, and RuntimeError if this session is closed, by now or
        meanwhile.
        """
        lane = self._memory().lane
        if preflight:
            check_memory(self.bundle, self._backend, weights=False)
        return type(self)(self.bundle, self._backend, lane.sibling(), self._frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the system takes it all back then
            self.close()

    def close(self) -> None:
        """Give all memory back; the weights too, with the last session on them.

        A closed session cannot be used again. Any thread may close it, and waits for nobody: what another
        thread is at is finished as usual, and gives the memory back when it is.
        """
        self._closed = True
        self._give_back()

    def _give_back(self) -> None:
        with suppress(InUseError), self._turn.taken():  # whoever is in it comes here afterwards
            if self._maker is not None:
                lane = self._maker.lane
                self._maker = self._user = None  # first, since the lane gives back what nobody holds
                lane.close()

    def generate(
        self, prompt: Prompt, *, seed: int, chunks: int | None = None, noise: NoiseSource | None = None
    ) -> Video:
        """Begin a video: an iterator that yields each chunk as soon as it is decoded.

        Args:
            prompt: words, or text embeddings (1, text_length, text_width) for models whose text
                encoder does not live in the runtime.
            seed: of the noise; the same seed gives the same video.
            chunks: how many chunks to make; None: without end.
            noise: another source of noise than the seed.

        Raises:
            InputError: the prompt or the seed cannot be used. The video before goes on then.
            InUseError: the session is in use by another thread, where the video goes on.
            RuntimeError: the session is closed.
            SessionError: as iterating over the video does.
        """
        with self._using() as maker:
            video, text = Video(self, seed, chunks, noise), prompt_input(self.spec, prompt)
            self._user = video._token
            with video._ending_with_errors():
                maker.restart()
                maker.prompt(text)
        return video

    def restore(self, folder: Path | str, *, chunks: int | None = None) -> Video:
        """Go on with a video that `Video.save` saved, from the chunk after it, to the bit.

        Args:
            folder: where it was saved.
            chunks: how many chunks the whole video is to have; None: as many as when it was saved.

        Raises InputError for a state that is damaged, or of another bundle (the video before goes on then),
        and SessionError as iterating over a video does.
        """
        with self._using() as maker:
            state, arrays, latents, ready = read_snapshot(Path(folder), self.bundle)
            video = Video(self, state.seed, state.chunks if chunks is None else chunks, None)
            video.index, video._begun = state.index, state.made
            video._latents, video._ready = latents, deque(ready)
            try:
                maker.restore(state.passes, state.decoder_calls, arrays)
            except SessionError:
                self._user = None  # its caches may be half overwritten
                raise
            self._user = video._token
        return video

    def pass_timer(self, chunk: int) -> PassTimer:
        """Times the passes of a chunk without the video before it. Ends the video there was.

        Raises RuntimeError: the session is closed, or in use by another thread.
        """
        with self._using():
            self._user = token = object()
        return PassTimer(lambda: self._using(token), chunk)

    @contextmanager
    def _using(self, user: object = None) -> Iterator[ChunkMaker]:
        """All memory of the session, which nobody else can use meanwhile.

        Raises what `_memory` raises, and InUseError.
        """
        self._memory(user)  # what has ended is told as ended, whoever uses the session now
        try:
            with self._turn.taken():
                yield self._memory(user)
        except InUseError:
            self._memory(user)  # raises, if it is just being closed
            raise
        finally:
            if self._closed:
                self._give_back()

    def _memory(self, user: object = None) -> ChunkMaker:
        """All memory of the session. Raises RuntimeError if it is closed, or of another user by now."""
        maker = self._maker
        if user is not None and (self._closed or maker is None or user is not self._user):
            raise RuntimeError(
                "this video ended when the session was closed or began another (for several at a time give"
                " each a session of its own, with sibling())"
            )
        if self._closed or maker is None:
            raise RuntimeError("the session is closed: open the bundle again")
        return maker


class Video:
    """A video on its way. Iterate over it for its chunks; `Session.generate` and `Session.restore` make it.

    Attributes:
        seed: of the noise.
        chunks: how many there will be; None: without end.
        index: of the chunk that is handed out next.
    """

    def __init__(self, session: Session, seed: int, chunks: int | None, noise: NoiseSource | None) -> None:
        """For the session. It is asked for its memory each time: a video that has ended keeps none of it."""
        seed = operator.index(seed)  # numpy's whole numbers would not go into JSON
        if seed < 0:
            raise InputError(f"is {seed}", where="seed", expected="0 or more")
        self.seed, self.chunks = seed, None if chunks is None else operator.index(chunks)
        self.index = 0
        self._session, self._own_noise, self._token = session, noise is not None, object()
        self._noise = noise or (lambda chunk, step, shape: chunk_noise(seed, chunk, step, shape))
        self._begun = 0
        """Chunks whose passes were put into the queue."""
        self._pending: deque[PendingChunk] = deque()
        self._ready: deque[Chunk] = deque()
        self._latents: dict[int, Floats] = {}
        """Of the chunks that a rebuild of the cache needs, in order."""
        self._failed = False

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
                while len(self._pending) <= maker.lane.lookahead and (
                    self.chunks is None or self._begun < self.chunks
                ):
                    self._pending.append(maker.begin(self._begun, self._noise))
                    self._begun += 1
                self._finish_one(maker)
            chunk = None if self._over else self._ready.popleft()
            self.index += chunk is not None
        if chunk is None:
            raise StopIteration
        if self._session._frames == "device":  # they went with the memory, if it was closed meanwhile
            self._session._memory(self._token)
        return chunk

    @property
    def _over(self) -> bool:
        return self._failed or (self.chunks is not None and self.index >= self.chunks)

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
        text = prompt_input(self._session.spec, prompt)
        with self._changing() as maker:
            while self._pending:
                self._finish_one(maker)
            maker.prompt(text)
            if recache:
                redraw_from = self._session.spec.schedule.redraw_from
                maker.cache.passes = 0
                for index, latents in self._latents.items():
                    maker.replay(index, latents, self._noise, redraw_from)
            return self._begun

    def save(self, folder: Path | str) -> None:
        """Save the whole state to a folder: `Session.restore` goes on from it, to the bit.

        A state saved there before is replaced once this one is whole.

        Raises InputError where the folder cannot be written, or holds anything else, and for a video with
        a noise source of its own, which cannot be saved; RuntimeError for a video that failed.
        """
        with self._using() as maker:
            with self._ending_with_errors():
                while self._pending:
                    self._finish_one(maker)
            if self._own_noise:
                raise InputError(
                    "a video with a noise source of its own cannot be saved",
                    where="noise",
                    expected="noise of a seed",
                )
            bundle = self._session.bundle.digest
            known = {"bundle": bundle, "seed": self.seed, "chunks": self.chunks, "index": self.index}
            write_snapshot(Path(folder), maker, self._latents, self._ready, **known)

    def _finish_one(self, maker: ChunkMaker) -> None:
        chunk = maker.finish(self._pending.popleft())
        self._latents[chunk.index] = chunk.latents.copy()  # the caller may change the chunk's own
        needed = replayed(self._session.plan, chunk.index + 1)
        self._latents = {index: self._latents[index] for index in needed}
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
