"""Rows of a frame, as the layers of a decoder meet them: all at once, or strip by strip from the top.

Convolutions over three rows need the row below, which a strip does not have yet. So each makes its result
one row **late**: from the rows of its strip and the last two of the strip before, which are handed on
(**edges**). Nothing is computed twice, and each strip carries its own feature caches, which lie as late as
the layer. After the last layer a strip's pixels are `lag` rows late: the first rows of the first strip are
above the frame, and the strips go on below it until its last row is there. What layers compute outside the
frame is of no account, but convolutions must read zeros there, as they do around a whole frame.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EDGE = "edge."
"""How the names begin of what one strip hands on to the next."""
LATER = 16
"""Rows by which layers of one size may differ in their lag."""


class Rows:
    """All rows of a frame at once: the convolutions pad with zeros themselves."""

    lag = 0
    """Rows by which what was computed last is late."""

    def above(self, x: Tensor, height: int) -> tuple[Tensor, int]:
        """What a convolution over `height` rows reads (..., rows, width), and with how many rows it pads."""
        return x, height // 2

    def later(self, x: Tensor, lag: int) -> Tensor:
        """What was computed with a lag of `lag` rows, as late as what was computed last."""
        return x

    def inside(self, x: Tensor) -> Tensor | None:
        """(rows, 1): 1 for rows of x within the frame, 0 for others, where x is as late as what was computed
        last; None: all are within."""
        return None

    def enlarged(self, factor: int) -> None:
        """From here on there are so many times as many rows."""


class StripRows(Rows):
    """The rows of one strip.

    Attributes:
        following: what the next strip is to be given as `edges`.
    """

    def __init__(self, top: Tensor, height: int, edges: Mapping[str, Tensor] | None) -> None:
        """Of features whose frame has `height` rows.

        Args:
            top: (1,), float32: the frame's row that the strip begins with.
            height: rows of the frame.
            edges: what the strip before gave as `following`; None: zeros, as the first strip is given.
        """
        self.lag, self._scale = 0, 1
        self._top, self._height, self._edges = top, height, edges
        self._mask: tuple[int, Tensor] | None = None  # of the present size, from a lag on
        self.following: dict[str, Tensor] = {}

    def above(self, x: Tensor, height: int) -> tuple[Tensor, int]:
        if height == 1:
            return x, 0
        assert height == 3, "a convolution over more rows is later by more"
        self.lag += 1
        return self._behind(x, 2), 0

    def later(self, x: Tensor, lag: int) -> Tensor:
        rows = self.lag - lag
        return self._behind(x, rows)[..., : x.shape[-2], :] if rows else x

    def inside(self, x: Tensor) -> Tensor | None:
        if self._mask is None:
            self._mask = self.lag, self._from(x.shape[-2] + LATER, self.lag + LATER).to(x.dtype)
        lag, mask = self._mask
        begin = LATER - (self.lag - lag)
        assert begin >= 0, "more convolutions at one size than LATER has room for"
        return mask[begin : begin + x.shape[-2]]

    def enlarged(self, factor: int) -> None:
        self.lag, self._scale, self._mask = factor * self.lag, factor * self._scale, None

    def _from(self, rows: int, before: int) -> Tensor:
        """(rows, 1), float32: 1 for rows within the frame, 0 for others, from `before` rows above the strip
        on. What it computes with is whole numbers, which less than float32 would round."""
        place = torch.arange(rows, dtype=torch.float32, device=self._top.device) - before
        place = place + self._top * self._scale
        # Of whole numbers: comparisons would be three operators each, and bounds of their own in a graph.
        return ((place + 1).clamp(0, 1) * (self._height * self._scale - place).clamp(0, 1))[:, None]

    def _behind(self, x: Tensor, rows: int) -> Tensor:
        """A strip behind the last rows of the one before."""
        name = f"{EDGE}{len(self.following)}"
        if self._edges is not None:
            before = self._edges[name]
        else:
            before = x.new_zeros(*x.shape[:-2], rows, x.shape[-1])
        joined = torch.cat([before, x], -2)
        self.following[name] = joined[..., -rows:, :].clone()
        return joined
