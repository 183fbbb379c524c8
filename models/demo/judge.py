"""An independent reader of demo videos: which digits are seen, and in which direction they move.

It knows nothing of the model: a support-vector classifier of scikit-learn, trained on crops of real
clips of the training scans, and the direction of the ink's centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.ndimage import zoom
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from forcingkv.models.demo.data import DIRECTIONS, HALF, HEIGHT, WIDTH, Moves, make_clip, moves_of
from forcingkv.runtime.spec import ModelSpec

Frames = npt.NDArray[np.floating]
Video = npt.NDArray[np.uint8]

READ_CHUNK = 5
"""Index of the chunk whose digits are read: by then the caches have been pruned several times."""

CROP = 12
"""Side a digit's box is brought to before it is read."""
INK = -0.4
"""Brightness, on the scale -1 to 1, from which a pixel belongs to a digit."""
TRAINING_CLIPS = 1500
SEED = 7


@dataclass(frozen=True)
class Verdict:
    """Whether the prompted digits were read and moved as prompted, in the left and in the right half."""

    digits: tuple[bool, bool]
    directions: tuple[bool, bool]


@cache
def _classifier() -> Pipeline:
    rng, crops, classes = np.random.default_rng(SEED), [], []
    for _ in range(TRAINING_CLIPS):
        clip = make_clip(rng, 1, "train")
        for half, mover in zip(halves(clip.frames), clip.movers, strict=True):
            crop = _crop(half[0])
            if crop is not None:
                crops.append(crop.ravel())
                classes.append(mover.digit)
    return make_pipeline(StandardScaler(), SVC(C=10, gamma="scale")).fit(np.stack(crops), classes)


def read(frames: Frames) -> tuple[int | None, int | None]:
    """The digit of the left and right half, by majority over frames (n, HEIGHT, WIDTH) in [-1, 1].

    None where no frame of that half shows any ink.
    """
    left, right = map(read_half, halves(frames))
    return left, right


def verdict(frames: Frames, wanted: Moves, frames_per_chunk: int, chunk: int) -> Verdict:
    """Judge one video (frames, HEIGHT, WIDTH) against the prompted (digit, direction) of each half.

    Digits are read in the frames of that chunk. A direction is right if the digit sets out as
    prompted in the first chunk and, in that later chunk, still moves along the same axis (it may
    have bounced).
    """
    later = frames[chunk * frames_per_chunk : (chunk + 1) * frames_per_chunk]
    started, moving = ([*map(direction_of, halves(part))] for part in (frames[:frames_per_chunk], later))
    digits = [seen == digit for seen, (digit, _) in zip(read(later), wanted, strict=True)]
    directions = [
        first == way and now is not None and _axis(now) == _axis(way)
        for first, now, (_, way) in zip(started, moving, wanted, strict=True)
    ]
    return Verdict((digits[0], digits[1]), (directions[0], directions[1]))


def shows_digits(spec: ModelSpec) -> bool:
    """Whether videos of a model look like the clips that the judge was trained on: grey, of their size."""
    size = spec.width, spec.height, spec.latent_channels
    return spec.decoder.kind == "pixels" and size == (WIDTH, HEIGHT, 1)


def grey(video: Video) -> npt.NDArray[np.float64]:
    """The first channel of grey frames (frames, height, width, 3) as (frames, height, width) in [-1, 1]."""
    return video[..., 0] / 127.5 - 1


def read_digits(video: Video, prompt: str, frames_per_chunk: int) -> tuple[float | None, float | None]:
    """Shares of the two digits that are read as prompted, and that move as prompted, in `READ_CHUNK`.

    The video is uint8 (frames, 32, 48, 3). None for both where it is too short to have that chunk, and where
    the prompt is not one of two moving digits.
    """
    if len(video) < (READ_CHUNK + 1) * frames_per_chunk:
        return None, None
    try:
        moves = moves_of(prompt)
    except ValueError:
        return None, None
    seen = verdict(grey(video), moves, frames_per_chunk, READ_CHUNK)
    return float(np.mean(seen.digits)), float(np.mean(seen.directions))


def _axis(way: str) -> int:
    return int(DIRECTIONS[way][0] == 0)


def halves(frames: Frames) -> tuple[Frames, Frames]:
    """The left and the right half of frames (n, HEIGHT, WIDTH)."""
    return frames[:, :, :HALF], frames[:, :, HALF:]


def read_half(half: Frames) -> int | None:
    """The digit that most frames of a half (n, HEIGHT, HALF) show; None where none shows any ink."""
    seen = [crop.ravel() for crop in map(_crop, half) if crop is not None]
    if not seen:
        return None
    values, counts = np.unique(_classifier().predict(np.stack(seen)), return_counts=True)
    return int(values[counts.argmax()])


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


def centre_of(half: Frames) -> npt.NDArray[np.float64] | None:
    """Row and column of the ink's centre in one frame of a half; None where there is no ink."""
    ink = np.clip(half - INK, 0, None).astype(np.float64)
    total = ink.sum()
    if total <= 0:
        return None
    rows, columns = np.indices(half.shape)
    return np.array([(ink * rows).sum() / total, (ink * columns).sum() / total])


def direction_of(half: Frames) -> str | None:
    """The main direction of the ink's centre, from the first frame of a half to the last."""
    seen = [centre for centre in map(centre_of, half) if centre is not None]
    if len(seen) < 2:
        return None
    moved = seen[-1] - seen[0]
    if np.abs(moved).max() < 0.5:
        # It turned round within these frames: the longest single step shows the axis.
        moved = max(np.diff(seen, axis=0), key=lambda step: float(np.abs(step).max()))
    return max(DIRECTIONS, key=lambda way: float(np.dot(DIRECTIONS[way], moved)))
