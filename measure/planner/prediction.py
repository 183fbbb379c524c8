"""Seconds of a pass, of a chunk and of a video, and frames a second, without decoding.

A pass takes, for each kind of work, the longer of computing it and moving its bytes: the roofline of
Williams, Waterman and Patterson (2009), with one change: kernels reach a share of the peak, the
**efficiency**, one constant for each class of GPUs (`published.py`). Kinds of work follow one another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from forcingkv.measure.planner.gpus import Gpu
from forcingkv.measure.planner.work import PassWork, Work, pass_work
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype


def work_seconds(work: Work, gpu: Gpu, efficiency: float) -> float:
    """Seconds of one kind of work. `efficiency` is the share of the peak that is reached, above 0."""
    return max(work.flops / (efficiency * gpu.peak_flops), work.bytes / gpu.bandwidth)


def pass_seconds(works: PassWork, gpu: Gpu, efficiency: float) -> Mapping[str, float]:
    """Seconds of a pass by kind of work; their sum is the pass."""
    return {kind: work_seconds(work, gpu, efficiency) for kind, work in works.items()}


@dataclass(frozen=True)
class VideoWork:
    """The work of a video: that of a pass in each phase, and how many chunks are in the phase."""

    phases: tuple[tuple[int, PassWork], ...]
    """(chunks, work of a pass), in order; phases that the video does not reach are left out."""
    steady: PassWork
    """Work of a pass in the last phase of the plan, reached or not."""
    passes: int
    """Passes a chunk, the clean pass included."""
    frames: int
    """Pixel frames a chunk, as published figures count them: the decoder's temporal stride x latent frames,
    in the first chunk too."""

    @property
    def chunks(self) -> int:
        return sum(count for count, _ in self.phases)


@dataclass(frozen=True)
class Prediction:
    """How fast a video is made, decoding and text left out. All times in seconds."""

    kinds: dict[str, float]
    """Of a pass in the last phase, by kind of work."""
    passes: int
    mean_pass: float
    """Of a pass, on average over the video: caches grow over its first chunks."""
    fps: float
    """Frames a second, over the whole video: temporal stride x latent frames / time in the transformer."""
    attention_operations: float
    """Share of self-attention in all operations of a pass in the last phase."""

    @property
    def steady_pass(self) -> float:
        """Of a pass in the last phase."""
        return sum(self.kinds.values())

    @property
    def steady_chunk(self) -> float:
        """Of a chunk in the last phase: its denoising passes and its clean pass."""
        return self.passes * self.steady_pass

    @property
    def mean_chunk(self) -> float:
        """Of a chunk, on average over the video."""
        return self.passes * self.mean_pass

    @property
    def attention_time(self) -> float:
        """Share of self-attention in the time of a pass in the last phase. Blocks take all of that time but
        some 0.1%, so it is a block's share too."""
        return self.kinds["attention"] / self.steady_pass


def video_work(plan: CachePlan, chunks: int, dtype: Dtype = "bfloat16") -> VideoWork:
    """The work of a video of so many chunks."""
    begins = [phase.first_chunk for phase in plan.phases]
    counts = Counter(max(begin for begin in begins if begin <= chunk) for chunk in range(chunks))
    return VideoWork(
        phases=tuple((counts[begin], pass_work(plan, begin, dtype)) for begin in begins if counts[begin]),
        steady=pass_work(plan, None, dtype),
        passes=len(plan.spec.schedule.timesteps) + 1,
        frames=plan.spec.frames_per_chunk * plan.spec.decoder.temporal_stride,
    )


def predict(video: VideoWork, gpu: Gpu, efficiency: float) -> Prediction:
    """Predict a video on a GPU whose kernels reach that share of the peak."""
    kinds = dict(pass_seconds(video.steady, gpu, efficiency))
    total = sum(count * sum(pass_seconds(works, gpu, efficiency).values()) for count, works in video.phases)
    mean = total / video.chunks
    return Prediction(
        kinds=kinds,
        passes=video.passes,
        mean_pass=mean,
        fps=video.frames / (video.passes * mean),
        attention_operations=video.steady["attention"].flops / sum(w.flops for w in video.steady.values()),
    )
