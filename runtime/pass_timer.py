"""Timing single passes of a session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from forcingkv.runtime.backends import Queue
from forcingkv.runtime.chunks import ChunkMaker
from forcingkv.runtime.graph_records import latent_shape
from forcingkv.runtime.kv.rebuild import context_encoding


class PassTimer:
    """Times single passes as they are at a chunk, without the video before it.

    How long a pass takes does not depend on what the caches hold, only on how much: they have the lengths of
    that chunk, and are full of zeros. What comes out means nothing.

    Attributes:
        cache_bytes: of all buffers for keys and values.
    """

    def __init__(self, using: Callable[[], AbstractContextManager[ChunkMaker]], chunk: int) -> None:
        """For `Session.pass_timer`. It asks for the session's memory each time (`using`), and keeps none."""
        self._using, self._chunk = using, chunk
        with using() as maker:
            self.cache_bytes = maker.cache.nbytes
            maker.cache.restart()
            maker.cache.passes = maker.decoder.called = chunk
            for name, tensor in maker.state().items():
                tensor.clear(maker.queue_of(name))
            for tensor in maker._latents:
                tensor.clear(maker.lane.main)
            maker._write_positions(chunk)

    def denoise(self) -> float:
        """Seconds of the first denoising pass. Raises RuntimeError, as all three do, once the session is
        closed or was used for something else."""
        with self._using() as maker:
            first = maker.levels(self._chunk)[0]
            return _seconds(maker.lane.main, maker.bound(first, 0).run)

    def fill(self) -> float:
        """Seconds of the pass that makes the next caches: the clean pass, or the last denoising pass where
        there is no clean one; of models that recompute their context that over newest frames before each
        chunk but the first. The chunk stays the next one."""
        with self._using() as maker:
            plan, passes = maker.cache.plan, maker.cache.passes
            if plan.recomputes:
                newest = np.zeros(latent_shape(plan, plan.spec.context_frames), np.float32)
                one = context_encoding(plan, 1)
                seconds = _seconds(maker.lane.main, lambda: maker.encode(one, newest))
                maker.cache.passes = passes
                return seconds
            return _seconds(maker.lane.main, maker.bound(*maker.filling(self._chunk)).run)

    def decode(self) -> float:
        """Seconds of decoding a chunk."""
        with self._using() as maker:
            zeros = np.zeros(maker.latent_shape, np.float32)
            return _seconds(maker.lane.side, lambda: maker.decoder.decode(zeros, self._chunk))


def _seconds(queue: Queue, work: Callable[[], object]) -> float:
    started = queue.mark()
    work()
    done = queue.mark()
    done.wait()
    return done.since(started)
