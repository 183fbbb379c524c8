"""Published figures as data (`published.toml`), and what the planner says in their place."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from forcingkv.headmaps.fields import from_data
from forcingkv.measure.planner.gpus import Gpu, load_gpu
from forcingkv.measure.planner.heads import plan_for
from forcingkv.measure.planner.prediction import VideoWork, predict, video_work
from forcingkv.models.presets import load_spec
from forcingkv.runtime.footprint import kv_parts
from forcingkv.runtime.plan import CachePlan
from forcingkv.runtime.policies import load_policy

Measure = Literal["fps", "speedup", "attention_share", "kv_bytes"]


@dataclass(frozen=True)
class Row:
    """One published figure; the file says what its fields mean."""

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
class _File:
    rows: tuple[Row, ...]


def rows_from(text: str) -> tuple[Row, ...]:
    """The rows of a TOML text. Raises InputError naming the field that is wrong."""
    return from_data(_File, tomllib.loads(text), "published.toml").rows


@cache
def published_rows() -> tuple[Row, ...]:
    """The rows that ship."""
    return rows_from(resources.files(__package__).joinpath("published.toml").read_text(encoding="utf-8"))


class Case:
    """A row and its work, derived once: what is asked again and again is only how long it takes.

    Attributes:
        row: the published figure.
        plan: of its model, resolution and policy.
        gpu: that it was measured on.
        video: its work.
        full: the work of the same video under the policy `full`.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.gpu: Gpu = load_gpu(row.gpu)
        self.plan, self.video = self._work(row.policy)
        self.full = self.video if row.policy == "full" else self._work("full")[1]

    def predicted(self, efficiency: float) -> float:
        """What the planner says, in the row's unit, if kernels reach that share of the peak."""
        row = self.row
        if row.measure == "kv_bytes":
            return sum(kv_parts(self.plan, "bfloat16").values())
        if row.measure == "attention_share":
            at_end = VideoWork(self.video.phases, self.video.phases[-1][1], *self._rest())
            return predict(at_end, self.gpu, efficiency).attention_time
        fps = predict(self.video, self.gpu, efficiency).fps
        return fps if row.measure == "fps" else fps / predict(self.full, self.gpu, efficiency).fps

    def _rest(self) -> tuple[int, int]:
        return self.video.passes, self.video.frames

    def _work(self, policy: str) -> tuple[CachePlan, VideoWork]:
        row = self.row
        spec = load_spec(row.model)
        plan, _ = plan_for(spec, spec.geometry(row.resolution), load_policy(policy))
        return plan, video_work(plan, row.chunks)
