"""A session: a bundle opened for streaming. Videos come out of it chunk by chunk."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.backends import Lane, LaneOptions, as_run, default_backend, open_backend
from forcingkv.runtime.backends.ort_placement import Divided, Placement
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.bundle_check import check_digest
from forcingkv.runtime.chunks import ChunkMaker, FramesOn, NoiseSource
from forcingkv.runtime.faults import InUseError, SessionError
from forcingkv.runtime.frame_encoder import Encoder, encoder_of
from forcingkv.runtime.given import GivenNoise, check_start
from forcingkv.runtime.pass_timer import PassTimer
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.preflight import check_memory, needed_memory
from forcingkv.runtime.recaching import check_restored
from forcingkv.runtime.script import PromptRecord, Script
from forcingkv.runtime.snapshot import HELD, read_snapshot
from forcingkv.runtime.snapshot_check import check_given
from forcingkv.runtime.sources import Source
from forcingkv.runtime.spec import Dtype
from forcingkv.runtime.streaming import NO_START, Start, Video
from forcingkv.runtime.text import Prompt
from forcingkv.runtime.threads import chosen_threads
from forcingkv.runtime.turn import Turn
from forcingkv.runtime.warming import warm_up


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
        notes: what is worth saying of how it was opened, as sentences: what of its memory could not be
            checked.
    """

    def __init__(self, bundle: Bundle, options: LaneOptions, lane: Lane, frames: FramesOn) -> None:
        """For `open` and `sibling`: takes all memory of the session on a lane, and closes the lane if that
        fails."""
        self._maker: ChunkMaker | None = None
        self._closed, self._turn = False, Turn()
        self._user: object = None
        """Stands for the video, or the timer, that the memory is of. The video itself would be a circle."""
        self.bundle, self.plan, self.spec = bundle, bundle.plan, bundle.plan.spec
        self._options, self._frames = options, frames
        self.notes: tuple[str, ...] = ()
        try:
            self._maker = ChunkMaker(bundle, lane, frames)
            if options.warm:
                lane.warm(partial(warm_up, self._maker))
        except BaseException:
            lane.close()
            raise

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        backend: str | None = None,
        device: str | None = None,
        dtype: Dtype | None = None,
        provider: str | None = None,
        threads: int | None = None,
        frames: FramesOn = "host",
        cuda_graphs: bool = False,
        compiled: bool = False,
        warm: bool = True,
        preflight: bool = True,
        expect_digest: str | None = None,
    ) -> Self:
        """Open a bundle. All memory of the session is taken now.

        Args:
            bundle: an opened bundle, or its folder.
            backend: what runs it: `onnxruntime`, `torch`, `tensorrt` or `tensorrt-rtx`; `onnxruntime-cpu` for
                the CPU where ONNX Runtime was built for GPUs. None: `onnxruntime`, and `torch` for bundles
                without graphs, and where a device, a dtype or compiling is asked for and no provider
                (`Session.runs_on`).
            device: where, for backends that can choose: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`.
            dtype: what to compute in, for backends that can choose; None: what the bundle was exported for.
            provider: ONNX Runtime: what runs its graphs, a name of `ort_providers.PROVIDERS`; None: `cuda`
                where this ONNX Runtime was built with it, else `cpu`.
            threads: threads of a CPU backend; None: what this process may use (`threads.cpu_threads`).
            frames: where chunks' frames are: numpy arrays on the host, or left on the device (`Chunk`).
            cuda_graphs: on a GPU of NVIDIA: whether passes that come again are captured and replayed.
            compiled: torch: whether the model is compiled, which takes a while, before it runs.
            warm: on a GPU: whether all that is slow at its first run (TensorRT-RTX compiles kernels then) is
                run once now, and not while a video is made.
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
        if dtype is not None:
            one_of(Dtype, dtype, "dtype")
        chosen_threads(threads)
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, expect=expect_digest)
        check_digest(opened.path, opened.digest, expect_digest)
        torch_is_asked = bool(device or dtype or compiled) and not provider
        backend = backend or default_backend(opened, torch_is_asked=torch_is_asked)
        options = LaneOptions(backend, threads, device, dtype, provider, cuda_graphs, compiled, warm)
        opened = as_run(opened, options)
        unchecked = check_memory(opened, options) if preflight else None
        session = cls(opened, options, open_backend(opened, options), frames)
        session.notes = (unchecked,) if unchecked else ()
        return session

    def sibling(self, *, preflight: bool = True) -> Self:
        """Another session on the same weights, with caches of its own. Any thread may ask, at any time.

        Raises what `open` raises for want of memory, and RuntimeError if this session is closed, by now or
        meanwhile.
        """
        lane = self._memory().lane
        if preflight:
            check_memory(self.bundle, self._options, weights=False)
        session = type(self)(self.bundle, self._options, lane.sibling(), self._frames)
        session.notes = self.notes
        return session

    def classified(
        self,
        prompt: Prompt,
        *,
        seed: int,
        noise: NoiseSource | GivenNoise | None = None,
        start: Floats | None = None,
    ) -> Self:
        """A session for one video, to whose `generate` the same is to be given again: its heads are grouped
        by what they attend to in the first chunks, which are made here too (Dummy Forcing; torch alone).

        What was found is its `bundle.headmap`. While both are open, self-attention's weights are there twice.
        Raises InputError where classes cannot be found so, and what `generate` and `sibling` raise.
        """
        one_of(("torch",), self._options.backend, "backend that finds classes of heads")
        from forcingkv.runtime.backends.torch_classes import classified  # torch is there, and not elsewhere

        bundle, lane = classified(self, self._options, self._memory(), prompt, seed, noise, start)
        return type(self)(bundle, self._options, lane, self._frames)

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
                with suppress(SessionError):  # closing says what cannot be done
                    self._maker.settle()
                self._maker = self._user = None  # first, since the lane gives back what nobody holds
                lane.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        seed: int,
        chunks: float | None = None,
        noise: NoiseSource | GivenNoise | None = None,
        start: Floats | None = None,
        source: Iterable[npt.NDArray[np.uint8]] | None = None,
        strength: float = 0.7,
    ) -> Video:
        """Begin a video: an iterator that yields each chunk as soon as it is decoded.

        Args:
            prompt: words, or text embeddings (1, text_length, text_width) for models whose text
                encoder does not live in the runtime.
            seed: of the noise; the same seed gives the same video.
            chunks: how many chunks to make, a whole number, those of `start` among them; None or infinity:
                without end.
            noise: another source of noise than the seed; noise of a file (`runtime.given.read_noise`) begins
                with the first chunk that is generated.
            start: latents that the video begins with (1, channels, frames, height, width). Whole chunks of
                them: each is encoded in a clean pass, decoded and handed out (`Chunk.given`), and the first
                generated chunk follows them. Fewer frames than a chunk has, for models whose schedule can
                (`Schedule.by_frame`): they are held while the rest of the first chunk is made.
            source: frames of another video, uint8 (height, width, 3) of the model's size, at its rate
                (`runtime.clips`): each chunk begins with the latents of its frames, noised, and the video
                ends with them. They are read as chunks are begun.
            strength: of a source: chunks begin with the first of their passes whose noise level is at most
                this. 1: what the source shows is lost.

        Raises:
            InputError: the prompt, the seed, chunks, noise, start or source cannot be used, or the bundle has
                no encoder for it. The video before goes on then.
            InUseError: the session is in use by another thread, where the video goes on.
            RuntimeError: the session is closed.
            SessionError: as iterating over the video does.
        """
        with self._using() as maker:
            record, text = PromptRecord.of(self.spec, prompt)
            given = NO_START
            if start is not None:
                given = Start.of(check_start(start, self.plan), self.spec.frames_per_chunk)
            drawn = self._source(maker, source, strength, start)
            video = Video(self, seed, chunks, noise, Script(record), given, drawn)
            self._user = video._token
            with video._ending_with_errors():
                maker.restart()
                given.begin(maker)
                video._begin_text(maker, text)
        return video

    def encode(self, frames: npt.NDArray[np.uint8]) -> Floats:
        """The latents of a clip, for `generate(start=...)`.

        Args:
            frames: uint8 (1 + k * temporal_stride, height, width, 3) of the model's size, at its rate.

        Returns float32 (1, channels, 1 + k, height, width).

        A video that is drawn from a source ends with it: there is one encoder.

        Raises InputError for other frames, and for a bundle without an encoder; and what `generate` raises.
        """
        with self._using() as maker:
            encoder = self._encoder(maker)
            encoder.restart()
            return encoder.encode(frames)

    def _encoder(self, maker: ChunkMaker) -> Encoder:
        return maker.encoder or encoder_of(maker.lane, self.bundle.manifest.graphs, self.plan)

    def _source(
        self,
        maker: ChunkMaker,
        frames: Iterable[npt.NDArray[np.uint8]] | None,
        strength: float,
        start: Floats | None,
    ) -> Source | None:
        if frames is None:
            return None
        if start is not None:
            raise InputError("use either start or source, not both", where="source")
        if self.spec.context_first == "encoded":
            raise InputError(
                f"is of no use to {self.spec.name}, whose encoder is for the first frame of each context",
                where="source",
                hint="A model file with context_first = 'kept' (base = its name) can be drawn from a source.",
            )
        return Source(frames, strength, self.spec, self._encoder(maker))

    def restore(
        self,
        folder: Path | str,
        *,
        chunks: float | None = None,
        noise: GivenNoise | None = None,
        start: Floats | None = None,
    ) -> Video:
        """Go on with a video that `Video.save` saved, from the chunk after it, to the bit.

        Args:
            folder: where it was saved.
            chunks: how many chunks the whole video is to have, infinity: without end; None: as many as when
                it was saved.
            noise: that of the file that the video is made of, if it is made of one's: the same again.
            start: latents that it began with. They are in the state, and need not be given; others are
                refused.

        Raises InputError for a state that is damaged, of another bundle, or that needs another backend (the
        video before goes on then),
        and SessionError as iterating over a video does.
        """
        with self._using() as maker:
            state, arrays, latents, ready, script = read_snapshot(Path(folder), self.bundle)
            check_given(state, Path(folder), noise, None if start is None else check_start(start, self.plan))
            check_restored(maker, script, hollow=bool(state.hollow), where=str(folder))
            coming = range(min(state.made, state.given or 0), state.given or 0)
            to_come = {index: arrays[f"start/{index}"] for index in coming}
            begun = Start(state.given or 0, to_come, state.start, arrays.get(HELD))
            length = state.chunks if chunks is None else chunks
            video = Video(self, state.seed, length, noise, script, begun)
            video.notes = state.notes or {}
            video.index, video._begun = state.index, state.made
            video._latents, video._ready = latents, deque(ready)
            try:
                maker.restore(
                    state.passes,
                    state.decoder_calls,
                    arrays,
                    hollow=bool(state.hollow),
                    cuts=state.cuts or (),
                    scenes=sum(one.recache == "cut" and one.chunk > 0 for one in script.made),
                )
            except InputError:
                raise  # nothing was written
            except BaseException:  # Ctrl-C too
                self._user = None  # the caches of the video before may be half overwritten
                raise
            begun.begin(maker)
            if maker.context:
                maker.context.restore(arrays)
            self._user = video._token
        return video

    @property
    def runs_on(self) -> str:
        """What passes run on, in words: `the CPU, 2 threads`. Raises RuntimeError: the session is closed."""
        return self._memory().lane.runs_on

    @property
    def footprint(self) -> dict[str, int]:
        """Bytes that it holds, by part: see `runtime.footprint.part_notes`."""
        return needed_memory(self.bundle, self._options)

    @property
    def placement(self) -> dict[str, Placement]:
        """For each graph which provider of ONNX Runtime runs how many of its nodes; empty for backends that
        divide no graph. Raises RuntimeError: the session is closed."""
        lane = self._memory().lane
        return lane.placement if isinstance(lane, Divided) else {}

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
