"""All numbers of one video, from its frames as they come: their names and units, and how they are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.fidelity.drift import Look, drift, look_of
from forcingkv.measure.fidelity.motion import measure_motion
from forcingkv.measure.fidelity.pairs import psnr, squared_error, ssim
from forcingkv.measure.fidelity.seams import ChunkLayout, Ratios, chunk_discontinuity, seam, seams

Frame = npt.NDArray[np.uint8]
Frames = Iterable[Frame]
Values = dict[str, float | None]
"""Metric -> its value for one video; None where it has none."""


@dataclass(frozen=True)
class Metric:
    """What a number of a video is."""

    title: str
    unit: str
    """"" for ratios, "share" for what lies between 0 and 1 and is shown in percent."""
    meaning: str


METRICS = {
    "psnr": Metric("PSNR", "dB", "against the reference; nothing where identical"),
    "ssim": Metric("SSIM", "", "against the reference; 1: identical"),
    "digits_read": Metric("digits read", "share", "as prompted, in chunk 5 (demo model)"),
    "direction_right": Metric("direction right", "share", "as prompted, in chunk 5 (demo model)"),
    "motion": Metric("motion", "px", "mean optical flow of adjacent frames"),
    "dynamic_degree": Metric("dynamic degree", "share", "videos that move, by VBench's rule"),
    "chunk_discontinuity": Metric("chunk discontinuity", "", "published: most moving pairs over all"),
    "seam_motion": Metric("seam motion", "", "flow at chunk boundaries over inside; 1: no seam"),
    "seam_jolt": Metric("seam jolt", "", "change of flow at boundaries over inside; 1: no seam"),
    "seam_residual": Metric("seam residual", "", "unexplained change at boundaries over inside; 1: no seam"),
    "sharpness_drift": Metric("sharpness drift", "log2", "first to last second; -1: halved"),
    "contrast_drift": Metric("contrast drift", "L*", "first to last second"),
    "chroma_drift": Metric("chroma drift", "C*", "first to last second; above 0: stronger colours"),
    "colour_drift": Metric("colour drift", "dE", "between mean colours of first and last second"),
    "colour_drift_most": Metric("colour drift, most", "dE", "from the first second to any other"),
    "histogram_drift": Metric("histogram drift", "L*a*b*", "between colours of first and last second"),
}
"""Those of a video alone and those against a reference; the order is that of tables."""


@dataclass(frozen=True)
class VideoMeasures:
    """Of a video alone."""

    values: Values
    frames: int
    boundaries: tuple[int, ...]
    """Pairs of frames at the boundaries of chunks."""
    seams: dict[str, Ratios]
    """`seams.seams`: the ratios at each of them."""


@dataclass(frozen=True)
class PairMeasures:
    """Of a video against a reference."""

    values: Values
    psnr_by_frame: tuple[float | None, ...]
    """dB; None where a frame is identical."""
    ssim_by_frame: tuple[float, ...]


def measure_video(
    frames: Frames, layout: ChunkLayout, fps: float, *, top: int | None = None, where: str = "video"
) -> VideoMeasures:
    """Measure a video in one pass over its frames, of which it keeps two or three.

    Args:
        frames: each uint8 (height, width, 3), all of one size.
        layout: where its chunks begin.
        fps: frames a second.
        top: pairs that the published chunk discontinuity takes; None: as many as there are boundaries.
        where: names the video in errors.

    Raises:
        InputError: it has fewer than two frames, fewer pairs than `top`, or frames of several sizes.
    """
    looks: list[Look] = []

    def looked_at() -> Iterator[Frame]:
        size: tuple[int, ...] | None = None
        for frame in frames:
            size = size or frame.shape
            if frame.shape != size:
                raise InputError(f"changes its size after {len(looks)} frames", where=where)
            looks.append(look_of(frame))
            yield frame
        if len(looks) < 2:
            raise InputError(
                f"has {len(looks)} frame{'s' * (not looks)}", where=where, expected="two or more"
            )

    motion = measure_motion(looked_at(), fps)
    pairs, boundaries = len(looks) - 1, tuple(layout.boundaries(len(looks)))
    if top is not None and top > pairs:
        raise InputError(
            f"has {pairs} pairs of frames, and the {top} with most motion are asked for", where=where
        )
    jumps, largest = seams(motion, layout), top or len(boundaries)
    values: Values = {
        "motion": float(motion.magnitude.mean()),
        "dynamic_degree": float(motion.dynamic),
        "chunk_discontinuity": chunk_discontinuity(motion.magnitude, largest) if largest else None,
        **{f"seam_{name}": seam(ratios) for name, ratios in jumps.items()},
        **drift(looks, fps),
    }
    return VideoMeasures(values, len(looks), boundaries, jumps)


def measure_pair(frames: Frames, reference: Frames, *, where: str = "video") -> PairMeasures:
    """Compare a video with its reference, frame by frame, in one pass.

    Raises InputError where they differ in size or length.
    """
    errors, similar = list[float](), list[float]()
    for frame, other in zip_longest(frames, reference):
        if frame is None or other is None:
            shorter = len(errors)
            counts = (f"{shorter}", f"more than {shorter}")
            own, wanted = counts if frame is None else counts[::-1]
            raise InputError(
                f"has {own} frames",
                where=where,
                expected=f"{wanted}, as the reference has",
                hint="Compare videos of one prompt, seed and length.",
            )
        if frame.shape != other.shape:
            (height, width), (tall, wide) = frame.shape[:2], other.shape[:2]
            raise InputError(
                f"has frames of {width}x{height}",
                where=where,
                expected=f"{wide}x{tall}, as the reference has",
            )
        errors.append(squared_error(frame, other))
        similar.append(ssim(frame, other))
    if not errors:
        raise InputError("has no frames", where=where)
    values: Values = {"psnr": psnr(float(np.mean(errors))), "ssim": float(np.mean(similar))}
    return PairMeasures(values, tuple(map(psnr, errors)), tuple(similar))
