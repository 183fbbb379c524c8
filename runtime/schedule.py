"""The denoising passes of a chunk: `Schedule` (`docs/method.md`, "Schedule and renoising")."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds

MOST_STEPS = 1000
"""Denoising passes of a chunk: as many as the scale of timesteps has."""

CLEAN_PASS = -1
"""The clean pass, where the number of a denoising pass would stand."""

Renoise = Literal["fresh", "predicted"]


@dataclass(frozen=True)
class Schedule:
    """The denoising passes of a chunk."""

    denoising_steps: tuple[float, ...]
    """Timesteps of the passes, on the scale 1000 (pure noise) to 0, falling."""
    warp: bool = False
    """Whether `denoising_steps` are still to be shifted (`warp_denoising_step`)."""
    shift: float = 1.0
    """The shift of a warped schedule: sigma = shift * s / (1 + (shift - 1) * s)."""
    renoise: Renoise = "fresh"
    """Noise between passes: drawn anew (distilled models), or the noise the model predicted (Euler)."""
    context_timestep: float = 0.0
    """The timestep of the clean pass (`context_noise`)."""
    redraw_from: int | None = None
    """When the prompt is switched and the caches are made anew: the pass at which the last chunks enter
    again, noised, to be drawn under the new prompt before their clean pass. None: they are encoded as they
    are, which is enough for models that were trained with switches (LongLive)."""

    def __post_init__(self) -> None:
        bounds = {"shift": (1e-3, 1e3), "context_timestep": (0, 1000), "redraw_from": (0, MOST_STEPS)}
        check_bounds(self, bounds, "schedule")
        steps = self.denoising_steps
        if len(steps) > MOST_STEPS:
            what = f"denoising_steps has {len(steps)} timesteps"
            raise InputError(what, where="schedule", expected=f"at most {MOST_STEPS}")
        falling = all(a > b for a, b in itertools.pairwise(steps))
        if not steps or not falling or steps[0] > 1000 or steps[-1] <= 0:
            what = f"denoising_steps {list(steps)} cannot be run"
            expected = "at least one timestep, falling, each above 0 and at most 1000"
            raise InputError(what, where="schedule", expected=expected)
        if self.redraw_from is not None and not 0 <= self.redraw_from < len(steps):
            what = f"redraw_from is {self.redraw_from}"
            raise InputError(what, where="schedule", expected=f"a pass, 0 to {len(steps) - 1}")

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps given to the model, after warping."""
        if not self.warp:
            return self.denoising_steps
        linear = [step / 1000 for step in self.denoising_steps]
        return tuple(1000 * self.shift * s / (1 + (self.shift - 1) * s) for s in linear)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The noise levels of the passes, then 0."""
        return (*(t / 1000 for t in self.timesteps), 0.0)
