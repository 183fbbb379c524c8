"""An independent reader of demo videos: which digits are seen, and in which direction they move.

It knows nothing of the model: a support-vector classifier of scikit-learn, trained on crops of real
clips of the training scans, and the direction of the ink's centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.ndimage import zoom
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from forcingkv.models.demo.data import DIRECTIONS, HALF, Moves, Split, make_clip

Frames = npt.NDArray[np.floating]

CROP = 12
"""Side a digit's box is brought to before it is read."""
INK = -0.4
"""Brightness, on the scale -1 to 1, from which a pixel belongs to a digit."""
TRAINING_CLIPS = 1500
SEED = 7


@dataclass(frozen=True)
class Verdict:
    """What the judge saw in one video."""

    digits: tuple[bool, bool]
    """Whether the prompted digit was read, in the left and the right half."""
    directions: tuple[bool, bool]
    """Whether it moved as prompted."""


class Judge:
    """Reads digits from frames; `Judge.fit()` trains one."""

    def __init__(self, classifier: Pipeline) -> None:
        self.classifier = classifier

    @classmethod
    @cache
    def fit(cls) -> Judge:
        """Train on real clips of the training scans."""
        crops, classes = _crops("train", TRAINING_CLIPS, SEED)
        classifier = make_pipeline(StandardScaler(), SVC(C=10, gamma="scale"))
        classifier.fit(crops, classes)
        return cls(classifier)

    def read(self, frames: Frames) -> tuple[int | None, int | None]:
        """The digit of the left and right half, by majority over frames (n, HEIGHT, WIDTH) in [-1, 1].

        None where no frame of that half shows any ink.
        """
        left, right = (self._majority([_crop(half) for half in halves]) for halves in _halves(frames))
        return left, right

    def _majority(self, crops: Sequence[npt.NDArray[np.float32] | None]) -> int | None:
        seen = [crop.ravel() for crop in crops if crop is not None]
        if not seen:
            return None
        votes = self.classifier.predict(np.stack(seen))
        values, counts = np.unique(votes, return_counts=True)
        return int(values[counts.argmax()])


def direction(frames: Frames) -> tuple[str | None, str | None]:
    """The main direction of the ink's centre, in each half, from the first frame to the last."""
    left, right = (_direction([_centre(half) for half in halves]) for halves in _halves(frames))
    return left, right


def verdict(judge: Judge, frames: Frames, wanted: Moves, frames_per_chunk: int, chunk: int) -> Verdict:
    """Judge one video (frames, HEIGHT, WIDTH) against the prompted (digit, direction) of each half.

    Digits are read in the frames of that chunk. A direction is right if the digit sets out as
    prompted in the first chunk and, in that later chunk, still moves along the same axis (it may
    have bounced).
    """
    later = frames[chunk * frames_per_chunk : (chunk + 1) * frames_per_chunk]
    read = judge.read(later)
    started, moving = direction(frames[:frames_per_chunk]), direction(later)
    digits = [seen == digit for seen, (digit, _) in zip(read, wanted, strict=True)]
    directions = [
        first == way and now is not None and _axis(now) == _axis(way)
        for first, now, (_, way) in zip(started, moving, wanted, strict=True)
    ]
    return Verdict((digits[0], digits[1]), (directions[0], directions[1]))


def _axis(way: str) -> int:
    return int(DIRECTIONS[way][0] == 0)


def _halves(frames: Frames) -> tuple[Frames, Frames]:
    return frames[:, :, :HALF], frames[:, :, HALF:]


def _crop(half: Frames) -> npt.NDArray[np.float32] | None:
    rows, columns = np.nonzero(half > INK)
    if not len(rows):
        return None
    box = half[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    # The longer side fills the crop; the other keeps its proportion, centred.
    scale = CROP / max(box.shape)
    small = zoom(np.maximum(box, -1) + 1, scale, order=1, mode="nearest", grid_mode=True)
    crop = np.zeros((CROP, CROP), np.float32)
    height, width = min(CROP, small.shape[0]), min(CROP, small.shape[1])
    top, left = (CROP - height) // 2, (CROP - width) // 2
    crop[top : top + height, left : left + width] = small[:height, :width]
    return crop


def _centre(half: Frames) -> npt.NDArray[np.float64] | None:
    ink = np.clip(half - INK, 0, None).astype(np.float64)
    total = ink.sum()
    if total <= 0:
        return None
    rows, columns = np.indices(half.shape)
    return np.array([(ink * rows).sum() / total, (ink * columns).sum() / total])


def _direction(centres: Sequence[npt.NDArray[np.float64] | None]) -> str | None:
    seen = [centre for centre in centres if centre is not None]
    if len(seen) < 2:
        return None
    moved = seen[-1] - seen[0]
    if np.abs(moved).max() < 0.5:
        # It turned round within these frames: the longest single step shows the axis.
        moved = max(np.diff(seen, axis=0), key=lambda step: float(np.abs(step).max()))
    return max(DIRECTIONS, key=lambda way: float(np.dot(DIRECTIONS[way], moved)))


def _crops(split: Split, clips: int, seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    crops, classes = [], []
    for _ in range(clips):
        clip = make_clip(rng, 1, split)
        for halves, mover in zip(_halves(clip.frames), clip.movers, strict=True):
            crop = _crop(halves[0])
            if crop is not None:
                crops.append(crop.ravel())
                classes.append(mover.digit)
    return np.stack(crops), np.asarray(classes)
