"""The denoising passes of a chunk: `Schedule` (`docs/method.md`, "Schedule and renoising")."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds, shown

MOST_STEPS = 1000
"""Denoising passes of a chunk: as many as the scale of timesteps has."""
MOST_OPENING = 1000
"""Chunks with steps of their own."""
TOLD = 8
"""Steps of a list, and chunks, that are named one by one."""
TABLE_ENTRIES = 1000
"""Of the table in which public code looks noise levels up."""

CLEAN_PASS = -1
"""The clean pass, where the number of a denoising pass would stand."""

Renoise = Literal["fresh", "predicted"]
FirstCounts = Literal["generated", "video"]
NoiseLevels = Literal["exact", "table"]
Solver = Literal["step", "unipc"]
FilledBy = Literal["clean", "last"]


@dataclass(frozen=True)
class ChunkSteps:
    """The denoising passes of one chunk."""

    timesteps: tuple[float, ...]
    """What the model is told in each pass."""
    sigmas: tuple[float, ...]
    """The noise levels of the passes, then 0: one longer."""

    def __len__(self) -> int:
        """How many denoising passes there are."""
        return len(self.timesteps)


@dataclass(frozen=True)
class Schedule:
    """The denoising passes of each chunk."""

    denoising_steps: tuple[float, ...]
    """Timesteps of the passes, on the scale 1000 (pure noise) to 0, falling. A last one at 0 is for noise
    levels from the table, where 0 has one."""
    warp: bool = False
    """Whether steps are still to be shifted (`warp_denoising_step`), in every list."""
    shift: float = 1.0
    """The shift of a warped schedule, and of the table: sigma = shift * s / (1 + (shift - 1) * s)."""
    renoise: Renoise = "fresh"
    """Noise between passes: drawn anew (distilled models), or the noise the model predicted (Euler)."""
    context_timestep: float = 0.0
    """The timestep of the clean pass (`context_noise`), and of passes over frames that are given or encoded
    anew."""
    context: FilledBy = "clean"
    """Whose keys and values of a chunk the cache takes: "clean", those of one more pass over what was made;
    "last", those of its last denoising pass, whose latents still have noise, and there is no other pass
    (docs/decisions/0054)."""
    redraw_from: int | None = None
    """When the prompt is switched and the caches are made anew: the pass at which the last chunks enter
    again, noised, to be drawn under the new prompt before their clean pass. None: they are encoded as they
    are, which is enough for models that were trained with switches (LongLive)."""
    first: tuple[float, ...] | None = None
    """Steps of the first chunk, where it has others (`denoising_step_list_first_chunk`)."""
    by_chunk: tuple[tuple[float, ...], ...] | None = None
    """Steps of the opening chunks one by one, where several have others; all later chunks have
    `denoising_steps`. One list is the same as `first`, and only one of both is given."""
    first_counts: FirstCounts = "generated"
    """From where `first` and `by_chunk` count in a video whose start is given: "generated" from the first
    chunk that is generated (Causal Forcing), "video" from the first of the video, so that no chunk has the
    steps of one that was given (One-Forcing)."""
    noise_levels: NoiseLevels = "exact"
    """The noise level of a timestep t: "exact" is t / 1000; "table" is the entry nearest to t of the 1,000 in
    which public code looks it up (`table_of_levels`). They differ where t is none of its entries, as Krea's
    937 and 833."""
    whole_timesteps: bool = False
    """Whether the model is told timesteps without their fraction, as where a solver keeps them as whole
    numbers (LongLive 2: 937 for the level 0.9373). Exact noise levels keep it; the table is asked for the
    whole ones."""
    solver: Solver = "step"
    """What comes between passes: "step" follows from the one pass alone, as `renoise` says; "unipc" from the
    last ones of the chunk (`runtime.unipc`), without noise, so `renoise` is "predicted" then."""

    by_frame: bool = False
    """Whether a pass has a timestep and a noise level for each latent frame of its chunk: given frames at the
    start of a video are held at 0 while the rest of their chunk is made (LongLive 2)."""

    def __post_init__(self) -> None:
        bounds = {"shift": (1e-3, 1e3), "context_timestep": (0, 1000), "redraw_from": (0, MOST_STEPS)}
        check_bounds(self, bounds, "schedule")
        if self.first is not None and self.by_chunk is not None:
            raise InputError(
                "has both first and by_chunk",
                where="schedule",
                expected="first, the steps of the first chunk, or by_chunk, those of several",
            )
        if self.by_chunk is not None and not 1 <= len(self.by_chunk) <= MOST_OPENING:
            what = f"by_chunk has {len(self.by_chunk)} lists"
            raise InputError(what, where="schedule", expected=f"1 to {MOST_OPENING}, one for each chunk")
        if self.solver == "unipc" and self.renoise != "predicted":
            raise InputError(
                f"has the solver unipc, which adds no noise between passes, and renoise is {self.renoise!r}",
                where="schedule",
                expected="renoise = 'predicted' with solver = 'unipc'",
            )
        if self.by_frame and self.redraw_from is not None:
            raise InputError(
                "has by_frame and redraw_from: frames that were given would be drawn anew",
                where="schedule",
                expected="one of both",
            )
        lists = {"denoising_steps": self.denoising_steps}
        lists |= {} if self.first is None else {"first": self.first}
        lists |= {f"by_chunk[{chunk}]": steps for chunk, steps in enumerate(self.by_chunk or ())}
        for name, steps in lists.items():
            self._check(name, steps)
        shortest = min(lists, key=lambda name: len(lists[name]))
        fewest = len(lists[shortest])
        if self.redraw_from is not None and self.redraw_from >= fewest:
            what = f"redraw_from is {self.redraw_from}"
            raise InputError(what, where="schedule", expected=f"a pass of {shortest}, 0 to {fewest - 1}")

    def _check(self, name: str, steps: tuple[float, ...]) -> None:
        """Raise InputError unless a list of steps can be run."""
        if len(steps) > MOST_STEPS:
            what = f"{name} has {len(steps)} timesteps"
            raise InputError(what, where="schedule", expected=f"at most {MOST_STEPS}")
        falling = all(a > b for a, b in itertools.pairwise(steps))
        if not steps or not falling or not 0 <= steps[-1] <= steps[0] <= 1000:  # NaN is no step either
            what = f"{name} {shown(list(steps))} cannot be run"
            expected = "at least one timestep, falling, each above 0 and at most 1000"
            raise InputError(what, where="schedule", expected=expected)
        sigmas = self._steps_of(steps).sigmas
        if not sigmas[-2]:  # of the table's entries none is 0
            raise InputError(
                f"{name} {shown(list(steps))} cannot be run: a pass at 0, whose noise level is 0, changes"
                " nothing",
                where="schedule",
                expected="steps above 0, or noise_levels = 'table', where 0 has the level of the last entry",
            )
        for (a, b), (here, after) in zip(
            itertools.pairwise(steps), itertools.pairwise(sigmas[:-1]), strict=True
        ):
            if here <= after:
                raise InputError(
                    f"{name} has the steps {a:g} and {b:g}, which have one noise level ({here:.6g})",
                    where="schedule",
                    expected="steps further apart, or noise_levels = 'exact'",
                )

    def of_chunk(self, chunk: int, given: int = 0) -> ChunkSteps:
        """The passes of a chunk.

        Args:
            chunk: its index in the video, given chunks counted.
            given: how many chunks at the start of the video were given and not generated.
        """
        place = chunk if self.first_counts == "video" else chunk - given
        return self._opening[place] if 0 <= place < len(self._opening) else self.later

    @cached_property
    def later(self) -> ChunkSteps:
        """The passes of every chunk that has no steps of its own."""
        return self._steps_of(self.denoising_steps)

    @property
    def opening_chunks(self) -> int:
        """How many chunks at most have steps of their own: those after them are all alike."""
        return len(self._opening)

    @property
    def described(self) -> str:
        """The denoising passes in words; of long lists the beginning and the end."""
        said = [f"{_passes(self.later)} a chunk"]
        counted = "of the video" if self.first_counts == "video" else "that is generated"
        for place, steps in enumerate(self._opening[:TOLD]):
            said.append(f"chunk {place + 1} {counted}: {_passes(steps)}")
        if len(self._opening) > TOLD:
            said.append(f"{len(self._opening) - TOLD} more chunks with steps of their own")
        if self.noise_levels == "table":
            said.append(f"noise levels from the table of shift {self.shift:g}")
        between = {"fresh": "noise drawn anew between passes", "predicted": "Euler steps between passes"}
        said.append("UniPC between passes" if self.solver == "unipc" else between[self.renoise])
        if self.by_frame:
            said.append("a timestep for each frame")
        if self.redraw_from is not None:
            said.append(f"a switch of prompts draws again from pass {self.redraw_from + 1}")
        return "; ".join(said)

    @property
    def clean_passes(self) -> int:
        """Passes of a chunk beside its denoising passes: the clean one, or none."""
        return 0 if self.context == "last" else 1

    def passes(self, chunks: int) -> int:
        """Denoising passes of a video of so many chunks, none of them given."""
        opening = self._opening[:chunks]
        return sum(map(len, opening)) + (chunks - len(opening)) * len(self.later)

    @cached_property
    def kinds(self) -> tuple[ChunkSteps, ...]:
        """The passes of every kind of chunk there is, each once: those of later chunks first."""
        return tuple(dict.fromkeys((self.later, *self._opening)))

    @cached_property
    def _opening(self) -> tuple[ChunkSteps, ...]:
        lists = (self.first,) if self.first is not None else self.by_chunk or ()
        return tuple(map(self._steps_of, lists))

    def _steps_of(self, steps: tuple[float, ...]) -> ChunkSteps:
        exact = steps
        if self.warp:
            linear = [step / 1000 for step in steps]
            exact = tuple(1000 * self.shift * s / (1 + (self.shift - 1) * s) for s in linear)
        timesteps = tuple(float(int(t + 1e-9)) for t in exact) if self.whole_timesteps else exact
        if self.noise_levels == "table":
            table = table_of_levels(self.shift)
            nearest = [int(np.argmin(np.abs(1000 * table - np.float32(t)))) for t in timesteps]
            return ChunkSteps(timesteps, (*(float(table[entry]) for entry in nearest), 0.0))
        return ChunkSteps(timesteps, (*(t / 1000 for t in exact), 0.0))


def _passes(steps: ChunkSteps) -> str:
    """How many, and at which timesteps."""
    count = len(steps)
    told = [f"{t:.4g}" for t in steps.timesteps]
    if count > TOLD:
        told = [*told[: TOLD - 1], "...", told[-1]]
    return f"{count} pass{'es'[: 2 * (count > 1)]} at {', '.join(told)}"


def table_of_levels(shift: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The noise levels of public code, falling from 1, in float32 as there: those of s = 1, 0.999, ... 0.001.

    Their timesteps are 1000 times them. It is `FlowMatchScheduler.set_timesteps(1000)` with
    `extra_one_step` (thu-ml/Causal-Forcing, `utils/scheduler.py`).
    """
    # As torch.linspace counts in float32: from whichever end is nearer, rounded once.
    step, places = float(np.float32(1 / TABLE_ENTRIES)), np.arange(TABLE_ENTRIES)
    nearer = 2 * places < TABLE_ENTRIES
    linear = np.where(nearer, 1 - step * places, step * (TABLE_ENTRIES - places)).astype(np.float32)
    wide = np.float32(shift)
    return wide * linear / (1 + (wide - 1) * linear)
