"""Decoding latents to frames with a graph that may carry feature caches from call to call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.runtime.backends import RunnableGraph
from forcingkv.runtime.bundle import GraphRecord
from forcingkv.runtime.spec import ModelSpec

__all__ = ["FIRST", "ChunkDecoder"]

FIRST = "first"
"""Input that is 1 in a video's first call and 0 in the others, of graphs with caches."""
NEXT = "next."

Array = npt.NDArray[Any]


class ChunkDecoder:
    """Runs the graph `decode` over the latent frames of each chunk, in as many calls as it takes.

    The caches are double buffered, as in `CacheBuffers`. A graph with caches gives `temporal_stride`
    frames a latent frame; of the video's first one only the last is a frame of the video.
    """

    def __init__(self, graph: RunnableGraph, record: GraphRecord, spec: ModelSpec) -> None:
        self._graph = graph
        self._latents = _empty(record, "latents")
        self._frames = _empty(record, "frames")
        names = [name for name in record.inputs if NEXT + name in record.outputs]
        self._current, self._spare = ({name: _empty(record, name) for name in names} for _ in range(2))
        self._dropped = spec.decoder.temporal_stride - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        caches = (*self._current.values(), *self._spare.values())
        return self._latents.nbytes + self._frames.nbytes + sum(array.nbytes for array in caches)

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""
        for array in self._current.values():
            array.fill(0)

    def decode(self, latents: npt.NDArray[np.float32], *, first: bool) -> npt.NDArray[np.uint8]:
        """Frames (frames, height, width, 3) of a chunk's latents (1, C, latent frames, h, w).

        `first` says that the chunk is a video's first.
        """
        size = self._latents.shape[2]
        parts = []
        for start in range(0, latents.shape[2], size):
            opening = first and start == 0
            self._latents[...] = latents[:, :, start : start + size]
            self._run(opening)
            parts.append(self._frames[self._dropped if opening else 0 :].copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, opening: bool) -> None:
        inputs, outputs = {"latents": self._latents}, {"frames": self._frames}
        if self._current:
            inputs |= {FIRST: np.array([opening], np.float32), **self._current}
            outputs |= {NEXT + name: array for name, array in self._spare.items()}
        self._graph.run(inputs, outputs)
        self._current, self._spare = self._spare, self._current


def _empty(record: GraphRecord, name: str) -> Array:
    tensor = record.inputs.get(name) or record.outputs[name]
    return np.empty(tensor.shape, np.dtype(tensor.dtype))
