"""Making one chunk: the denoising passes, the clean pass, decoding.

`begin` puts a chunk's passes into the queue, `finish` waits for what they gave. On a device the passes of
the next chunk run while one is decoded; on a CPU `begin` returns when its passes are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import positions
from forcingkv.runtime.backends import Fetch, Lane, Mark, Pass, Queue, Tensor
from forcingkv.runtime.bundle import CLEAN, Bundle, GraphRecord
from forcingkv.runtime.cache import CacheBuffers
from forcingkv.runtime.decoding import ChunkDecoder
from forcingkv.runtime.faults import NotFiniteError
from forcingkv.runtime.results import Chunk, FramesOn, Timing

Floats = npt.NDArray[np.float32]
NoiseSource = Callable[[int, int, tuple[int, ...]], Floats]
"""(chunk, step, shape) -> standard normal noise: step 0 starts a chunk, step i + 1 renews it in pass i (the
last pass leaves none, and asks for none). A switch of prompts that redraws chunks asks for steps past those
of all passes."""

CLEAN_PASS = -1
"""The step of the clean pass."""


@dataclass(frozen=True)
class Begun:
    """A chunk whose passes are in the queue."""

    index: int
    steps: tuple[Fetch, ...]
    """The latents after each denoising pass."""
    started: Mark
    denoised: Mark
    cleaned: Mark
    asked: float
    """When it was begun, by the host's clock."""


class ChunkMaker:
    """All memory of a session, and the passes bound to it.

    Attributes:
        cache: the KV cache.
        decoder: decodes chunks.
    """

    def __init__(self, bundle: Bundle, lane: Lane, frames: FramesOn) -> None:
        self._plan, self._lane, self._frames_on = bundle.plan, lane, frames
        self._spec, self._schedule = bundle.plan.spec, bundle.plan.spec.schedule
        records = bundle.manifest.graphs
        self.cache = CacheBuffers(self._plan, lane, bundle.manifest.compute)
        self.cross = _tensors(lane, records["prompt"].outputs, state=True)
        self.decoder = ChunkDecoder(lane, records["decode"], self._spec)
        self._text = _tensors(lane, records["prompt"].inputs)
        self._prompt = lane.program("prompt").bind(0, self._text, self.cross)
        self._step, self._passes = lane.program("step"), dict[tuple[int, int, int], Pass]()
        self._rotary = {name: _tensor(lane, records["step"], name) for name in ("cosines", "sines")}
        self._latents = [_tensor(lane, records["step"], "latents") for _ in range(2)]
        self._noise = _tensor(lane, records["step"], "noise") if self._schedule.renoise == "fresh" else None
        if self._noise is not None:
            self._noise.clear(lane.main)  # taken times 0, it must be a number
        self._levels = self._noise_levels(records["step"])
        self._skips_caches = records["step"].skips_caches

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(1, channels, latent frames, height, width) of a chunk."""
        return self._latents[0].shape

    def prompt(self, text: Floats) -> None:
        """Let later passes follow a text (1, text_length, text_width)."""
        self._text["text"].write(text, self._lane.main)
        self._prompt.run(self._lane.main)

    def begin(self, index: int, noise: NoiseSource) -> Begun:
        """Put the passes of a chunk into the queue."""
        queue, shape, asked = self._lane.main, self.latent_shape, time.perf_counter()
        started = queue.mark()
        self._place(index)
        # All noise at once: drawn between passes, each finds the processor's caches full of weights.
        drawn = self._draw(noise, index, 0, 0)
        self._latents[0].write(noise(index, 0, shape), queue)
        steps = []
        for step in range(len(self._schedule.timesteps)):
            self._denoise(step, drawn)
            steps.append(self._latents[(step + 1) % 2].fetch(queue))
        denoised = queue.mark()
        self._clean()
        return Begun(index, tuple(steps), started, denoised, queue.mark(), asked)

    def finish(self, begun: Begun) -> Chunk:
        """Wait for a chunk and decode it. Raises NotFiniteError where its latents are not numbers."""
        for step, fetch in enumerate(begun.steps):
            latents = fetch.array()
            if not np.isfinite(latents).all():
                raise NotFiniteError(begun.index, step)
        side = self._lane.side
        opened = side.mark()
        frames = self.decoder.decode(latents, begun.index)
        shown = frames.shared() if self._frames_on == "device" else frames.fetch(side)
        decoded = side.mark()
        decoded.wait()
        if self._frames_on == "host":
            shown = shown.array()
        timing = Timing(
            denoise=begun.denoised.since(begun.started),
            clean=begun.cleaned.since(begun.denoised),
            decode=decoded.since(opened),
            total=time.perf_counter() - begun.asked,
        )
        return Chunk(begun.index, shown, latents, timing)

    def replay(self, index: int, latents: Floats, noise: NoiseSource, redraw_from: int | None) -> None:
        """The clean pass of a chunk that was made before, as if it came next.

        With `redraw_from` its latents are noised as they were before that denoising pass, and drawn from
        there first. That noise is of steps which no chunk has when it is made.
        """
        passes = len(self._schedule.timesteps)
        self._place(index)
        if redraw_from is None:
            self._latents[passes % 2].write(latents, self._lane.main)
        else:
            sigma = np.float32(self._schedule.sigmas[redraw_from])
            drawn = self._draw(noise, index, redraw_from, passes + 1)
            fresh = noise(index, passes + 1 + redraw_from, self.latent_shape)
            noised = (1 - sigma) * latents + sigma * fresh
            self._latents[redraw_from % 2].write(noised, self._lane.main)
            for step in range(redraw_from, passes):
                self._denoise(step, drawn)
        self._clean()

    def stand_before(self, index: int) -> None:
        """Take that chunk for the next one, with zeros for what the chunks before it would have left."""
        self.cache.passes = self.decoder.called = index
        for tensor in (*self.state().values(), *self._latents):
            tensor.clear(self._lane.main)
        self._place(index)

    def timed_pass(self, step: int = 0) -> float:
        """Seconds of the denoising pass of that number, or of the clean one, of the chunk that comes next."""
        started = self._lane.main.mark()
        self._pass(step).run(self._lane.main)
        return _since(started, self._lane.main)

    def timed_decode(self, index: int) -> float:
        """Seconds of decoding a chunk of zeros."""
        started = self._lane.side.mark()
        self.decoder.decode(np.zeros(self.latent_shape, np.float32), index)
        return _since(started, self._lane.side)

    def state(self) -> dict[str, Tensor]:
        """What the next chunk depends on: the KV cache, the prompt's keys and values, decoder caches."""
        parts = {"cache": self.cache.held(), "cross": self.cross, "decoder": self.decoder.held()}
        return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def fetch(self, tensor: Tensor) -> npt.NDArray[Any]:
        """What a tensor of the state holds, once all chunks that were begun are finished."""
        return tensor.fetch(self._lane.main).array()

    def restore(self, passes: int, decoder_calls: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take what `state` held after that many clean passes and calls of the decoder.

        Raises InputError where an array is missing or does not fit; nothing has changed then.
        """
        before = self.cache.passes, self.decoder.called
        self.cache.passes, self.decoder.called = passes, decoder_calls
        state = self.state()
        for name, tensor in state.items():
            shape = arrays[name].shape if name in arrays else None
            if shape != tensor.shape:
                self.cache.passes, self.decoder.called = before
                raise InputError(
                    f"has {name} of the shape {shape}", where="state", expected=str(tensor.shape)
                )
        for name, tensor in state.items():
            array = arrays[name]
            tensor.write(_as_bits(array) if tensor.dtype == "bfloat16" else array, self._lane.main)
        self._lane.side.wait(self._lane.main.mark())

    def _draw(self, noise: NoiseSource, index: int, first: int, offset: int) -> dict[int, Floats]:
        """The new noise of the passes from `first` on: that of pass i is of the step `offset` + i + 1.

        The last pass leaves no noise: whatever is there is taken times 0.
        """
        if self._noise is None:
            return {}
        steps = range(first, len(self._schedule.timesteps))
        renewed = [step for step in steps if self._schedule.sigmas[step + 1]]
        return {step: noise(index, offset + step + 1, self.latent_shape) for step in renewed}

    def _denoise(self, step: int, drawn: Mapping[int, Floats]) -> None:
        if self._noise is not None and step in drawn:
            self._noise.write(drawn[step], self._lane.main)
        self._pass(step).run(self._lane.main)

    def _clean(self) -> None:
        self._pass(CLEAN_PASS).run(self._lane.main)
        self.cache.swap()

    def _place(self, index: int) -> None:
        frames = self._spec.frames_per_chunk
        tables = positions.rotary(self._spec, self._plan.geometry, index * frames, frames)
        for name, table in zip(("cosines", "sines"), tables, strict=True):
            self._rotary[name].write(table, self._lane.main)

    def _pass(self, step: int) -> Pass:
        """The denoising pass of that number, or the clean one, on the cache as it is."""
        key = (*self.cache.key, step)
        if key not in self._passes:
            place = len(self._schedule.timesteps) if step == CLEAN_PASS else step
            current, spare = self._latents[place % 2], self._latents[1 - place % 2]
            inputs = {"latents": current, **self._rotary, **self._levels[step], **self.cross}
            if self._noise is not None:
                inputs["noise"] = self._noise
            outputs = {"next_latents": spare}
            if step == CLEAN_PASS or not self._skips_caches:
                outputs |= self.cache.outputs()
            self._passes[key] = self._step.bind(self.cache.phase, inputs | self.cache.inputs(), outputs)
        return self._passes[key]

    def _noise_levels(self, record: GraphRecord) -> dict[int, dict[str, Tensor]]:
        """For each step its time features, noise levels and whether it is the clean pass, written once."""
        schedule = self._schedule
        steps = [(timestep, *schedule.sigmas[i : i + 2]) for i, timestep in enumerate(schedule.timesteps)]
        clean, levels = (schedule.context_timestep, 0.0, 0.0), {}
        for step, level in {**dict(enumerate(steps)), CLEAN_PASS: clean}.items():
            timestep, sigma, following = level
            values = {
                "time": positions.time_features(self._spec, np.array([[timestep]])),
                "sigma": np.array([sigma], np.float32),
                "sigma_next": np.array([following], np.float32),
            }
            if record.skips_caches:
                values[CLEAN] = np.array([step == CLEAN_PASS])
            levels[step] = {name: _tensor(self._lane, record, name) for name in values}
            for name, value in values.items():
                levels[step][name].write(value, self._lane.main)
        return levels


def _since(started: Mark, queue: Queue) -> float:
    """Seconds of the work that a queue was given since a mark."""
    done = queue.mark()
    done.wait()
    return done.since(started)


def _as_bits(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """bfloat16 that was read as float32, as its bits."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _tensor(lane: Lane, record: GraphRecord, name: str) -> Tensor:
    shaped = record.inputs[name]
    return lane.tensor(shaped.shape, shaped.dtype)


def _tensors(lane: Lane, records: Mapping[str, Any], *, state: bool = False) -> dict[str, Tensor]:
    return {name: lane.tensor(r.shape, r.dtype, state=state) for name, r in records.items()}
