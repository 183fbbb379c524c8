"""A session: a bundle opened for streaming. Videos come out of it chunk by chunk."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.backends import Backend, open_backend
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.chunks import ChunkMaker, NoiseSource
from forcingkv.runtime.faults import SessionError
from forcingkv.runtime.preflight import check_memory
from forcingkv.runtime.rehearsal import Rehearsal
from forcingkv.runtime.results import FramesOn
from forcingkv.runtime.snapshot import read_snapshot
from forcingkv.runtime.streaming import Video
from forcingkv.runtime.text import Prompt, prompt_input


class Session:
    """Generates videos from a bundle. Open it with `Session.open`, close it when done.

    A session makes one video at a time; starting a new one ends the one before. Sessions on the same
    weights (`sibling`) may run in threads of their own.

    Attributes:
        bundle: what it runs.
        plan: the bundle's cache plan.
        spec: the bundle's model.
    """

    def __init__(self, shared: SharedBackend, frames: FramesOn) -> None:
        """For `open` and `sibling`: takes a share of a backend."""
        self._shared, self._frames = shared, frames
        self.bundle, self.plan, self.spec = shared.bundle, shared.bundle.plan, shared.bundle.plan.spec
        self._video: Video | None = None
        backend = shared.take()
        try:
            self._lane = backend.lane()
            try:
                self._maker: ChunkMaker | None = ChunkMaker(self.bundle, self._lane, frames)
            except BaseException:
                self._lane.close()
                raise
        except BaseException:
            shared.release()
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

        Raises:
            InputError: the bundle is damaged, was exported for another backend, or needs more memory than
                there is; or there is no such backend.
            MissingExtraError: what the backend runs on is not installed.
            SessionError: the backend could not be started.
        """
        one_of(FramesOn, frames, "place for frames")
        if threads is not None and threads < 1:
            raise InputError(f"is {threads}", where="threads", expected="1 or more, or None")
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if preflight:
            check_memory(opened, backend)
        loaded = open_backend(backend, opened, threads=threads, cuda_graphs=cuda_graphs)
        return cls(SharedBackend(opened, backend, loaded), frames)

    def sibling(self, *, preflight: bool = True) -> Self:
        """Another session on the same weights, with caches of its own.

        Raises what `open` raises for want of memory, and RuntimeError if this session is closed.
        """
        self._open_maker()
        if preflight:
            check_memory(self.bundle, self._shared.name, weights=False)
        return type(self)(self._shared, self._frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back; the weights too, with the last session on them.

        A closed session cannot be used again.
        """
        if self._maker is None:
            return
        self._maker = self._video = None
        try:
            self._lane.close()
        finally:
            self._shared.release()

    def generate(
        self,
        prompt: Prompt,
        *,
        seed: int,
        chunks: int | None = None,
        noise: NoiseSource | None = None,
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
            RuntimeError: the session is closed.
            SessionError: as iterating over the video does.
        """
        self._open_maker()
        video = Video(
            self.bundle, self._lane.lookahead, self._maker_of, seed=seed, chunks=chunks, noise=noise
        )
        text = prompt_input(self.spec, prompt)
        self._video = video
        video.start(text)
        return video

    def restore(self, folder: Path | str) -> Video:
        """Go on with a video that `Video.save` saved, from the chunk after it, to the bit.

        Raises InputError for a state that is damaged, or of another bundle (the video before goes on then),
        and SessionError as iterating over a video does.
        """
        maker = self._open_maker()
        saved = read_snapshot(Path(folder), self.bundle)
        try:
            video = Video.resume(self.bundle, maker, self._lane.lookahead, self._maker_of, saved)
        except SessionError:
            self._video = None  # its caches may be half overwritten
            raise
        self._video = video
        return video

    def rehearse(self, chunk: int) -> Rehearsal:
        """Stand before a chunk without the video before it, to time its passes. Ends the video there was.

        Raises RuntimeError: the session is closed.
        """
        maker = self._open_maker()
        self._video = None
        return Rehearsal(maker, chunk)

    def _open_maker(self) -> ChunkMaker:
        if self._maker is None:
            raise RuntimeError("the session is closed: open the bundle again")
        return self._maker

    def _maker_of(self, video: Video) -> ChunkMaker:
        """The session's memory. Raises RuntimeError unless that video is the one in it."""
        if self._maker is None or video is not self._video:
            raise RuntimeError("this video ended when the session was closed or began another")
        return self._maker


class SharedBackend:
    """A backend that closes with the last of the sessions on it."""

    def __init__(self, bundle: Bundle, name: str, backend: Backend) -> None:
        self.bundle, self.name = bundle, name
        self._backend, self._sessions, self._lock = backend, 0, threading.Lock()

    def take(self) -> Backend:
        """One more session."""
        with self._lock:
            self._sessions += 1
            return self._backend

    def release(self) -> None:
        """One session fewer."""
        with self._lock:
            self._sessions -= 1
            last = not self._sessions
        if last:
            self._backend.close()
