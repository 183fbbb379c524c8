"""Making one chunk: denoising passes, and what fills the cache; `runtime.chunk_decoder` decodes it.

`ChunkMaker.begin` puts a chunk's passes into the queue, `finish` waits for what they gave and decodes it. On
a device the passes of the next chunk run while one is decoded; on a CPU `begin` returns when they are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import positions
from forcingkv.runtime.backends import Array, Fetch, Lane, Mark, Pass, Queue, Tensor
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.chunk_decoder import ChunkDecoder, tensor_of
from forcingkv.runtime.context import Context, check_context
from forcingkv.runtime.faults import NotFiniteError
from forcingkv.runtime.footprint import has_recache
from forcingkv.runtime.frame_encoder import Encoder, encoder_of, has_encoder
from forcingkv.runtime.given import check_first_frames
from forcingkv.runtime.graph_records import TURN
from forcingkv.runtime.kv.rebuild import Encoding, context_encoding
from forcingkv.runtime.kv.window import first_position, moved_by, scene_shift
from forcingkv.runtime.newest_frames import RecachePass
from forcingkv.runtime.pass_levels import PassLevel, clean_level, denoising_levels, write_levels
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.results import Chunk, Timing
from forcingkv.runtime.sources import first_pass
from forcingkv.runtime.unipc import UniPC

FramesOn: TypeAlias = Literal["host", "device"]
NoiseSource = Callable[[int, int, tuple[int, ...]], Floats]
"""(chunk, step, shape) -> standard normal noise: step 0 starts a chunk, step i + 1 renews it in pass i (the
last pass leaves none, and asks for none). A switch of prompts that redraws chunks asks for steps past those
of all passes."""


@dataclass(frozen=True)
class PendingChunk:
    """A chunk whose passes are in the queue."""

    index: int
    steps: tuple[Fetch, ...]
    """The latents after each denoising pass."""
    started: Mark
    denoised: Mark
    filled: tuple[Mark, Mark]
    """Around the pass that only fills the cache: the clean pass, or the context pass, which comes first; of
    no length, where the last denoising pass does it."""
    requested: float
    """When it was begun, by the host's clock."""
    given: Floats | None = None
    """Its latents, where they were given: there are no denoising passes then."""


class ChunkMaker:
    """All memory of a session, and the passes bound to it.

    Attributes:
        lane: what it runs with.
        cache: the KV cache.
        decoder: decodes chunks.
        encoder: makes latents of frames that are given; None: the bundle has none.
        context: what the cache is made of before each chunk; None: passes of the chunks before fill it.
        lookahead: that of the lane; 0, where a chunk's context is made of the frames of the one before.
        schedule: the model's.
        scenes: how many cuts to another scene there were.
        given: how many chunks at the start of the video were given and not generated, which decides which
            chunk has the steps of the first.
        held: given first frames of chunk 0, None where there are none: see `hold`.
    """

    def __init__(self, bundle: Bundle, lane: Lane, frames: FramesOn) -> None:
        self.lane, self._plan, self._frames_on = lane, bundle.plan, frames
        self._spec, self.schedule = bundle.plan.spec, bundle.plan.spec.schedule
        check_context(lane, bundle.manifest.graphs, self._plan)
        self.given = self.scenes = 0
        self.held: Floats | None = None
        prompt, step = (bundle.manifest.graphs[name] for name in ("prompt", "step"))
        self.cache = lane.cache(self._plan, bundle.manifest.compute)
        self._cross = {name: tensor_of(lane, r, state=True) for name, r in prompt.outputs.items()}
        self.decoder = ChunkDecoder(lane, bundle.manifest, self._spec)
        graphs = bundle.manifest.graphs
        self.encoder: Encoder | None = None
        if has_encoder(graphs, self._plan):
            self.encoder = encoder_of(lane, graphs, self._plan)
        self.context = Context(self._plan, self.encoder) if self._plan.recomputes else None
        self.lookahead = 0 if self.context else lane.lookahead
        self._text = {name: tensor_of(lane, record) for name, record in prompt.inputs.items()}
        self._prompt = lane.bind("prompt", 0, self._text, self._cross)
        self._passes: dict[tuple[int, int, PassLevel, int], Pass] = {}
        self._encoder: RecachePass | None = None
        if lane.recaches and has_recache(bundle.manifest, self._plan):
            self._encoder = RecachePass(lane, self._plan, self.cache, self._cross)
        self._unsettled: Timing | None = None
        self._rotary = {name: tensor_of(lane, step.inputs[name]) for name in ("cosines", "sines")}
        self._turn = {name: tensor_of(lane, step.inputs[name]) for name in TURN if self._plan.relative}
        # A ring of two: pass i reads latents i % 2 and writes the others, so no pass copies its result back.
        self._latents = [tensor_of(lane, step.inputs["latents"]) for _ in range(2)]
        self._noise = tensor_of(lane, step.inputs["noise"]) if self.schedule.renoise == "fresh" else None
        if self._noise is not None:
            self._noise.clear(lane.main)  # taken times 0, it must be a number
        self._levels = write_levels(lane, self._spec, step)
        self._skips_caches = step.skips_caches

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(1, channels, latent frames, height, width) of a chunk."""
        return self._latents[0].shape

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""
        self.cache.restart()
        if self.context:
            self.context.frame = None
        self.given, self.held, self.scenes = 0, None, 0
        self.decoder.restart()

    def cut(self) -> None:
        """Let another scene begin with the next chunk."""
        self.cache.cut()
        self.scenes += 1

    def hold(self, frames: Floats) -> None:
        """Give the first latent frames of the video that comes: they are held while the others of their chunk
        are made.

        Args:
            frames: (1, channels, frames, height, width), fewer frames than a chunk has.

        Raises InputError for frames of another shape, and where passes have one timestep for all frames.
        """
        check_first_frames(self._plan, frames)
        self.held = np.asarray(frames, np.float32)

    def prompt(self, text: Floats) -> None:
        """Let later passes follow a text (1, text_length, text_width)."""
        self._text["text"].write(text, self.lane.main)
        self._prompt.run()

    def begin(
        self,
        index: int,
        noise: NoiseSource,
        source: Floats | None = None,
        strength: float = 1.0,
        before: Floats | None = None,
    ) -> PendingChunk:
        """Put the passes of a chunk into the queue.

        With a `source`, latents of the chunk's shape, it begins with these, noised to the first level that is
        at most `strength`. `before` are the latents of the chunk before it, of which its context is made.
        """
        queue, requested = self.lane.main, time.perf_counter()
        opened = queue.mark()
        if self.context and before is not None:
            self.encode(context_encoding(self._plan, index), self.context.latents(index, before))
        started = queue.mark()
        self._write_positions(index)
        # All noise at once: drawn between passes, each finds the processor's caches full of weights.
        levels = self.levels(index)
        drawn, first = noise(index, 0, self.latent_shape), 0
        if source is not None:
            sigmas = self.schedule.of_chunk(index, self.given).sigmas
            first = first_pass(sigmas[:-1], strength) or 0
            drawn = np.float32(1 - sigmas[first]) * source + np.float32(sigmas[first]) * drawn
        renewing = self._renewing_noise(noise, index, levels, first)
        start = self._with_held(index, drawn)
        self._latents[first % 2].write(start, queue)
        steps = []
        between = self._between(index, first, start)
        for step, level in list(enumerate(levels))[first:]:
            self._denoise(step, level, renewing)
            steps.append(self._latents[(step + 1) % 2].fetch(queue))
            if between and step + 1 < len(levels):
                self._latents[(step + 1) % 2].write(between(steps[-1]), queue)
        denoised = queue.mark()
        filled = (opened, started) if self.context else self._clean(levels, denoised)
        return PendingChunk(index, tuple(steps), started, denoised, filled, requested)

    def take(self, index: int, latents: Floats) -> PendingChunk:
        """Put the clean pass of a chunk into the queue whose latents are given."""
        queue, requested = self.lane.main, time.perf_counter()
        started = queue.mark()
        self._write_positions(index)
        self._latents[0].write(latents, queue)
        denoised = queue.mark()
        filled = (started, started) if self.context else self._clean((), denoised)
        return PendingChunk(index, (), started, denoised, filled, requested, latents)

    def finish(self, pending: PendingChunk) -> Chunk:
        """Wait for a chunk and decode it. Raises NotFiniteError where its latents are not numbers."""
        latents = np.empty(0, np.float32) if pending.given is None else pending.given.copy()
        for step, fetch in enumerate(pending.steps):
            latents = fetch.array()
            if not np.isfinite(latents).all():
                raise NotFiniteError(pending.index, step)
        side = self.lane.side
        opened = side.mark()
        frames = self.decoder.decode(latents, pending.index)
        if self.context:
            self.context.keep(frames, side)
        shown = frames.shared() if self._frames_on == "device" else frames.fetch(side)
        decoded = side.mark()
        decoded.wait()
        if self._frames_on == "host":
            shown = shown.array()
        self.settle()
        self._unsettled = Timing.of(
            denoise=pending.denoised.since(pending.started),
            clean=lambda: _seconds_between(*pending.filled),
            decode=decoded.since(opened),
            total=time.perf_counter() - pending.requested,
        )
        free = self.decoder.freed_by(pending.index) if self._frames_on == "device" else None
        return Chunk(pending.index, shown, latents, self._unsettled, pending.given is not None, free)

    def settle(self) -> None:
        """Take the time of the clean pass of the chunk before, which has long ended: nobody is to find later
        that the lane is closed."""
        if self._unsettled is not None:
            timing, self._unsettled = self._unsettled, None
            _ = timing.clean

    def replay(self, index: int, latents: Floats, noise: NoiseSource, redraw_from: int | None) -> None:
        """Fill the cache with a chunk that was made before, as if it came next: in a clean pass.

        With `redraw_from` its latents are noised as they were before that denoising pass, and drawn from
        there first: a model that was not trained with switches of prompts follows what it sees in clean
        latents, and those show the old prompt. That noise is of steps which no chunk has when it is made.
        Given latents stay what they are. The last of those passes fills the cache where it does so anyway.
        """
        levels = () if redraw_from is None or index < self.given else self.levels(index)
        steps = len(levels)
        self._write_positions(index)
        if redraw_from is None or not levels:
            self._latents[0].write(latents, self.lane.main)
        else:
            sigma = np.float32(levels[redraw_from].sigma)
            renewing = self._renewing_noise(noise, index, levels, redraw_from, steps + 1)
            fresh = noise(index, steps + 1 + redraw_from, self.latent_shape)
            noised = (1 - sigma) * latents + sigma * fresh
            self._latents[redraw_from % 2].write(noised, self.lane.main)
            between = self._between(index, redraw_from, noised)
            for step in range(redraw_from, steps):
                self._denoise(step, levels[step], renewing)
                if between and step + 1 < steps:
                    made = self._latents[(step + 1) % 2]
                    made.write(between(made.fetch(self.lane.main)), self.lane.main)
        self._clean(levels, self.lane.main.mark())

    def encode(self, encoding: Encoding, latents: Floats) -> None:
        """Make the cache anew in one pass over newest frames, under the prompt as it is: `RecachePass`."""
        if self._encoder is None:  # on torch: few videos of such a model need one
            self._encoder = RecachePass(self.lane, self._plan, self.cache, self._cross)
        self._encoder.run(encoding, latents)

    def state(self) -> dict[str, Tensor]:
        """What the next chunk depends on: the KV cache, the prompt's keys and values, decoder caches."""
        parts = {"cache": self.cache.held(), "cross": self._cross, "decoder": self.decoder.held()}
        return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def queue_of(self, name: str) -> Queue:
        """The queue that reads and writes a tensor of the state."""
        return self.lane.side if name.startswith("decoder/") else self.lane.main

    def restore(
        self,
        passes: int,
        decoder_calls: int,
        arrays: Mapping[str, Array],
        *,
        hollow: bool = False,
        cuts: tuple[int, ...] = (),
        scenes: int = 0,
    ) -> None:
        """Take what `state` held after that many clean passes and calls of the decoder (`KvCache.hollow`,
        `KvCache.cuts`), and that many cuts of the video.

        Raises InputError where an array is missing or does not fit; nothing has changed then.
        """
        before = self.cache.passes, self.cache.hollow, self.decoder.called
        self.cache.passes, self.cache.hollow, self.decoder.called = passes, hollow, decoder_calls
        state = self.state()
        for name, tensor in state.items():
            shape = arrays[name].shape if name in arrays else None
            if shape != tensor.shape:
                self.cache.passes, self.cache.hollow, self.decoder.called = before
                raise InputError(
                    f"has {name} of the shape {shape}", where="the saved state", expected=str(tensor.shape)
                )
        self.held, self.scenes, self.cache.cuts = None, scenes, cuts  # those of the video before are gone
        for name, tensor in state.items():
            array = arrays[name]
            tensor.write(_as_bits(array) if tensor.dtype == "bfloat16" else array, self.queue_of(name))

    def levels(self, index: int) -> list[PassLevel]:
        """The denoising passes of a chunk."""
        held = 0 if self.held is None or index else self.held.shape[2]
        return denoising_levels(self.schedule, self.schedule.of_chunk(index, self.given), held)

    def filling(self, index: int) -> tuple[PassLevel, int]:
        """The pass of a chunk that fills the cache, and how many come before it (`bound`)."""
        *_, last = levels = self.levels(index)
        return (last, len(levels) - 1) if last.fills else (clean_level(self.schedule), len(levels))

    def _with_held(self, index: int, latents: Floats) -> Floats:
        """Latents of a chunk, with the frames that were given."""
        if self.held is None or index:
            return latents
        return np.concatenate([self.held, latents[:, :, self.held.shape[2] :]], 2)

    def _between(self, index: int, first: int, latents: Floats) -> Callable[[Fetch], Floats] | None:
        """What a solver that knows several passes makes of the x0 of each from `first` on, for the next one;
        None where a pass gives the next latents itself."""
        if self.schedule.solver != "unipc":
            return None
        solver = UniPC(self.schedule.of_chunk(index, self.given).sigmas[first:], latents)
        return lambda x0: self._with_held(index, solver.following(x0.array()).astype(np.float32))

    def _renewing_noise(
        self, noise: NoiseSource, index: int, levels: Sequence[PassLevel], first: int = 0, offset: int = 0
    ) -> dict[int, Floats]:
        """The new noise of the passes from `first` on: that of pass i is of the step `offset` + i + 1.

        The last pass leaves no noise: whatever is there is taken times 0.
        """
        if self._noise is None:
            return {}
        renewed = [step for step in range(first, len(levels)) if levels[step].sigma_next]
        return {step: noise(index, offset + step + 1, self.latent_shape) for step in renewed}

    def _denoise(self, step: int, level: PassLevel, renewing: Mapping[int, Floats]) -> None:
        if self._noise is not None and step in renewing:
            self._noise.write(renewing[step], self.lane.main)
        if level.fills:
            self.cache.tell()
        self.bound(level, step).run()
        if level.fills:
            self.cache.cleaned()

    def _clean(self, levels: Sequence[PassLevel], denoised: Mark) -> tuple[Mark, Mark]:
        """The clean pass after those, unless the last of them filled the cache; the marks around it."""
        if levels and levels[-1].fills:
            return denoised, denoised
        self.cache.tell()
        self.bound(clean_level(self.schedule), len(levels)).run()
        self.cache.cleaned()
        return denoised, self.lane.main.mark()

    def _write_positions(self, index: int) -> None:
        frames, passes = self._spec.frames_per_chunk, self.cache.passes
        first = first_position(self._plan, passes, index) + scene_shift(self._plan, self.scenes)
        tables = positions.rotary(self._spec, self._plan.geometry, first, frames)
        for tensor, table in zip(self._rotary.values(), tables, strict=True):
            tensor.write(table, self.lane.main)
        if self._turn:
            turn = positions.turn(self._spec, moved_by(self._plan, passes))
            for tensor, table in zip(self._turn.values(), turn, strict=True):
                tensor.write(table, self.lane.main)

    def bound(self, level: PassLevel, step: int) -> Pass:
        """A pass on the cache as it is, `step` passes after a chunk's first.

        A pass is bound once to every combination that gives it other addresses: the phase (shapes of the
        cache), the side (which of the cache's two buffers is read), the level, and which of the two latents
        is read. These are few, so after the first chunks of the last phase nothing is bound any more.
        """
        key = (*self.cache.key, level, step % 2)
        if key not in self._passes:
            current, spare = self._latents[step % 2], self._latents[1 - step % 2]
            inputs = {"latents": current, **self._rotary, **self._turn}
            inputs |= self._levels[level] | self._cross
            if self._noise is not None:
                inputs["noise"] = self._noise
            outputs = {"next_latents": spare}
            if level.fills or not self._skips_caches:
                outputs |= self.cache.outputs()
            inputs |= self.cache.inputs()
            self._passes[key] = self.lane.bind("step", self.cache.phase, inputs, outputs)
        return self._passes[key]


def _seconds_between(first: Mark, second: Mark) -> float:
    """Seconds between two marks that may not have been reached yet."""
    second.wait()
    return second.since(first)


def _as_bits(array: Array) -> Array:
    """bfloat16 that was read as float32, as its bits: uint16."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
