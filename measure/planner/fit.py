"""The efficiency of each class of GPUs, fitted to published figures; and the others held against it.

One constant a class, and nothing else is fitted: the share of the data sheet's peak that kernels reach. It is
that which makes the mean logarithm of predicted / published zero over the rows with `fitted = true`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from forcingkv.measure.planner.gpus import Gpu, gpu_classes
from forcingkv.measure.planner.published import Case, Row, published_rows
from forcingkv.measure.planner.roofline import pass_seconds

BOUND = 0.15
"""Relative error from which a row has to say why."""
STEPS = 60
"""Halvings of the interval 0 to 1: past the precision of a float."""


@dataclass(frozen=True)
class Efficiency:
    """The constant of a class."""

    value: float
    """Share of the peak that kernels reach."""
    rows: tuple[str, ...]
    """The rows it was fitted to."""
    gpus: tuple[str, ...]
    """The GPUs that those rows were measured on."""
    carried_from: str | None
    """The class it was taken over from: no figure of a GPU of its own has been published or measured."""
    lowest: float
    """What published FPS of the class under the policy full, whose frames are known, would each need: the
    lowest, and the highest."""
    highest: float


@dataclass(frozen=True)
class Outcome:
    """A published figure held against the planner."""

    row: Row
    predicted: float
    error: float
    """predicted / published - 1."""
    needed: float | None
    """For FPS: the efficiency with which the prediction would be exact."""
    policy_frames: float | None
    """For FPS and speed-ups: key frames a head would have to see under the policy for it, mean over the
    video; None where even none would not do."""
    full_frames: float | None
    """For speed-ups: the same under the policy full."""

    @property
    def off(self) -> bool:
        """Whether it is off by more than `BOUND`."""
        return abs(self.error) > BOUND


@cache
def efficiencies() -> dict[str, Efficiency]:
    """The constant of each class, from the rows that ship."""
    found: dict[str, Efficiency] = {}
    cases = [Case(row) for row in published_rows() if row.measure == "fps"]
    classes = gpu_classes()
    for name in sorted(classes, key=lambda one: classes[one].carried_from is not None):
        origin = classes[name].carried_from
        if origin is not None:
            known = found[origin]
            found[name] = replace(known, carried_from=origin)
            continue
        own = [case for case in cases if case.gpu.family == name]
        fitted = [case for case in own if case.row.fitted]
        needed = [fit_efficiency([case]) for case in own if case.row.policy == "full"]
        value = fit_efficiency(fitted)
        names = tuple(case.row.name for case in fitted)
        gpus = tuple(dict.fromkeys(case.gpu.key for case in fitted))
        found[name] = Efficiency(value, names, gpus, None, min(needed), max(needed))
    return found


def basis(gpu: Gpu) -> str:
    """In words, where the constant of a GPU comes from."""
    constant = efficiencies()[gpu.family]
    if gpu.key in constant.gpus:
        return f"fitted to {'; '.join(constant.rows)}"
    near = "of the same class" if constant.carried_from is None else f"of the class {constant.carried_from}"
    return f"taken over from {', '.join(constant.gpus)} {near}: not fitted, never measured"


def fit_efficiency(cases: Sequence[Case]) -> float:
    """The efficiency, 0 to 1, at which predicted FPS are right in the mean of their logarithms.

    Raises ValueError without a case, or for a measure other than FPS, which does not say how fast a GPU is.
    """
    if not cases or any(case.row.measure != "fps" for case in cases):
        raise ValueError("an efficiency is fitted to rows that give frames a second")
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        logs = [math.log(case.predicted(middle) / case.row.published) for case in cases]
        # FPS grow with the efficiency.
        low, high = (middle, high) if sum(logs) < 0 else (low, middle)
    return high


def hold(case: Case, efficiency: float) -> Outcome:
    """Hold a published figure against the planner."""
    row = case.row
    predicted = case.predicted(efficiency)
    policy_frames = full_frames = None
    if row.measure in ("fps", "speedup"):
        mean, attention = _mean_pass(case, efficiency, full=False)
        full, full_attention = _mean_pass(case, efficiency, full=True)
        wanted = case.video.frames / (case.video.passes * row.published)
        if row.measure == "speedup":
            wanted = full / row.published
            full_frames = _frames(case, efficiency, row.published * mean - (full - full_attention))
        policy_frames = _frames(case, efficiency, wanted - (mean - attention))
    return Outcome(
        row=row,
        predicted=predicted,
        error=predicted / row.published - 1,
        needed=fit_efficiency([case]) if row.measure == "fps" else None,
        policy_frames=policy_frames,
        full_frames=full_frames,
    )


def outcomes(rows: Sequence[Row] | None = None) -> list[Outcome]:
    """All published figures against the planner, in the order of the file."""
    cases = [Case(row) for row in (published_rows() if rows is None else rows)]
    return [hold(case, efficiencies()[case.gpu.family].value) for case in cases]


def _mean_pass(case: Case, efficiency: float, *, full: bool) -> tuple[float, float]:
    """Mean seconds of a pass of the video, and of self-attention in it."""
    video = case.full if full else case.video
    times = [(count, pass_seconds(works, case.gpu, efficiency)) for count, works in video.phases]
    total = sum(count * sum(kinds.values()) for count, kinds in times)
    return total / video.chunks, sum(count * kinds["attention"] for count, kinds in times) / video.chunks


def _frames(case: Case, efficiency: float, seconds: float) -> float | None:
    """Key frames that all heads can see in so many seconds of attention."""
    plan = case.plan
    operations = 4 * plan.chunk_tokens * plan.frame_tokens * plan.spec.dim * plan.spec.layers
    frames = seconds * efficiency * case.gpu.peak_flops / operations
    return frames if frames > 0 else None
