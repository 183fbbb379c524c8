"""What the cache is made of before each chunk, by models that recompute their context (docs/decisions/0050).

The latents of the newest frames, of which the first may go through the VAE again: of the pixel frames that
these latents were decoded to its last one is encoded as the first frame of a new video. What the model sees
then begins as a video begins, with a latent of one pixel frame at position 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.backends import Array, Lane, Queue, Tensor
from forcingkv.runtime.bundle import GraphRecord
from forcingkv.runtime.frame_encoder import Encoder, Frames, has_encoder
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.positions import Floats

FRAME = "context/frame"
"""Tensor of a saved state: `Context.frame`."""


class Context:
    """The newest frames of a video, as the pass before a chunk encodes them.

    Attributes:
        frame: uint8 (1, height, width, 3), what is encoded again before the next chunk; None: nothing is.
    """

    def __init__(self, plan: CachePlan, encoder: Encoder | None) -> None:
        """`encoder` is asked for where the first frame goes through the VAE again."""
        self._spec = plan.spec
        self._encoder = encoder if plan.spec.context_first == "encoded" else None
        self.frame: Frames | None = None

    def keep(self, frames: Tensor, queue: Queue) -> None:
        """Keep what is needed of the frames that a chunk was decoded to, in that queue's order."""
        if self._encoder is not None:
            last_of_first = frames.shape[0] - 1 - (self._spec.context_frames - 1) * self._stride
            self.frame = frames.rows(last_of_first, last_of_first + 1).fetch(queue).array()

    def latents(self, index: int, before: Floats) -> Floats:
        """The frames that are encoded before a chunk.

        Args:
            index: of the chunk, 1 or more.
            before: latents of the chunk before it (1, channels, frames, height, width).

        Returns (1, channels, context_frames, height, width). While the first of them is the first of the
        video it stays as it is.
        """
        count = self._spec.context_frames
        newest = before[:, :, before.shape[2] - count :]
        if self._encoder is None or index * self._spec.frames_per_chunk == count:
            return newest
        assert self.frame is not None, "the chunk before was decoded"
        self._encoder.restart()
        return np.concatenate([self._encoder.encode(self.frame), newest[:, :, 1:]], 2)

    def held(self) -> dict[str, Array]:
        """What a saved state has of it, beside latents."""
        return {} if self.frame is None else {FRAME: self.frame}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Take what `held` gave."""
        self.frame = arrays.get(FRAME)

    @property
    def _stride(self) -> int:
        return self._spec.decoder.temporal_stride


def check_context(lane: Lane, graphs: Mapping[str, GraphRecord], plan: CachePlan) -> None:
    """Raise InputError where a session could not make what a model's chunks see."""
    if not plan.recomputes:
        return
    name = plan.spec.name
    if not lane.recaches:
        raise InputError(
            f"has no graph for the pass that {name} makes before each chunk",
            where="the bundle",
            expected="the graph recache, of an export for ONNX Runtime",
            hint="The backend torch needs none; engines have none.",
        )
    if plan.spec.context_first == "encoded" and not has_encoder(graphs, plan):
        raise without_encoder(plan, "the bundle")


def without_encoder(plan: CachePlan, where: str) -> InputError:
    """What is wrong where no encoder is there that a model needs for its context."""
    return InputError(
        f"has no encoder, and {plan.spec.name} passes the first frame of each context through the VAE again",
        where=where,
        hint="Export it with --encoder vae; or a model file (base = its name) with context_first = 'kept'.",
    )


def check_held(plan: CachePlan, made: int, arrays: Mapping[str, Array], where: str) -> None:
    """Raise InputError unless a saved state has the frame that is encoded again after `made` chunks."""
    if not plan.recomputes or plan.spec.context_first == "kept" or not made:
        return
    width, height = plan.geometry.shown
    frame = arrays.get(FRAME)
    if frame is None or frame.dtype != np.uint8 or frame.shape != (1, height, width, 3):
        found = "is not there" if frame is None else f"is {frame.dtype} {list(frame.shape)}"
        raise InputError(f"its {FRAME} {found}", where=where, expected=f"uint8 [1, {height}, {width}, 3]")
