"""The demo model's curriculum, as data: short clips first, so that the prompt is learned.

Later chunks can copy their context; only the first one, at high noise, needs the text. Clips of one
chunk in large batches teach it cheaply, before clips grow.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stretch of training with clips of one length."""

    chunks: int
    batch: int
    steps: int
    rate: float
    """Learning rate at the start of the stage; it runs linearly to `rate_end`."""
    rate_end: float
    singles: int = 0
    """Clips of one chunk trained beside each batch, lest the first chunk be forgotten."""


STAGES = (
    Stage(chunks=1, batch=32, steps=1700, rate=4e-3, rate_end=2.9e-3),
    Stage(chunks=3, batch=12, steps=200, rate=2.2e-3, rate_end=2.1e-3),
    Stage(chunks=7, batch=5, steps=600, rate=2e-3, rate_end=8.3e-4),
    Stage(chunks=7, batch=5, singles=32, steps=380, rate=8.3e-4, rate_end=2e-5),
)
