"""Latents that a video begins with, of a picture or of the end of another video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.clips import Fit, fitter, last_frames, open_clip, read_picture
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.spec import ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.session import Session


def picture_start(session: Session, path: Path, fit: Fit = "crop") -> tuple[Floats, list[str]]:
    """Latents for `Session.generate(start=...)` that show a picture, and what was done to it, in sentences.

    A model whose schedule can hold a frame (`Schedule.by_frame`), or whose chunk is one, begins with the
    picture; for others it stands still for a chunk, since what is given are whole ones.

    Raises InputError for a picture that cannot be read, and as `Session.encode` does; MissingExtraError
    without PyAV.
    """
    spec, making = session.spec, fitter(session.plan.geometry, fit)
    frame = read_picture(path, making)
    latent = 1 if spec.schedule.by_frame else spec.frames_per_chunk
    shown = _pixel_frames(spec, latent)
    notes = [f"{path}: {note}" for note in making.notes]
    if shown > 1:
        notes.append(
            f"{path} stands still for {shown} frames: {spec.name} begins with whole chunks, of"
            f" {latent} latent frames"
        )
    return session.encode(np.repeat(frame[None], shown, 0)), notes


def clip_start(
    session: Session, path: Path, fit: Fit = "crop", fps: float | None = None
) -> tuple[Floats, list[str]]:
    """Latents for `Session.generate(start=...)` that show the end of a video, and what was done to it.

    As many whole chunks as leave room in the model's window for one more, at `fps` frames a second (None: the
    model's). Of a video that is shorter than a chunk all, where the schedule can hold frames
    (`Schedule.by_frame`).

    Raises InputError for a video that cannot be read, or is too short, and as `picture_start`.
    """
    spec, making = session.spec, fitter(session.plan.geometry, fit)
    size = spec.frames_per_chunk
    most = max(1, spec.attended_frames // size - 1) * size
    with open_clip(path, making, fps or spec.fps) as frames:
        there = last_frames(frames, _pixel_frames(spec, most))
    latent = 1 + (len(there) - 1) // spec.decoder.temporal_stride
    latent = latent // size * size if latent >= size else latent if spec.schedule.by_frame else 0
    if not latent:
        raise InputError(
            f"has {len(there)} frames at {fps or spec.fps:g} a second",
            where=str(path),
            expected=f"{_pixel_frames(spec, size)} or more, those of a chunk of {spec.name}",
            hint="Give its last frame as a picture (--image) in place of it.",
        )
    used = there[-_pixel_frames(spec, latent) :]
    notes = [f"{path}: {note}" for note in making.notes]
    notes.append(f"{path}: goes on from its last {len(used)} frames")
    return session.encode(np.stack(used)), notes


def _pixel_frames(spec: ModelSpec, latent: int) -> int:
    """Pixel frames that the first latent frames of a video show."""
    return 1 + (latent - 1) * spec.decoder.temporal_stride
