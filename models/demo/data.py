"""Clips of two real handwritten digits, one in each half of the frame, moving and bouncing.

The digits are scikit-learn's (UCI, 1,797 scans of 8 x 8). A fixed fifth of them is held out: the
model never sees those, and the judge's own accuracy is stated on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Floats = npt.NDArray[np.float32]
Split = Literal["train", "held-out"]
Moves = tuple[tuple[int, str], tuple[int, str]]
"""(digit, direction) of the left half and of the right half."""

HEIGHT, WIDTH = 32, 48
HALF = WIDTH // 2
SIDE = 16
"""Pixels of a digit's square: the scans are enlarged from 8."""
SPEEDS = (1, 2)
"""Pixels a frame."""
STRAIGHT_FRAMES = 3
"""No digit bounces within these first frames, so the prompted direction is the one seen."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Unit steps (rows, columns)."""


@dataclass(frozen=True)
class Mover:
    """One digit of a clip: its class, its scan, and its way through the half."""

    digit: int
    image: Floats
    direction: str
    speed: int
    start: tuple[int, int]

    def place(self, frame: int) -> tuple[int, int]:
        """Top left corner (row, column) within the half, after bouncing."""
        return tuple(  # type: ignore[return-value]
            _bounce(start + step * self.speed * frame, room)
            for start, step, room in zip(self.start, DIRECTIONS[self.direction], _ROOM, strict=True)
        )


@dataclass(frozen=True)
class Clip:
    """frames: float32 (frames, HEIGHT, WIDTH) in [-1, 1]; movers: left half, right half."""

    frames: Floats
    movers: tuple[Mover, Mover]

    @property
    def prompt(self) -> str:
        return prompt_of(self.moves)

    @property
    def moves(self) -> Moves:
        """What the prompt says."""
        left, right = self.movers
        return (left.digit, left.direction), (right.digit, right.direction)


_ROOM = (HEIGHT - SIDE, HALF - SIDE)


def prompt_of(moves: Moves) -> str:
    """The prompt for (digit, direction) of the left and right half."""
    return " and ".join(f"a {digit} moving {direction}" for digit, direction in moves)


def moves_of(prompt: str) -> Moves:
    """The inverse of `prompt_of`. Raises ValueError for a prompt of another form."""
    found = re.fullmatch(r"a (\d) moving (\w+) and a (\d) moving (\w+)", prompt)
    if found is None:
        raise ValueError(f"not a prompt of two moving digits: {prompt!r}")
    left, left_way, right, right_way = found.groups()
    return (int(left), left_way), (int(right), right_way)


@cache
def digits(split: Split) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Scans enlarged to (n, SIDE, SIDE) in [0, 1], and their classes."""
    bunch = load_digits()
    train, held_out = train_test_split(
        np.arange(len(bunch.target)), test_size=0.2, random_state=0, stratify=bunch.target
    )
    chosen = train if split == "train" else held_out
    scale = SIDE / bunch.images.shape[1]
    images = [np.clip(zoom(image / 16, scale, order=1), 0, 1) for image in bunch.images[chosen]]
    return np.stack(images).astype(np.float32), bunch.target[chosen]


def make_clip(rng: np.random.Generator, frames: int, split: Split) -> Clip:
    """A random clip of that many frames, from that split's scans."""
    movers = (_mover(rng, split), _mover(rng, split))
    canvas = np.zeros((frames, HEIGHT, WIDTH), np.float32)
    for half, mover in enumerate(movers):
        for frame in range(frames):
            row, column = mover.place(frame)
            column += half * HALF
            canvas[frame, row : row + SIDE, column : column + SIDE] = mover.image
    return Clip(canvas * 2 - 1, movers)


def _mover(rng: np.random.Generator, split: Split) -> Mover:
    images, classes = digits(split)
    index = rng.integers(len(images))
    direction = str(rng.choice(list(DIRECTIONS)))
    speed = int(rng.choice(SPEEDS))
    start = [int(rng.integers(room + 1)) for room in _ROOM]
    reach = speed * (STRAIGHT_FRAMES - 1)
    for axis, step in enumerate(DIRECTIONS[direction]):
        if step:
            low, high = (0, _ROOM[axis] - reach) if step > 0 else (reach, _ROOM[axis])
            start[axis] = int(rng.integers(low, high + 1))
    return Mover(int(classes[index]), images[index], direction, speed, (start[0], start[1]))


def _bounce(position: int, room: int) -> int:
    phase = position % (2 * room)
    return min(phase, 2 * room - phase)
