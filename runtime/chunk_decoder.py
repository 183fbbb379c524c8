"""Decoding one chunk: its latents become frames."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod, ref

import numpy as np

from forcingkv.runtime.backends import Lane, Pass, Tensor
from forcingkv.runtime.bundle import GraphRecord, TensorRecord, next_name
from forcingkv.runtime.graph_records import FIRST
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.results import FramePlace
from forcingkv.runtime.spec import ModelSpec


class ChunkDecoder:
    """Runs the graph `decode` over the latent frames of each chunk, in as many calls as it takes.

    The caches are double buffered, as in `CacheBuffers`. A graph with caches gives `temporal_stride`
    frames a latent frame; of the video's first one only the last is a frame of the video. All frames of
    a chunk come to lie in one tensor; there are as many of those as chunks may be on their way.

    Attributes:
        called: calls since the video began.
    """

    def __init__(self, lane: Lane, record: GraphRecord, spec: ModelSpec) -> None:
        self._lane, self.called = lane, 0
        self._latents = tensor_of(lane, record.inputs["latents"])
        size, shape = self._latents.shape[2], record.outputs["frames"].shape
        self._calls, self._frames_of_call = spec.frames_per_chunk // size, shape[0]
        whole = (self._calls * shape[0], *shape[1:])
        self._frames = [lane.tensor(whole, "uint8") for _ in range(1 + lane.lookahead)]
        carried = record.carried.items()
        self._caches = [{name: tensor_of(lane, r, state=True) for name, r in carried} for _ in range(2)]
        self._first = {}
        if carried:
            for value in (False, True):
                self._first[value] = lane.tensor((1,), "float32")
                self._first[value].write(np.array([value], np.float32), lane.side)
        self._dropped = spec.decoder.temporal_stride - 1
        self._passes: dict[tuple[bool, int, int, int], Pass] = {}
        self._places = [FramePlace() for _ in self._frames]

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""
        self.called = 0
        for tensor in self.held().values():
            tensor.clear(self._lane.side)

    def held(self) -> dict[str, Tensor]:
        """The feature caches as they are now."""
        return self._caches[self.called % 2]

    def decode(self, latents: Floats, chunk: int) -> Tensor:
        """Frames (frames, height, width, 3) of a chunk's latents (1, C, latent frames, h, w).

        They are there once the lane's side queue has come so far, and stay until as many chunks later as
        there are tensors for them.
        """
        size, opening = self._latents.shape[2], self.called == 0
        place = chunk % len(self._frames)
        self._places[place].written()
        for call in range(self._calls):
            self._latents.write(latents[:, :, call * size : (call + 1) * size], self._lane.side)
            self._pass(opening and call == 0, call, place).run()
            self.called += 1
        frames = self._frames[place]
        return frames.rows(self._dropped if opening else 0, frames.shape[0])

    def freed_by(self, chunk: int) -> Callable[[object], None]:
        """What `Chunk.release` calls with its argument, for the chunk that was decoded last. It does not keep
        this memory alive."""
        place, side = self._places[chunk % len(self._frames)], self._lane.side
        held, gate, written = ref(place), WeakMethod(side.gate), place.times

        def free(after: object) -> None:
            there, gate_of = held(), gate()
            if there is not None and gate_of is not None:
                there.release(written, gate_of, after)

        return free

    def _pass(self, opening: bool, call: int, place: int) -> Pass:
        """Bound once, as those of `ChunkMaker`: addresses follow from the cache's side, call and place."""
        side = self.called % 2
        key = (opening, side, call, place)
        if key not in self._passes:
            current, spare = self._caches[side], self._caches[1 - side]
            rows = self._frames[place].rows(call * self._frames_of_call, (call + 1) * self._frames_of_call)
            inputs, outputs = {"latents": self._latents}, {"frames": rows}
            if current:
                inputs |= {FIRST: self._first[opening], **current}
                outputs |= {next_name(name): tensor for name, tensor in spare.items()}
            self._passes[key] = self._lane.bind("decode", 0, inputs, outputs)
        return self._passes[key]


def tensor_of(lane: Lane, record: TensorRecord, *, state: bool = False) -> Tensor:
    """Memory for an input or output of a graph."""
    return lane.tensor(record.shape, record.dtype, state=state)
