"""Decoding latents to frames with a graph that may carry feature caches from call to call."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forcingkv.runtime.backends import Lane, Pass, Tensor
from forcingkv.runtime.bundle import GraphRecord
from forcingkv.runtime.spec import ModelSpec

FIRST = "first"
"""Input that is 1 in a video's first call and 0 in the others, of graphs with caches."""
NEXT = "next."


class ChunkDecoder:
    """Runs the graph `decode` over the latent frames of each chunk, in as many calls as it takes.

    The caches are double buffered, as in `CacheBuffers`. A graph with caches gives `temporal_stride`
    frames a latent frame; of the video's first one only the last is a frame of the video. All frames of
    a chunk come to lie in one tensor; there are as many of those as chunks may be on their way.
    """

    def __init__(self, lane: Lane, record: GraphRecord, spec: ModelSpec) -> None:
        self._lane, self._program = lane, lane.program("decode")
        self._latents = _tensor(lane, record, "latents")
        size, shape = self._latents.shape[2], record.outputs["frames"].shape
        self._calls, self._frames_of_call = spec.frames_per_chunk // size, shape[0]
        whole = (self._calls * shape[0], *shape[1:])
        self._frames = [lane.tensor(whole, "uint8") for _ in range(1 + lane.lookahead)]
        names = [name for name in record.inputs if NEXT + name in record.outputs]
        self._caches = [{name: _tensor(lane, record, name, state=True) for name in names} for _ in range(2)]
        self._first = {}
        if names:
            for value in (False, True):
                self._first[value] = lane.tensor((1,), "float32")
                self._first[value].write(np.array([value], np.float32), lane.main)
        self._dropped = spec.decoder.temporal_stride - 1
        self._passes: dict[tuple[bool, int, int, int], Pass] = {}
        self.called = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all memory."""
        caches = [tensor for side in self._caches for tensor in side.values()]
        return sum(t.nbytes for t in (self._latents, *self._frames, *self._first.values(), *caches))

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""
        self.called = 0
        for tensor in self.held().values():
            tensor.clear(self._lane.side)

    def held(self) -> dict[str, Tensor]:
        """The feature caches as they are now."""
        return self._caches[self.called % 2]

    def decode(self, latents: npt.NDArray[np.float32], chunk: int) -> Tensor:
        """Frames (frames, height, width, 3) of a chunk's latents (1, C, latent frames, h, w).

        They are there once the lane's side queue has come so far, and stay until as many chunks later as
        there are tensors for them.
        """
        size, opening = self._latents.shape[2], self.called == 0
        place = chunk % len(self._frames)
        for call in range(self._calls):
            self._latents.write(latents[:, :, call * size : (call + 1) * size], self._lane.side)
            self._pass(opening and call == 0, call, place).run(self._lane.side)
            self.called += 1
        frames = self._frames[place]
        return frames.rows(self._dropped if opening else 0, frames.shape[0])

    def _pass(self, opening: bool, call: int, place: int) -> Pass:
        key = (opening, self.called % 2, call, place)
        if key not in self._passes:
            current, spare = self._caches[self.called % 2], self._caches[1 - self.called % 2]
            rows = self._frames[place].rows(call * self._frames_of_call, (call + 1) * self._frames_of_call)
            inputs, outputs = {"latents": self._latents}, {"frames": rows}
            if current:
                inputs |= {FIRST: self._first[opening], **current}
                outputs |= {NEXT + name: tensor for name, tensor in spare.items()}
            self._passes[key] = self._program.bind(0, inputs, outputs)
        return self._passes[key]


def _tensor(lane: Lane, record: GraphRecord, name: str, *, state: bool = False) -> Tensor:
    shaped = record.inputs[name]
    return lane.tensor(shaped.shape, shaped.dtype, state=state)
