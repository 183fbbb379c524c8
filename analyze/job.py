"""What has to be done to record one sample, in whatever process does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from forcingkv.analyze.recorder import record_sample
from forcingkv.analyze.recording import SCHEMA, RecordedDtype, Recording
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity
from forcingkv.headmaps.fields import one_of
from forcingkv.models.checkpoint import Weights, build_model
from forcingkv.models.heads import head_orders, permute_tensor
from forcingkv.runtime.plan import CachePlan, build_plan
from forcingkv.runtime.policies import load_policy
from forcingkv.runtime.spec import ModelSpec

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Job:
    """A run of measurements. It can be sent to another process."""

    spec: ModelSpec
    weights: Weights
    texts: Sequence[npt.NDArray[np.float32]]
    """Text inputs, each (1, text_length, text_width); sample i uses text i, in turn."""
    seed: int = 0
    """Seed of sample 0; sample i has this plus i."""
    chunks: int | None = None
    """Chunks a video; None: until the model attends to as much as it can."""
    policy: str = "full"
    headmap: HeadMap | None = None
    """For policies that group heads."""
    resolution: str | None = None
    rows: int | None = None
    """Query rows measured of each pass and layer; None: all."""
    device: Device = "cpu"
    dtype: RecordedDtype = "float32"
    threads: int | None = None
    """CPU threads; None: as many as torch chooses."""

    def plan(self) -> CachePlan:
        """The cache plan. Raises InputError where policy, map and model do not fit."""
        policy = load_policy(self.policy)
        plan = build_plan(self.spec, self.spec.geometry(self.resolution), policy, self.headmap)
        if plan.choice and not plan.choice.role.shared:
            raise InputError(
                "lets every layer choose segments for itself",
                where=f"policy {policy.name}",
                expected="shared = true: one choice of retained segments a chunk is recorded",
            )
        return plan

    @cached_property
    def recording(self) -> Recording:
        """What all samples have in common. Reads the weights through once, for their digest.

        Raises InputError for too few chunks, and as `plan` does.
        """
        spec = self.spec
        plan = self.plan()
        chunks = self.chunks or spec.attended_frames // spec.frames_per_chunk
        if chunks <= spec.ar_start + 1:
            raise InputError(f"{chunks} chunks", where="chunks", expected=f"more than {spec.ar_start + 1}")
        return Recording(
            schema=SCHEMA,
            model=ModelIdentity(spec.name, spec.layers, spec.heads, self.weights.digest),
            spec=spec,
            width=plan.geometry.width,
            height=plan.geometry.height,
            policy=self.policy,
            headmap=self.headmap.digest if self.headmap and plan.policy.needs_headmap else None,
            seed=self.seed,
            chunks=chunks,
            # Sampling all rows is not sampling.
            rows=self.rows if self.rows and self.rows < plan.chunk_tokens else None,
            dtype=self.dtype,
        )

    def text(self, sample: int) -> npt.NDArray[np.float32]:
        """The text input of a sample."""
        return self.texts[sample % len(self.texts)]


class SampleRecorder:
    """A model on its device, ready to record samples of a job."""

    def __init__(self, job: Job, recording: Recording) -> None:
        if job.threads:
            torch.set_num_threads(job.threads)
        self.job, self.recording = job, recording
        self.plan = job.plan()
        self.orders = head_orders(job.spec, self.plan.policy, job.headmap)
        self.dtype: torch.dtype = getattr(torch, job.dtype)
        self.model = build_model(job.spec, self._ordered(), job.device, self.dtype)

    def record(
        self, sample: int, text: npt.NDArray[np.float32], progress: Callable[[int], None] = lambda chunk: None
    ) -> pl.DataFrame:
        """The rows of a sample with that text. Raises InputError where attention is not a number."""
        placed = torch.tensor(text, dtype=self.dtype, device=self.job.device)
        return record_sample(
            self.model,
            self.plan,
            placed,
            self.job.seed + sample,
            sample,
            self.recording.chunks,
            rows=self.recording.rows,
            orders=self.orders,
            progress=progress,
        )

    def _ordered(self) -> Weights:
        """The weights with heads as the plan groups them; as they are where it does not."""
        weights, spec = self.job.weights, self.job.spec
        if not self.plan.policy.needs_headmap:
            return weights
        return Weights(weights.shapes, lambda n: permute_tensor(n, weights[n], spec, self.orders))


def choose_device(name: str | None) -> Device:
    """`cpu` or `cuda`; None: a GPU where torch sees one. Raises InputError for another, or none there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    device: Device = one_of(Device, name, "device")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError(
            "torch sees no GPU",
            where="device",
            expected="a CUDA build of torch, and a GPU",
            hint="Use --device cpu.",
        )
    return device
