"""What passes are told of noise: `PassLevel`, and the tensors that tell it, written when a session opens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from forcingkv.runtime import positions
from forcingkv.runtime.backends import Lane, Tensor
from forcingkv.runtime.bundle import CLEAN, GraphRecord
from forcingkv.runtime.chunk_decoder import tensor_of
from forcingkv.runtime.schedule import ChunkSteps, Schedule
from forcingkv.runtime.spec import ModelSpec


class PassLevel(NamedTuple):
    """What a pass is told of noise. Passes of equal levels do the same work, whichever chunks they are of."""

    timestep: float
    sigma: float
    """The noise level of the latents that it reads."""
    sigma_next: float
    """Of those that it writes."""
    fills: bool = False
    """Whether it makes the next caches: the clean pass, or the last one of a chunk that has none."""
    held: int = 0
    """How many frames at the start of the chunk are held at 0."""


def denoising_levels(schedule: Schedule, steps: ChunkSteps, held: int = 0) -> list[PassLevel]:
    """The denoising passes of a chunk."""
    following = steps.sigmas[1:]
    if schedule.solver == "unipc":
        following = (0.0,) * len(steps)  # the pass gives x0
    fills = [schedule.context == "last" and step == len(steps) - 1 for step in range(len(steps))]
    numbers = zip(steps.timesteps, steps.sigmas[:-1], following, fills, strict=True)
    return [PassLevel(*each, held=held) for each in numbers]


def clean_level(schedule: Schedule) -> PassLevel:
    """The clean pass of every chunk, or of those that are given or encoded anew."""
    return PassLevel(schedule.context_timestep, 0.0, 0.0, fills=True)


def write_levels(lane: Lane, spec: ModelSpec, record: GraphRecord) -> dict[PassLevel, dict[str, Tensor]]:
    """For each pass that any chunk can have its time features, noise levels and whether it fills the cache.

    `record` is that of the graph `step`.
    """
    schedule = spec.schedule
    levels = [level for steps in schedule.kinds for level in denoising_levels(schedule, steps)]
    if schedule.by_frame:
        first = schedule.of_chunk(0)
        for held in range(1, spec.frames_per_chunk):
            levels += denoising_levels(schedule, first, held)
    written: dict[PassLevel, dict[str, Tensor]] = {}
    for level in dict.fromkeys((*levels, clean_level(schedule))):
        values: dict[str, npt.NDArray[np.generic]] = {
            "time": positions.time_features(spec, _of_frames(spec, level, level.timestep)[None]),
            "sigma": _of_frames(spec, level, level.sigma).astype(np.float32),
            "sigma_next": _of_frames(spec, level, level.sigma_next).astype(np.float32),
        }
        if record.skips_caches:
            values[CLEAN] = np.array([level.fills])
        tensors = {name: tensor_of(lane, record.inputs[name]) for name in values}
        for name, value in values.items():
            tensors[name].write(value, lane.main)
        written[level] = tensors
    return written


def _of_frames(spec: ModelSpec, level: PassLevel, number: float) -> npt.NDArray[np.float64]:
    """A number of a pass: (1,), or by frame (frames,), 0 for those that are held."""
    count = spec.frames_per_chunk if spec.schedule.by_frame else 1
    return np.repeat([0.0, number], [level.held, count - level.held])
