"""What a session hands out: chunks, the time they took, and the memory of frames that stay on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from forcingkv.runtime.positions import Floats


@dataclass(frozen=True)
class Timing:
    """Seconds a chunk took."""

    denoise: float
    """The denoising passes."""
    clean: float
    """The clean pass, which updates the cache; 0 where the last denoising pass does that. It runs while the
    chunk is decoded, and may take longer: asked for this before the next chunk came, it waits for that pass.
    Of a model that recomputes its context: the pass over newest frames before the chunk's own, and making
    their latents."""
    decode: float
    total: float
    """End to end, from the first pass to frames that can be used. Where decoding overlaps the next chunk
    it is not the sum of the others."""

    @classmethod
    def of(cls, *, denoise: float, clean: Callable[[], float], decode: float, total: float) -> Timing:
        """What `clean` gives is asked for when it is first needed."""
        timing = cls.__new__(cls)
        timing.__dict__.update(denoise=denoise, decode=decode, total=total, _clean=clean)
        return timing

    def __getattr__(self, name: str) -> float:
        if name != "clean" or "_clean" not in self.__dict__:  # one that is there does not come here
            raise AttributeError(name)
        self.__dict__["clean"] = seconds = self.__dict__["_clean"]()
        self.__dict__.pop("_clean", None)
        return float(seconds)


@dataclass(frozen=True)
class Chunk:
    """Frames that were generated together."""

    index: int
    frames: Any
    """uint8 (frames, height, width, 3): a numpy array of the caller's own; or, of a session opened with
    `frames="device"`, something with `__dlpack__` on the session's memory. That memory is there for as long
    as it, or what was made of it, is held; but later chunks are written into it (`release`)."""
    latents: Floats
    """(1, channels, latent frames, height, width)."""
    timing: Timing
    given: bool = False
    """Whether its latents were given, not generated (`Session.generate`, `start`)."""
    _free: Callable[[object], None] | None = field(default=None, repr=False, compare=False)

    def release(self, after: object = None) -> None:
        """Say when frames that stayed on the device were read: their memory is written to again only after.

        To be called before the memory's turn comes: before the chunk after the next is asked for on
        TensorRT, before the next one on ONNX Runtime. Frames on the host are the caller's own: nothing
        happens then, nor once the session is closed.

        Args:
            after: a CUDA stream (of torch, cuda-core, or anything with `__cuda_stream__`; or its handle):
                all that was put into it so far is waited for, on the GPU and not by the host. Or an event
                that was recorded behind the last use. None: they were read, as after a synchronisation.

        Raises RuntimeError if the memory was written to meanwhile: what was read was perhaps another chunk;
        InputError for an `after` that cannot be waited for.
        """
        if self._free is not None:
            self._free(after)


class FramePlace:
    """Memory for the frames of a chunk, and what has to be waited for before it is written to again.

    Attributes:
        times: how often it was written to.
    """

    def __init__(self) -> None:
        self.times, self._waits = 0, list[Callable[[], None]]()
        self._turn = Lock()  # whoever reads frames may do so in another thread

    def written(self) -> None:
        """It is written to next, in the queue's order: let that wait for who reads it."""
        with self._turn:
            self.times, waits, self._waits = self.times + 1, self._waits, []
            for wait in waits:
                wait()

    def release(self, times: int, gate: Callable[[object], Callable[[], None]], after: object) -> None:
        """What was written that many times in was read. Raises RuntimeError if it is there no more."""
        with self._turn:
            if times != self.times:
                raise RuntimeError(
                    "the memory of these frames was given to a later chunk: release a chunk before that one"
                    " is asked for"
                )
            if after is not None:
                self._waits.append(gate(after))
