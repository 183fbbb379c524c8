"""Pictures and videos of any size and rate as frames of a model's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.spec import Geometry
from forcingkv.runtime.video_reader import open_decoded

Frame = npt.NDArray[np.uint8]
"""(height, width, 3)."""
Fit = Literal["crop", "pad"]
"""What becomes of frames of another shape: their outer parts are cut off, or black is added."""
MOST_RATIO = 64.0
"""Between the two sides of a frame, and of a pixel."""
_ON_TIME = 1e-3
"""Seconds by which a frame may come later than it is shown: rates are rounded in files."""


@dataclass
class Fitter:
    """Makes frames of one size of frames of any.

    Attributes:
        notes: what was done to them, in sentences, each once; known when the first frames have come.
    """

    width: int
    height: int
    fit: Fit = "crop"
    notes: list[str] = field(default_factory=list)

    def __call__(self, frame: Any) -> Frame:
        """A frame of PyAV's as uint8 (height, width, 3). One that has the size already stays as it is."""
        pixels = self._upright(self._opaque(frame), frame)
        aspect = self._aspect(frame, pixels)
        if pixels.shape[:2] == (self.height, self.width) and math.isclose(aspect, self.width / self.height):
            return pixels
        wanted = self.width / self.height
        return self._cropped(pixels, aspect, wanted) if self.fit == "crop" else self._padded(pixels, aspect)

    def _opaque(self, frame: Any) -> Frame:
        alpha = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
        if not alpha:
            return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        pixels = np.asarray(frame.to_ndarray(format="rgba"), np.uint8)
        opaque = pixels[..., 3:].astype(np.uint16)
        if opaque.min() < 255:
            self._note("what is transparent is shown over black")
        return ((pixels[..., :3] * opaque + 127) // 255).astype(np.uint8)

    def _upright(self, pixels: Frame, frame: Any) -> Frame:
        turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
        if turns:
            self._note(f"turned by {90 * turns} degrees, as the file says")
        return np.ascontiguousarray(np.rot90(pixels, turns))

    def _aspect(self, frame: Any, pixels: Frame) -> float:
        """Width by height as it is shown: pixels need not be square."""
        shape = getattr(frame, "sample_aspect_ratio", None)
        pixel = float(shape) if shape else 1.0
        if (getattr(frame, "rotation", 0) or 0) % 180:
            pixel = 1 / pixel
        aspect: float = pixels.shape[1] / pixels.shape[0] * pixel
        if not (1 / MOST_RATIO <= aspect <= MOST_RATIO and 1 / MOST_RATIO <= pixel <= MOST_RATIO):
            raise InputError(
                f"is {aspect:.3g} times as wide as high",
                where="a frame",
                expected=f"at most {MOST_RATIO:g} times",
            )
        return aspect

    def _cropped(self, pixels: Frame, aspect: float, wanted: float) -> Frame:
        height, width = pixels.shape[:2]
        kept = height, width
        if aspect > wanted:
            kept = height, max(1, round(width * wanted / aspect))
        elif aspect < wanted:
            kept = max(1, round(height * aspect / wanted)), width
        if kept != (height, width):
            self._note(f"{width}x{height} is cropped to its middle {kept[1]}x{kept[0]} (--fit pad shows all)")
        top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
        part = pixels[top : top + kept[0], left : left + kept[1]]
        return self._scaled(part, self.width, self.height)

    def _padded(self, pixels: Frame, aspect: float) -> Frame:
        width = min(self.width, max(1, round(self.height * aspect)))
        height = min(self.height, max(1, round(self.width / aspect)))
        made = np.zeros((self.height, self.width, 3), np.uint8)
        if (width, height) != (self.width, self.height):
            self._note(f"black is added beside {width}x{height} to make {self.width}x{self.height}")
        top, left = (self.height - height) // 2, (self.width - width) // 2
        made[top : top + height, left : left + width] = self._scaled(pixels, width, height)
        return made

    def _scaled(self, pixels: Frame, width: int, height: int) -> Frame:
        if pixels.shape[:2] == (height, width):
            return np.ascontiguousarray(pixels)
        import av

        self._note(f"{pixels.shape[1]}x{pixels.shape[0]} is scaled to {width}x{height}")
        shrinks = pixels.shape[1] > width or pixels.shape[0] > height
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        made = frame.reformat(width, height, "rgb24", interpolation="AREA" if shrinks else "BICUBIC")
        return np.asarray(made.to_ndarray(format="rgb24"), np.uint8)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def fitter(geometry: Geometry, fit: Fit) -> Fitter:
    """What makes frames of a model's size."""
    width, height = geometry.shown
    return Fitter(width, height, fit)


def read_picture(path: Path, fitter: Fitter) -> Frame:
    """The frame of a picture: PNG, JPEG, WebP, BMP, TIFF, or the first of a GIF.

    Raises InputError where there is none, or it is damaged, and MissingExtraError without PyAV.
    """
    with open_decoded(path, pictures=True) as (_, frames):
        return fitter(next(iter(frames)))


@contextmanager
def open_clip(path: Path, fitter: Fitter, fps: float) -> Iterator[Iterator[Frame]]:
    """A video file as frames of a size and rate, made as they are asked for.

    At another rate each moment shows the frame that the file shows then. Raises InputError where it is no
    video, and while it is read, where it is damaged; MissingExtraError without PyAV.
    """
    with open_decoded(path) as (rate, frames):
        if not math.isclose(rate, fps, rel_tol=1e-3):
            fitter._note(f"{rate:g} frames a second are shown as {fps:g}: frames are repeated or left out")
        yield (fitter(frame) for frame in _in_time(frames, rate, fps))


def _in_time(frames: Iterator[Any], rate: float, fps: float) -> Iterator[Any]:
    """The frame that is shown at each multiple of 1 / fps, from the first one on."""
    begins: float | None = None
    shown, made, until = None, 0, 0.0
    for number, frame in enumerate(frames):
        time = number / rate if frame.time is None else float(frame.time)
        begins = time if begins is None else begins
        time -= begins
        while shown is not None and made / fps < time - _ON_TIME:
            yield shown
            made += 1
        shown, until = frame, time + 1 / rate
    while shown is not None and made / fps < until - _ON_TIME:
        yield shown
        made += 1


def last_frames(frames: Iterator[Frame], most: int) -> list[Frame]:
    """The last `most` of the frames; none of the others is held."""
    kept: list[Frame] = []
    for frame in frames:
        kept.append(frame)
        if len(kept) > most:
            del kept[0]
    return kept
