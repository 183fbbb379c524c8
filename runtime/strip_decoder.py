"""Decoding a latent frame strip by strip: memory, and the passes over it (`runtime/decode_strips.py`).

What a strip carries lies in a block of its own. Its next caches are made in memory that all strips share, and
copied into the block, so everything lies where it always does, and there is one pass for a frame and one for
each strip, bound once. A backend that reads all of a cache before it writes any (`Lane.in_place`) makes them
in the block at once. Where memory cannot be copied (`Lane.copies`) the blocks go round instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from forcingkv.runtime.backends import Lane, Pass, Tensor
from forcingkv.runtime.bundle import GraphRecord, Manifest, TensorRecord, next_name
from forcingkv.runtime.decode_strips import Strips, places_in_block
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.graph_records import EDGE, FEATURES, FIRST, STRIP, TOP


class Block:
    """Tensors in one piece of memory."""

    def __init__(self, lane: Lane, records: Mapping[str, TensorRecord], memory: Tensor | None = None) -> None:
        """In `memory`, if it is given, and else in memory of their own."""
        dtype = next(iter(records.values())).dtype
        shapes = {name: record.shape for name, record in records.items()}
        places, count = places_in_block(shapes, DTYPES[dtype].bytes)
        self.memory = lane.tensor((count,), dtype, state=True) if memory is None else memory.rows(0, count)
        self.tensors = {
            name: self.memory.rows(place.start, place.stop).first(shapes[name])
            for name, place in places.items()
        }

    def outputs(self) -> dict[str, Tensor]:
        """The tensors by the names of outputs that replace inputs."""
        return {next_name(name): tensor for name, tensor in self.tensors.items()}


def block_bytes(records: Mapping[str, TensorRecord]) -> int:
    """Bytes of a block of those tensors."""
    if not records:
        return 0
    item = DTYPES[next(iter(records.values())).dtype].bytes
    _, count = places_in_block({name: record.shape for name, record in records.items()}, item)
    return count * item


class StripRecords:
    """What `decode` and `decode_strip` carry, by what becomes of it.

    Attributes:
        whole: feature caches of whole frames.
        state: feature caches of a strip.
        edges: what a strip gives the next one.
    """

    def __init__(self, graphs: Mapping[str, GraphRecord]) -> None:
        strip = graphs[STRIP].carried
        self.whole = graphs["decode"].carried
        self.state = {name: record for name, record in strip.items() if not name.startswith(EDGE)}
        self.edges = {name: record for name, record in strip.items() if name.startswith(EDGE)}

    def nbytes(self, strips: Strips, *, in_place: bool) -> int:
        """Bytes that a session holds of them."""
        whole, state, edges = map(block_bytes, (self.whole, self.state, self.edges))
        return whole + strips.count * state + (0 if in_place else max(whole, state)) + 2 * edges


class StripDecoder:
    """Decodes a latent frame at a time. Strips are numbered from the top; `called` are the calls since the
    video began."""

    def __init__(self, lane: Lane, manifest: Manifest, latents: Tensor) -> None:
        """`latents` is where a latent frame is written before it is decoded."""
        assert manifest.strips is not None
        self._lane, self._strips, self._latents = lane, manifest.strips, latents
        whole, strip = (manifest.graphs[name] for name in ("decode", STRIP))
        self._records, side = StripRecords(manifest.graphs), lane.side
        spare = 0 if lane.in_place or lane.copies else 1
        self._whole = [Block(lane, self._records.whole) for _ in range(1 + spare)]
        self._states = [Block(lane, self._records.state) for _ in range(self._strips.count + spare)]
        self._made: Tensor | None = None
        if not (lane.in_place or spare):
            of_each = self._whole[0].memory, self._states[0].memory
            largest = max(memory.shape for memory in of_each)
            self._made = lane.tensor(largest, of_each[0].dtype, state=True)
            self._made.clear(side)
        self._edges = [Block(lane, self._records.edges) for _ in range(2)]
        made = whole.outputs[FEATURES]
        self._rows, *rest = made.shape
        self._features = lane.tensor((self._strips.feature_rows, *rest), made.dtype, state=True)
        self._features.clear(side)  # below the frame they stay zeros
        self._first = lane.tensor((1,), "float32")
        self._tops = [lane.tensor((1,), "float32") for _ in range(self._strips.count)]
        for number, top in enumerate(self._tops):
            top.write(np.array([number * self._strips.rows], np.float32), side)
        shown = strip.outputs["frames"]
        self._shown = lane.tensor(shown.shape, shown.dtype)
        self._passes: dict[tuple[int | None, int], Pass] = {}

    def held(self, called: int) -> dict[str, Tensor]:
        """The feature caches, in blocks."""
        states = {f"strip.{n}": self._state(n, called).memory for n in range(self._strips.count)}
        return {"whole": self._of_whole(called).memory, **states}

    def decode(self, opening: bool, called: int, frames: Tensor) -> None:
        """Make frames (frames, height, width, 3) of the latent frame that was written; `opening`: it is a
        video's first."""
        self._first.write(np.array([opening], np.float32), self._lane.side)
        self._run(self._frame_pass(called), self._of_whole(called))
        self._edges[0].memory.clear(self._lane.side)  # above the frame
        for number in range(self._strips.count):
            self._run(self._strip_pass(number, called), self._state(number, called))
            self._show(number, frames)

    def _of_whole(self, called: int) -> Block:
        return self._whole[called % len(self._whole)]

    def _state(self, number: int, called: int) -> Block:
        """Where the caches of a strip lie. In a ring of one block more than there are strips each moves one
        place at each call, to where those of the strip above were."""
        moved = called if len(self._states) > self._strips.count else 0
        return self._states[(number - moved) % len(self._states)]

    def _following(self, following: Block, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
        """Where next caches are made: in the shared memory, or where they are to lie."""
        return (following if self._made is None else Block(self._lane, records, self._made)).outputs()

    def _frame_pass(self, called: int) -> Pass:
        key = None, called % len(self._whole)
        if key not in self._passes:
            inputs = {"latents": self._latents, FIRST: self._first, **self._of_whole(called).tensors}
            outputs = {FEATURES: self._features.rows(0, self._rows)}
            outputs |= self._following(self._of_whole(called + 1), self._records.whole)
            self._passes[key] = self._lane.bind("decode", 0, inputs, outputs)
        return self._passes[key]

    def _strip_pass(self, number: int, called: int) -> Pass:
        rows, states = self._strips.rows, len(self._states)
        key = number, called % states if states > self._strips.count else 0
        if key not in self._passes:
            above, below = self._edges[number % 2], self._edges[1 - number % 2]
            features = self._features.rows(number * rows, (number + 1) * rows)
            inputs = {FEATURES: features, FIRST: self._first, TOP: self._tops[number]}
            inputs |= self._state(number, called).tensors | above.tensors
            outputs = {"frames": self._shown} | below.outputs()
            outputs |= self._following(self._state(number, called + 1), self._records.state)
            self._passes[key] = self._lane.bind(STRIP, 0, inputs, outputs)
        return self._passes[key]

    def _run(self, one: Pass, own: Block) -> None:
        one.run()
        if self._made is not None:
            own.memory.copy_from(self._made.rows(0, own.memory.shape[0]), self._lane.side)

    def _show(self, number: int, frames: Tensor) -> None:
        """Put the rows of a strip that are in the frame where they belong."""
        count, height, width, colours = frames.shape
        first, own, rows = self._strips.places(number, height)
        if not rows:
            return
        target = frames.first((count * height, width, colours))
        source = self._shown.first((count * self._strips.pixel_rows, width, colours))
        for frame in range(count):
            begin, from_row = frame * height + first, frame * self._strips.pixel_rows + own
            place = target.rows(begin, begin + rows)
            place.copy_from(source.rows(from_row, from_row + rows), self._lane.side)
