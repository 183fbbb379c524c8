"""How the tokens of latent frames are split into segments: one rule for all implementations.

docs/method.md, "Segment similarity and retention"; docs/decisions/0024 has the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Frames of `frame_tokens` tokens in `segments` runs each, as even as they go.

    Segments are counted through all frames, so segment `i` lies in frame `i // segments`. Within a frame of N
    tokens, segment j of S has the tokens from j * N // S to (j + 1) * N // S, whole numbers: either N // S of
    them or one more. What is kept of a segment is its first N // S, whichever is chosen: every choice of as
    many segments has as many tokens, and none of them twice.
    """

    frame_tokens: int
    segments: int

    @property
    def is_even(self) -> bool:
        """Whether all segments have as many tokens, so that segment i begins at i times that."""
        return self.frame_tokens % self.segments == 0

    @property
    def kept_tokens(self) -> int:
        """Tokens that are kept of a chosen segment."""
        return self.frame_tokens // self.segments

    def start(self, index: int) -> int:
        """The first token of a segment, counted through all frames."""
        frame, place = divmod(index, self.segments)
        return frame * self.frame_tokens + place * self.frame_tokens // self.segments

    def tokens(self, index: int) -> int:
        """Tokens of a segment, all of which count for its similarity."""
        return self.start(index + 1) - self.start(index)
