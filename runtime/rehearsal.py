"""Passes of a session at any chunk, without the video before it: for timing them."""

from __future__ import annotations

from forcingkv.runtime.chunks import CLEAN_PASS, ChunkMaker


class Rehearsal:
    """A session that stands before a chunk, with empty contents in caches of that chunk's lengths.

    How long a pass takes does not depend on what the caches hold, only on how much. What comes out means
    nothing.
    """

    def __init__(self, maker: ChunkMaker, chunk: int) -> None:
        """For `Session.rehearse`."""
        self._maker, self.chunk = maker, chunk
        maker.stand_before(chunk)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all buffers for keys and values."""
        return self._maker.cache.nbytes

    def denoise(self) -> float:
        """Seconds of a denoising pass."""
        return self._maker.timed_pass()

    def clean(self) -> float:
        """Seconds of the clean pass, which makes the next caches too. The chunk stays the next one."""
        return self._maker.timed_pass(CLEAN_PASS)

    def decode(self) -> float:
        """Seconds of decoding a chunk."""
        return self._maker.timed_decode(self.chunk)
