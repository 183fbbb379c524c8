"""Decoding a frame strip by strip: how many strips, and which rows of the frame each of them gives.

A decoder's feature caches and activations at the size of the frame are what fills a GPU at 1080P. So the
graph `decode` makes features of a whole latent frame, and `decode_strip` makes pixels of them, some rows at a
time: each strip has caches of its own, the next ones are made in memory that all strips share, and what is
computed meanwhile is as small as a strip (`models/decoders/rows.py`, docs/decisions/0047).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds

WHOLE_PIXELS = 400_000
"""Of a frame that is decoded at once: one of 832x480 is."""
STRIP_PIXELS = 160_000
"""Of a strip of a larger frame, at most."""
MORE_STRIPS = 1.25
"""As many times the fewest strips there may be, where rows of more but smaller strips come out even."""
MOST_STRIPS = 1000
ALIGNMENT = 256
"""Bytes of which the places of tensors in a block are multiples, as TensorRT wants them."""
OPTION = "--decode-strips"


@dataclass(frozen=True)
class Strips:
    """How a frame is decoded in strips."""

    count: int
    rows: int
    """Of features, in a strip."""
    lag: int
    """Rows of pixels by which a strip is late: the first begins so many above the frame."""
    scale: int
    """Rows of pixels to a row of features."""

    def __post_init__(self) -> None:
        bounds = {"count": (2, MOST_STRIPS), "rows": (1, 1 << 20), "lag": (0, 1 << 20), "scale": (1, 1 << 10)}
        check_bounds(self, bounds, "the strips")

    @property
    def described(self) -> str:
        """How many strips, of how many rows, in words."""
        return f"in {self.count} strips of {self.pixel_rows} rows"

    @property
    def pixel_rows(self) -> int:
        """Rows of pixels of a strip."""
        return self.rows * self.scale

    @property
    def feature_rows(self) -> int:
        """Rows of features of all strips; those below the frame's own are zeros."""
        return self.rows * self.count

    def places(self, strip: int, height: int) -> tuple[int, int, int]:
        """Which rows a strip gives of a frame of that height: the first of them in the frame, the same one in
        the strip, and how many they are."""
        top = strip * self.pixel_rows - self.lag
        first, last = max(top, 0), min(top + self.pixel_rows, height)
        return first, first - top, max(0, last - first)


def choose_strips(width: int, height: int, lag: int, scale: int, count: int | None = None) -> Strips | None:
    """The strips that a frame of that size is decoded in; None: it is decoded as a whole.

    Args:
        width, height: pixels that are computed.
        lag, scale: as in `Strips`, of the decoder.
        count: how many are wanted; None: chosen. A frame of `WHOLE_PIXELS` is decoded as a whole. Else the
            least number of which each has `STRIP_PIXELS` at most, or up to `MORE_STRIPS` times as many if
            fewer rows are computed then: all strips have equally many, and the last may reach beyond the
            frame.

    Raises InputError for a count that cannot be.
    """
    rows = math.ceil((height + lag) / scale)
    if count is not None:
        if not 1 <= count <= min(rows, MOST_STRIPS):
            expected = f"1 to {min(rows, MOST_STRIPS)}, for frames of {width}x{height}"
            raise InputError(f"is {count}", where=OPTION, expected=expected)
        if count == 1:
            return None
    elif width * height <= WHOLE_PIXELS:
        return None
    else:
        fewest = math.ceil(rows / max(1, STRIP_PIXELS // (width * scale)))
        counts = range(fewest, min(math.floor(MORE_STRIPS * fewest), rows, MOST_STRIPS) + 1)
        count = min(counts, key=lambda one: (one * math.ceil(rows / one), one), default=fewest)
    each = math.ceil(rows / count)
    count = math.ceil(rows / each)
    return Strips(count, each, lag, scale) if count > 1 else None


def places_in_block(shapes: Mapping[str, tuple[int, ...]], item: int) -> tuple[dict[str, range], int]:
    """Where tensors lie in one block of memory, one behind the other: numbers of `item` bytes, and how many
    numbers the block has."""
    places, end, step = {}, 0, ALIGNMENT // item
    for name, shape in shapes.items():
        begin = -(-end // step) * step
        end = begin + math.prod(shape)
        places[name] = range(begin, end)
    return places, -(-end // step) * step
