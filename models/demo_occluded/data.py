"""Clips of two handwritten digits that go away, behind a bar or beyond a side of the frame, and come back.

One digit in each half of the frame, of the same scans as the demo's. Both go away and come back together.
Which digit comes back, from where and at which place can be told from what was seen before it left, and from
nothing else: while it is away its half shows only how many chunks are left to wait, a mark for each, and the
prompt says how long it is away and behind what, not which digit, where or by which way. A bar is always in
view, so it says by which way, but not where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from forcingkv.models.demo.data import DIRECTIONS, HALF, HEIGHT, SIDE, WIDTH, Floats, Split, digits

Kind = Literal["bar", "side"]
"""Where a digit goes: behind a bar that is always there, or beyond a side of the frame."""
KINDS: tuple[Kind, ...] = get_args(Kind)

CHUNK = 3
"""Frames of a chunk: the timeline is one of chunks."""
SPEED = 4
"""Pixels a frame: a token's side, so that a digit that moves covers whole tokens."""
LEAVING = ((24, 20, 16), (12, 8, 4))
"""Pixels by which a digit is inside the line it goes away behind, frame by frame of two chunks. From 16 on it
is seen whole."""
COMING = ((4, 8, 12), (16, 20, 24))
BAR = 8
"""Pixels of a bar's thickness."""
BAR_LEVEL = 0.5
MOST_AWAY = 8
"""Chunks that a digit is away at most."""
MOST_LATE = 3
"""Chunks at most before digits come for the first time."""

EXITS: tuple[tuple[tuple[Kind, str], ...], ...] = tuple(
    (("bar", "up"), ("bar", "down"), ("side", "up"), ("side", "down"), ("side", outwards))
    for outwards in ("left", "right")
)
"""Ways to go away, of the left and of the right half: never through the middle of the frame."""
PLACES = {0: (0, 4, 8), 1: (0, 8, 16)}
"""Where a digit is along the line that it goes away behind, in pixels: by the axis it moves along, 0 for up
and down."""
MARKS = tuple(
    (HEIGHT // 2 - SPEED + row * SPEED + 1, HALF // 2 - 2 * SPEED + column * SPEED + 1)
    for row in range(2)
    for column in range(4)
)
"""Top left corners of the marks, squares in the middle of a half, one for each chunk that is left to wait."""
MARK = 2


@dataclass(frozen=True)
class Timeline:
    """When digits are there: chunks before they come for the first time, and chunks that they are away."""

    late: int
    away: int

    def chunks(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """For each chunk, without end: how far inside the digits are in each frame, and the marks shown."""
        waiting = [((0,) * CHUNK, left) for left in range(self.away, 0, -1)]
        late = [((0,) * CHUNK, left) for left in range(self.late, 0, -1)]
        coming, leaving = ([(inside, 0) for inside in part] for part in (COMING, LEAVING))
        first = [*late, *coming] if self.late else []
        return chain(first, cycle([*leaving, *waiting, *coming]))

    @property
    def leaves(self) -> int:
        """The first chunk in which digits are away after they were seen."""
        return (self.late + len(COMING) if self.late else 0) + len(LEAVING)

    @property
    def returns(self) -> int:
        """The chunk in which they come back for the first time; in the next one they are seen whole."""
        return self.leaves + self.away

    @property
    def seen_whole(self) -> int:
        """The last chunk before `returns` in which they are seen whole."""
        return self.leaves - len(LEAVING)

    def returns_within(self, chunks: int) -> list[int]:
        """Every chunk of a clip of that length in which digits come back."""
        return list(range(self.returns, chunks, len(LEAVING) + self.away + len(COMING)))


@dataclass(frozen=True)
class Mover:
    """One digit of a clip: its class, its scan, and the way that it goes away and comes back."""

    digit: int
    image: Floats
    kind: Kind
    direction: str
    """In which it goes away. It comes back in the opposite one."""
    place: int
    """Pixels along the line that it goes away behind."""
    half: int
    """0: the left half of the frame, 1: the right one."""

    def corner(self, inside: int) -> tuple[int, int]:
        """Top left corner (row, column) within the half, of the digit that many pixels inside."""
        room = (HEIGHT, HALF)
        axis = _axis(self.direction)
        bar = BAR if self.kind == "bar" else 0
        backwards = sum(DIRECTIONS[self.direction]) < 0
        along = inside - SIDE + bar if backwards else room[axis] - inside - bar
        return (along, self.place) if axis == 0 else (self.place, along)

    @property
    def bar_rows(self) -> slice:
        """Rows of the half that its bar covers; none where there is no bar."""
        if self.kind == "side":
            return slice(0, 0)
        return slice(0, BAR) if self.direction == "up" else slice(HEIGHT - BAR, HEIGHT)


@dataclass(frozen=True)
class Clip:
    """frames: float32 (frames, HEIGHT, WIDTH) in [-1, 1]; movers: left half, right half."""

    frames: Floats
    movers: tuple[Mover, Mover]
    timeline: Timeline

    @property
    def prompt(self) -> str:
        left, right = self.movers
        return prompt_of(left.kind, right.kind, self.timeline)

    @property
    def shown(self) -> npt.NDArray[np.bool_]:
        """Pixels of digits' squares (frames, HEIGHT, WIDTH)."""
        seen = np.zeros(self.frames.shape, bool)
        for mover in self.movers:
            for frame, inside in enumerate(_frames_inside(self.timeline, len(seen))):
                _half(seen[frame], mover)[_square(mover, inside)[0]] = inside > 0
        return seen


def prompt_of(left: Kind, right: Kind, timeline: Timeline) -> str:
    """What the text says of a clip: where each half's digit goes, for how long, and when it first comes."""
    return f"{left} and {right} away {timeline.away} late {timeline.late}"


def make_clip(rng: np.random.Generator, timeline: Timeline, chunks: int, split: Split) -> Clip:
    """A random clip of that many chunks, from that split's scans."""
    movers = (_mover(rng, split, 0), _mover(rng, split, 1))
    return render(movers, timeline, chunks)


def render(movers: tuple[Mover, Mover], timeline: Timeline, chunks: int) -> Clip:
    """The clip of two digits on a timeline."""
    canvas = np.zeros((chunks * CHUNK, HEIGHT, WIDTH), np.float32)
    marks = [left for _, left in islice(timeline.chunks(), chunks) for _ in range(CHUNK)]
    for mover in movers:
        for frame, inside in enumerate(_frames_inside(timeline, len(canvas))):
            half = _half(canvas[frame], mover)
            target, source = _square(mover, inside)
            half[target] = mover.image[source]
            half[mover.bar_rows] = BAR_LEVEL
            for row, column in MARKS[: marks[frame]]:
                half[row : row + MARK, column : column + MARK] = 1
    return Clip(canvas * 2 - 1, movers, timeline)


def _mover(rng: np.random.Generator, split: Split, half: int) -> Mover:
    images, classes = digits(split)
    index = rng.integers(len(images))
    kind = KINDS[rng.integers(len(KINDS))]
    ways = [way for of, way in EXITS[half] if of == kind]
    way = str(rng.choice(ways))
    place = int(rng.choice(PLACES[_axis(way)]))
    return Mover(int(classes[index]), images[index], kind, way, place, half)


def _axis(direction: str) -> int:
    return int(DIRECTIONS[direction][0] == 0)


def _half(frame: npt.NDArray[np.generic], mover: Mover) -> npt.NDArray[np.generic]:
    return frame[:, mover.half * HALF : (mover.half + 1) * HALF]


def _frames_inside(timeline: Timeline, frames: int) -> Iterator[int]:
    return islice((inside for chunk, _ in timeline.chunks() for inside in chunk), frames)


def _square(mover: Mover, inside: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a half shows the digit's square, and which part of it."""
    corner = mover.corner(inside)
    target, source = [], []
    for start, room in zip(corner, (HEIGHT, HALF), strict=True):
        first, last = min(max(start, 0), room), min(max(start + SIDE, 0), room)
        target.append(slice(first, last))
        source.append(slice(first - start, last - start))
    return (target[0], target[1]), (source[0], source[1])
