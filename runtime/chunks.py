"""Making one chunk: the denoising passes and the clean pass; `runtime.chunk_decoder` decodes it.

`ChunkMaker.begin` puts a chunk's passes into the queue, `finish` waits for what they gave and decodes it. On
a device the passes of the next chunk run while one is decoded; on a CPU `begin` returns when they are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import positions
from forcingkv.runtime.backends import Array, Fetch, Lane, Mark, Pass, Queue, Tensor
from forcingkv.runtime.bundle import CLEAN, Bundle, GraphRecord
from forcingkv.runtime.chunk_decoder import ChunkDecoder, tensor_of
from forcingkv.runtime.faults import NotFiniteError
from forcingkv.runtime.kv.rebuild import Encoding
from forcingkv.runtime.newest_frames import FramesEncoder
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.results import Chunk, Timing

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
    cleaned: Mark
    requested: float
    """When it was begun, by the host's clock."""


class ChunkMaker:
    """All memory of a session, and the passes bound to it.

    Attributes:
        lane: what it runs with.
        cache: the KV cache.
        decoder: decodes chunks.
    """

    def __init__(self, bundle: Bundle, lane: Lane, frames: FramesOn) -> None:
        self.lane, self._plan, self._frames_on = lane, bundle.plan, frames
        self._spec, self._schedule = bundle.plan.spec, bundle.plan.spec.schedule
        self._steps = len(self._schedule.timesteps)
        """Denoising passes of a chunk. The step of that number is the clean pass."""
        prompt, step, decode = (bundle.manifest.graphs[name] for name in ("prompt", "step", "decode"))
        self.cache = lane.cache(self._plan, bundle.manifest.compute)
        self._cross = {name: tensor_of(lane, r, state=True) for name, r in prompt.outputs.items()}
        self.decoder = ChunkDecoder(lane, decode, self._spec)
        self._text = {name: tensor_of(lane, record) for name, record in prompt.inputs.items()}
        self._prompt = lane.bind("prompt", 0, self._text, self._cross)
        self._passes: dict[tuple[int, int, int], Pass] = {}
        self._encoder: FramesEncoder | None = None
        self._unsettled: Timing | None = None
        self._rotary = {name: tensor_of(lane, step.inputs[name]) for name in ("cosines", "sines")}
        # A ring of two: pass i reads latents i % 2 and writes the others, so no pass copies its result back.
        self._latents = [tensor_of(lane, step.inputs["latents"]) for _ in range(2)]
        self._noise = tensor_of(lane, step.inputs["noise"]) if self._schedule.renoise == "fresh" else None
        if self._noise is not None:
            self._noise.clear(lane.main)  # taken times 0, it must be a number
        self._levels = self._noise_levels(step)
        self._skips_caches = step.skips_caches

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(1, channels, latent frames, height, width) of a chunk."""
        return self._latents[0].shape

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""
        self.cache.restart()
        self.decoder.restart()

    def prompt(self, text: Floats) -> None:
        """Let later passes follow a text (1, text_length, text_width)."""
        self._text["text"].write(text, self.lane.main)
        self._prompt.run()

    def begin(self, index: int, noise: NoiseSource) -> PendingChunk:
        """Put the passes of a chunk into the queue."""
        queue, requested = self.lane.main, time.perf_counter()
        started = queue.mark()
        self._write_positions(index)
        # All noise at once: drawn between passes, each finds the processor's caches full of weights.
        renewing = self._renewing_noise(noise, index, 0, 0)
        self._latents[0].write(noise(index, 0, self.latent_shape), queue)
        steps = []
        for step in range(self._steps):
            self._denoise(step, renewing)
            steps.append(self._latents[(step + 1) % 2].fetch(queue))
        denoised = queue.mark()
        self._clean()
        return PendingChunk(index, tuple(steps), started, denoised, queue.mark(), requested)

    def finish(self, pending: PendingChunk) -> Chunk:
        """Wait for a chunk and decode it. Raises NotFiniteError where its latents are not numbers."""
        for step, fetch in enumerate(pending.steps):
            latents = fetch.array()
            if not np.isfinite(latents).all():
                raise NotFiniteError(pending.index, step)
        side = self.lane.side
        opened = side.mark()
        frames = self.decoder.decode(latents, pending.index)
        shown = frames.shared() if self._frames_on == "device" else frames.fetch(side)
        decoded = side.mark()
        decoded.wait()
        if self._frames_on == "host":
            shown = shown.array()
        self.settle()
        self._unsettled = Timing.of(
            denoise=pending.denoised.since(pending.started),
            clean=lambda: _seconds_between(pending.denoised, pending.cleaned),
            decode=decoded.since(opened),
            total=time.perf_counter() - pending.requested,
        )
        free = self.decoder.freed_by(pending.index) if self._frames_on == "device" else None
        return Chunk(pending.index, shown, latents, self._unsettled, free)

    def settle(self) -> None:
        """Take the time of the clean pass of the chunk before, which has long ended: nobody is to find later
        that the lane is closed."""
        if self._unsettled is not None:
            timing, self._unsettled = self._unsettled, None
            _ = timing.clean

    def replay(self, index: int, latents: Floats, noise: NoiseSource, redraw_from: int | None) -> None:
        """The clean pass of a chunk that was made before, as if it came next.

        With `redraw_from` its latents are noised as they were before that denoising pass, and drawn from
        there first: a model that was not trained with switches of prompts follows what it sees in clean
        latents, and those show the old prompt. That noise is of steps which no chunk has when it is made.
        """
        steps = self._steps
        self._write_positions(index)
        if redraw_from is None:
            self._latents[steps % 2].write(latents, self.lane.main)
        else:
            sigma = np.float32(self._schedule.sigmas[redraw_from])
            renewing = self._renewing_noise(noise, index, redraw_from, steps + 1)
            fresh = noise(index, steps + 1 + redraw_from, self.latent_shape)
            noised = (1 - sigma) * latents + sigma * fresh
            self._latents[redraw_from % 2].write(noised, self.lane.main)
            for step in range(redraw_from, steps):
                self._denoise(step, renewing)
        self._clean()

    def encode(self, encoding: Encoding, latents: Floats) -> None:
        """Make the cache anew in one pass over newest frames, under the prompt as it is: `FramesEncoder`."""
        if self._encoder is None:  # most videos need none
            self._encoder = FramesEncoder(self.lane, self._plan, self.cache, self._cross)
        self._encoder.run(encoding, latents)

    def state(self) -> dict[str, Tensor]:
        """What the next chunk depends on: the KV cache, the prompt's keys and values, decoder caches."""
        parts = {"cache": self.cache.held(), "cross": self._cross, "decoder": self.decoder.held()}
        return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def queue_of(self, name: str) -> Queue:
        """The queue that reads and writes a tensor of the state."""
        return self.lane.side if name.startswith("decoder/") else self.lane.main

    def restore(
        self, passes: int, decoder_calls: int, arrays: Mapping[str, Array], *, hollow: bool = False
    ) -> None:
        """Take what `state` held after that many clean passes and calls of the decoder (`KvCache.hollow`).

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
        for name, tensor in state.items():
            array = arrays[name]
            tensor.write(_as_bits(array) if tensor.dtype == "bfloat16" else array, self.queue_of(name))

    def _renewing_noise(self, noise: NoiseSource, index: int, first: int, offset: int) -> dict[int, Floats]:
        """The new noise of the passes from `first` on: that of pass i is of the step `offset` + i + 1.

        The last pass leaves no noise: whatever is there is taken times 0.
        """
        if self._noise is None:
            return {}
        renewed = [step for step in range(first, self._steps) if self._schedule.sigmas[step + 1]]
        return {step: noise(index, offset + step + 1, self.latent_shape) for step in renewed}

    def _denoise(self, step: int, renewing: Mapping[int, Floats]) -> None:
        if self._noise is not None and step in renewing:
            self._noise.write(renewing[step], self.lane.main)
        self._pass(step).run()

    def _clean(self) -> None:
        self._pass(self._steps).run()
        self.cache.cleaned()

    def _write_positions(self, index: int) -> None:
        frames = self._spec.frames_per_chunk
        tables = positions.rotary(self._spec, self._plan.geometry, index * frames, frames)
        for tensor, table in zip(self._rotary.values(), tables, strict=True):
            tensor.write(table, self.lane.main)

    def _pass(self, step: int) -> Pass:
        """The denoising pass of that number, or the clean one, on the cache as it is.

        A pass is bound once to every combination that gives it other addresses: the phase (shapes of the
        cache), the side (which of the cache's two buffers is read), and the step (noise level, and which of
        the two latents is read). These are few, so after the first chunks of the last phase nothing is bound
        any more.
        """
        key = (*self.cache.key, step)
        if key not in self._passes:
            current, spare = self._latents[step % 2], self._latents[1 - step % 2]
            inputs = {"latents": current, **self._rotary, **self._levels[step], **self._cross}
            if self._noise is not None:
                inputs["noise"] = self._noise
            outputs = {"next_latents": spare}
            if step == self._steps or not self._skips_caches:
                outputs |= self.cache.outputs()
            inputs |= self.cache.inputs()
            self._passes[key] = self.lane.bind("step", self.cache.phase, inputs, outputs)
        return self._passes[key]

    def _noise_levels(self, record: GraphRecord) -> list[dict[str, Tensor]]:
        """For each step its time features, noise levels and whether it is the clean pass, written once."""
        levels = []
        timesteps = *self._schedule.timesteps, self._schedule.context_timestep
        sigmas = *self._schedule.sigmas, 0.0
        for step, timestep in enumerate(timesteps):
            values = {
                "time": positions.time_features(self._spec, np.array([[timestep]])),
                "sigma": np.array([sigmas[step]], np.float32),
                "sigma_next": np.array([sigmas[step + 1]], np.float32),
            }
            if record.skips_caches:
                values[CLEAN] = np.array([step == self._steps])
            tensors = {name: tensor_of(self.lane, record.inputs[name]) for name in values}
            for name, value in values.items():
                tensors[name].write(value, self.lane.main)
            levels.append(tensors)
        return levels


def _seconds_between(first: Mark, second: Mark) -> float:
    """Seconds between two marks that may not have been reached yet."""
    second.wait()
    return second.since(first)


def _as_bits(array: Array) -> Array:
    """bfloat16 that was read as float32, as its bits: uint16."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
