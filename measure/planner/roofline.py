"""Seconds of a pass: for each kind of work the longer of computing it and moving its bytes.

The roofline of Williams, Waterman and Patterson (2009), with one change: kernels reach a share of the peak,
the **efficiency**, one constant for each class of GPUs (`fit.py`). Kinds follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping

from forcingkv.measure.planner.gpus import Gpu
from forcingkv.measure.planner.work import PassWork, Work


def work_seconds(work: Work, gpu: Gpu, efficiency: float) -> float:
    """Seconds of one kind of work. `efficiency` is the share of the peak that is reached, above 0."""
    return max(work.flops / (efficiency * gpu.peak_flops), work.bytes / gpu.bandwidth)


def pass_seconds(works: PassWork, gpu: Gpu, efficiency: float) -> Mapping[str, float]:
    """Seconds of a pass by kind of work; their sum is the pass."""
    return {kind: work_seconds(work, gpu, efficiency) for kind, work in works.items()}
