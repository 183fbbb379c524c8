"""Decoding one chunk: its latents become frames."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod, ref

import numpy as np

from forcingkv.runtime.backends import Lane, Pass, Tensor
from forcingkv.runtime.bundle import GraphRecord, Manifest, TensorRecord, next_name
from forcingkv.runtime.graph_records import FIRST
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.results import FramePlace
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.strip_decoder import StripDecoder


class ChunkDecoder:
    """Runs the graph `decode` over the latent frames of each chunk, in as many calls as it takes.

    A graph with caches gives `temporal_stride` frames a latent frame; of the video's first one only the last
    is a frame of the video. All frames of a chunk come to lie in one tensor; there are as many of those as
    chunks may be on their way.

    Attributes:
        called: calls since the video began.
    """

    def __init__(self, lane: Lane, manifest: Manifest, spec: ModelSpec) -> None:
        self._lane, self.called = lane, 0
        record, shown = manifest.graphs["decode"], manifest.frames_record
        assert shown is not None
        self._latents = tensor_of(lane, record.inputs["latents"])
        size, (width, height) = self._latents.shape[2], manifest.frame_size
        self._calls, self._frames_of_call = spec.frames_per_chunk // size, shown.shape[0]
        whole = (self._calls * shown.shape[0], height, width, shown.shape[3])
        self._frames = [lane.tensor(whole, "uint8") for _ in range(1 + lane.lookahead)]
        self._dropped = spec.decoder.temporal_stride - 1
        self._places = [FramePlace() for _ in self._frames]
        self._strips = StripDecoder(lane, manifest, self._latents) if manifest.strips else None
        self._whole = None if self._strips else WholeDecoder(lane, record, self._latents)

    def restart(self) -> None:
        """Begin a new video: what came before is forgotten."""
        self.called = 0
        for tensor in self.held().values():
            tensor.clear(self._lane.side)

    def held(self) -> dict[str, Tensor]:
        """The feature caches as they are now."""
        if self._strips:
            return self._strips.held(self.called)
        assert self._whole is not None
        return self._whole.held(self.called)

    def decode(self, latents: Floats, chunk: int) -> Tensor:
        """Frames (frames, height, width, 3) of a chunk's latents (1, C, latent frames, h, w).

        They are there once the lane's side queue has come so far, and stay until as many chunks later as
        there are tensors for them.
        """
        size, opening = self._latents.shape[2], self.called == 0
        place, each = chunk % len(self._frames), self._frames_of_call
        frames = self._frames[place]
        self._places[place].written()
        for call in range(self._calls):
            self._latents.write(latents[:, :, call * size : (call + 1) * size], self._lane.side)
            begins, rows = opening and call == 0, frames.rows(call * each, (call + 1) * each)
            if self._strips:
                self._strips.decode(begins, self.called, rows)
            else:
                assert self._whole is not None
                self._whole.bound(begins, self.called, rows, (call, place)).run()
            self.called += 1
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


class WholeDecoder:
    """Runs the graph `decode` where it makes frames: of a latent frame, or of a chunk of pixels as latents.

    The caches are double buffered, as in `CacheBuffers`, but where a backend reads all of a cache before it
    writes.
    """

    def __init__(self, lane: Lane, record: GraphRecord, latents: Tensor) -> None:
        self._lane, self._latents = lane, latents
        carried, sides = record.carried.items(), 1 if lane.in_place else 2
        self._caches = [{name: tensor_of(lane, r, state=True) for name, r in carried} for _ in range(sides)]
        self._first = {}
        if carried:
            for value in (False, True):
                self._first[value] = lane.tensor((1,), "float32")
                self._first[value].write(np.array([value], np.float32), lane.side)
        self._passes: dict[tuple[bool, int, tuple[int, int]], Pass] = {}

    def held(self, called: int) -> dict[str, Tensor]:
        """The feature caches after so many calls."""
        return self._caches[called % len(self._caches)]

    def bound(self, opening: bool, called: int, frames: Tensor, place: tuple[int, int]) -> Pass:
        """The pass that makes the frames of the latents that were written, the call after so many. It is
        bound once, as those of `ChunkMaker`: its addresses follow from whether it is the first, the cache's
        side, and which frames (`place`) it makes."""
        key = (opening, called % len(self._caches), place)
        if key not in self._passes:
            current, spare = self.held(called), self.held(called + 1)
            inputs, outputs = {"latents": self._latents}, {"frames": frames}
            if current:
                inputs |= {FIRST: self._first[opening], **current}
                outputs |= {next_name(name): tensor for name, tensor in spare.items()}
            self._passes[key] = self._lane.bind("decode", 0, inputs, outputs)
        return self._passes[key]


def tensor_of(lane: Lane, record: TensorRecord, *, state: bool = False) -> Tensor:
    """Memory for an input or output of a graph."""
    return lane.tensor(record.shape, record.dtype, state=state)
