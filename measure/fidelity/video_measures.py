"""All numbers of one video, from its frames as they come: their names and units, and how they are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.fidelity.drift import Look, drift, look_of
from forcingkv.measure.fidelity.motion import measure_motion
from forcingkv.measure.fidelity.pairs import psnr, squared_error, ssim
from forcingkv.measure.fidelity.seams import ChunkLayout, chunk_discontinuity, seam, seams

Frame = npt.NDArray[np.uint8]
Frames = Iterable[Frame]
Values = dict[str, float | None]
"""Metric -> its value for one video; None where it has none."""


METRICS = {
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", ""),
    "digits_read": ("digits read", "share"),
    "direction_right": ("direction right", "share"),
    "motion": ("motion", "px"),
    "dynamic_degree": ("dynamic degree", "share"),
    "chunk_discontinuity": ("chunk discontinuity", ""),
    "seam_motion": ("seam motion", ""),
    "seam_jolt": ("seam jolt", ""),
    "seam_residual": ("seam residual", ""),
    "sharpness_drift": ("sharpness drift", "log2"),
    "contrast_drift": ("contrast drift", "L*"),
    "chroma_drift": ("chroma drift", "C*"),
    "colour_drift": ("colour drift", "dE"),
    "colour_drift_most": ("colour drift, most", "dE"),
    "histogram_drift": ("histogram drift", "L*a*b*"),
}
"""Title and unit of what is measured of a video alone and against a reference, in the order of tables.

The unit is "" for ratios, and "share" for what lies between 0 and 1 and is shown in percent.
"""


def measure_video(
    frames: Frames, layout: ChunkLayout, fps: float, *, top: int | None = None, where: str = "video"
) -> dict[str, Any]:
    """Measure a video in one pass over its frames, of which it keeps two or three.

    Args:
        frames: each uint8 (height, width, 3), all of one size.
        layout: where its chunks begin.
        top: pairs that the published chunk discontinuity takes; None: as many as there are boundaries.
        where: names the video in errors.

    Returns:
        `frames`: how many; `values` (`Values`); `boundaries`: pairs of frames at the boundaries of chunks;
        `seams`: the ratios at each of them (`seams.seams`).

    Raises InputError for fewer than two frames, fewer pairs than `top`, or frames of several sizes.
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
    pairs, boundaries = len(looks) - 1, layout.boundaries(len(looks))
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
    return {"frames": len(looks), "values": values, "boundaries": boundaries, "seams": jumps}


def measure_pair(frames: Frames, reference: Frames, *, where: str = "video") -> dict[str, Any]:
    """Compare a video with its reference, frame by frame, in one pass.

    Returns `values` (`Values`), `psnr_by_frame` in dB, None where a frame is identical, and `ssim_by_frame`.
    Raises InputError where they differ in size or length.
    """
    errors, similar = list[float](), list[float]()
    for frame, other in zip_longest(frames, reference):
        if frame is None or other is None:
            shorter = len(errors)
            counts = f"{shorter}", f"more than {shorter}"
            own, wanted = counts if frame is None else counts[::-1]
            raise InputError(
                f"has {own} frames",
                where=where,
                expected=f"{wanted}, as the reference has",
                hint="Compare videos of one prompt, seed and length.",
            )
        if frame.shape != other.shape:
            (height, width), (tall, wide) = frame.shape[:2], other.shape[:2]
            wanted = f"{wide}x{tall}, as the reference has"
            raise InputError(f"has frames of {width}x{height}", where=where, expected=wanted)
        errors.append(squared_error(frame, other))
        similar.append(ssim(frame, other))
    if not errors:
        raise InputError("has no frames", where=where)
    values: Values = {"psnr": psnr(float(np.mean(errors))), "ssim": float(np.mean(similar))}
    return {"values": values, "psnr_by_frame": list(map(psnr, errors)), "ssim_by_frame": similar}
