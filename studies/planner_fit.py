"""The planner held against published figures, and its one constant fitted to one of them.

    python studies/planner_fit.py     # writes measure/planner/published.json, which the product ships

One constant for each class of GPUs, and nothing else, is fitted: the share of the data sheet's peak that
kernels reach. With it the mean logarithm of predicted / published is zero over the rows of `published.toml`
that have `fitted = true`. Run it again when the planner or the rows change: a test compares the
file with what this gives.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from forcingkv.headmaps.fields import from_data
from forcingkv.headmaps.reading import parse_toml
from forcingkv.headmaps.writing import write_text
from forcingkv.measure.nominal import plan_for
from forcingkv.measure.planner import published as shipped
from forcingkv.measure.planner.gpus import Gpu, load_gpu
from forcingkv.measure.planner.published import BOUND
from forcingkv.measure.planner.speed import VideoWork, pass_seconds, predict, video_work
from forcingkv.models.presets import load_spec
from forcingkv.runtime.footprint import kv_parts
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.policies import load_policy

STEPS = 60
"""Halvings of the interval 0 to 1: past the precision of a float."""
OUT = Path(shipped.__file__).with_name(shipped.FILE)
Measure = Literal["fps", "speedup", "attention_share", "kv_bytes"]


@dataclass(frozen=True)
class PublishedFigure:
    """One published figure; `published.toml` explains its fields."""

    name: str
    model: str
    resolution: str
    chunks: int
    policy: str
    measure: Measure
    published: float
    gpu: str = "h200"
    fitted: bool = False
    note: str | None = None
    reason: str | None = None


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
class GpuClass:
    """GPUs that share one efficiency constant."""

    summary: str
    carried_from: str | None = None
    """The class whose constant it uses, where no published figure is from a GPU of its own."""


@dataclass(frozen=True)
class PublishedFile:
    """`published.toml`."""

    rows: tuple[PublishedFigure, ...]
    classes: Mapping[str, GpuClass]


def parse_published(text: str) -> PublishedFile:
    """The rows and classes of a TOML text. Raises InputError naming the field that is wrong."""
    return from_data(PublishedFile, parse_toml(text, "published.toml"), "published.toml")


@cache
def _file() -> PublishedFile:
    return parse_published(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))


def published_rows() -> tuple[PublishedFigure, ...]:
    """The figures in `published.toml`."""
    return _file().rows


class FigureWork:
    """A row and its work, derived once: how long that takes is asked many times.

    Attributes:
        row: the published figure.
        plan: of its model, resolution and policy.
        gpu: that it was measured on.
        video: its work.
        full: the work of the same video under the policy `full`.
    """

    def __init__(self, row: PublishedFigure) -> None:
        self.row = row
        self.gpu: Gpu = load_gpu(row.gpu)
        self.plan, self.video = self._work(row.policy)
        self.full = self.video if row.policy == "full" else self._work("full")[1]

    def predicted(self, efficiency: float) -> float:
        """What the planner predicts, in the row's unit, if kernels reach that share of the peak."""
        row = self.row
        if row.measure == "kv_bytes":
            return sum(kv_parts(self.plan, "bfloat16").values())
        if row.measure == "attention_share":
            last = self.video.phases[-1].work
            at_end = VideoWork(self.video.phases, last, last, *self._rest())
            return float(predict(at_end, self.gpu, efficiency)["attention_time_share"])
        fps: float = predict(self.video, self.gpu, efficiency)["fps"]
        return fps if row.measure == "fps" else fps / predict(self.full, self.gpu, efficiency)["fps"]

    def _rest(self) -> tuple[int, int]:
        return self.video.passes, self.video.frames

    def _work(self, policy: str) -> tuple[CachePlan, VideoWork]:
        row = self.row
        spec = load_spec(row.model)
        plan, _ = plan_for(spec, spec.geometry(row.resolution), load_policy(policy))
        return plan, video_work(plan, row.chunks)


@dataclass(frozen=True)
class Outcome:
    """A published figure held against the planner."""

    row: PublishedFigure
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
    """The constant of each class, fitted to the rows of `published.toml`."""
    found: dict[str, Efficiency] = {}
    cases = [FigureWork(row) for row in published_rows() if row.measure == "fps"]
    classes = _file().classes
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


def fit_efficiency(cases: Sequence[FigureWork]) -> float:
    """The efficiency, 0 to 1, at which predicted FPS are right in the mean of their logarithms.

    Raises ValueError without a case, or for a measure other than FPS: no other depends on a GPU's speed.
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


def hold(case: FigureWork, efficiency: float) -> Outcome:
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


def outcomes(rows: Sequence[PublishedFigure] | None = None) -> list[Outcome]:
    """All published figures against the planner, in the order of the file."""
    cases = [FigureWork(row) for row in (published_rows() if rows is None else rows)]
    return [hold(case, efficiencies()[case.gpu.family].value) for case in cases]


def _mean_pass(case: FigureWork, efficiency: float, *, full: bool) -> tuple[float, float]:
    """Mean seconds of a pass of the video, and of self-attention in it."""
    video = case.full if full else case.video
    times = [(phase.chunks, pass_seconds(phase.work, case.gpu, efficiency)) for phase in video.phases]
    total = sum(count * sum(kinds.values()) for count, kinds in times)
    return total / video.chunks, sum(count * kinds["attention"] for count, kinds in times) / video.chunks


def _frames(case: FigureWork, efficiency: float, seconds: float) -> float | None:
    """Key frames that all heads can see in so many seconds of attention."""
    plan = case.plan
    operations = 4 * plan.chunk_tokens * plan.frame_tokens * plan.spec.dim * plan.spec.layers
    frames = seconds * efficiency * case.gpu.peak_flops / operations
    return frames if frames > 0 else None


def findings() -> dict[str, Any]:
    """What the product ships: the constants, and each figure with its prediction."""
    return {
        "made_by": "python studies/planner_fit.py",
        "efficiency": {name: asdict(constant) for name, constant in efficiencies().items()},
        "rows": [asdict(outcome) | {"off": outcome.off} for outcome in outcomes()],
    }


def main() -> None:
    """Fit, predict, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    write_text(parser.parse_args().out, json.dumps(findings(), indent=1) + "\n")


if __name__ == "__main__":
    main()
