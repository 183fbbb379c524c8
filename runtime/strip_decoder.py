"""Decoding a latent frame strip by strip: memory, and the passes over it (`runtime/decode_strips.py`).

Everything lies where it always does, so there is one pass for a frame and one for each strip, bound once.
What a strip carries lies in a block of its own. Its next caches are made in memory that all strips share,
and copied into the block: where a backend reads all of a cache before it writes, they are made there at once.
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
    """Decodes a latent frame at a time."""

    def __init__(self, lane: Lane, manifest: Manifest, latents: Tensor) -> None:
        """`latents` is where a latent frame is written before it is decoded."""
        assert manifest.strips is not None
        self._lane, self._strips = lane, manifest.strips
        whole, strip = (manifest.graphs[name] for name in ("decode", STRIP))
        records, side = StripRecords(manifest.graphs), lane.side
        self._whole = Block(lane, records.whole)
        self._states = [Block(lane, records.state) for _ in range(self._strips.count)]
        self._made = self._states[0].memory  # of one dtype all
        if not lane.in_place:
            largest = max(self._whole.memory.shape, self._states[0].memory.shape)
            self._made = lane.tensor(largest, self._made.dtype, state=True)
            self._made.clear(side)
        self._edges = [Block(lane, records.edges) for _ in range(2)]
        made = whole.outputs[FEATURES]
        rows, *rest = made.shape
        features = lane.tensor((self._strips.feature_rows, *rest), made.dtype, state=True)
        features.clear(side)  # below the frame they stay zeros
        self._first = lane.tensor((1,), "float32")
        shown = strip.outputs["frames"]
        self._shown = lane.tensor(shown.shape, shown.dtype)
        following = self._following(records.whole, self._whole)
        self._frame_pass = lane.bind(
            "decode",
            0,
            {"latents": latents, FIRST: self._first, **self._whole.tensors},
            {FEATURES: features.rows(0, rows), **following},
        )
        self._passes = [
            self._strip_pass(number, features, records.state) for number in range(self._strips.count)
        ]

    def held(self) -> dict[str, Tensor]:
        """The feature caches, in blocks."""
        strips = {f"strip.{number}": block.memory for number, block in enumerate(self._states)}
        return {"whole": self._whole.memory, **strips}

    def decode(self, opening: bool, frames: Tensor) -> None:
        """Make frames (frames, height, width, 3) of the latent frame that was written; `opening`: it is a
        video's first."""
        side = self._lane.side
        self._first.write(np.array([opening], np.float32), side)
        self._run(self._frame_pass, self._whole)
        self._edges[0].memory.clear(side)  # above the frame
        for number, strip_pass in enumerate(self._passes):
            self._run(strip_pass, self._states[number])
            self._show(number, frames)

    def _following(self, records: Mapping[str, TensorRecord], own: Block) -> dict[str, Tensor]:
        return own.outputs() if self._lane.in_place else Block(self._lane, records, self._made).outputs()

    def _strip_pass(self, number: int, features: Tensor, state: Mapping[str, TensorRecord]) -> Pass:
        rows, own = self._strips.rows, self._states[number]
        top = self._lane.tensor((1,), "float32")
        top.write(np.array([number * rows], np.float32), self._lane.side)
        above, below = self._edges[number % 2], self._edges[1 - number % 2]
        inputs = {FEATURES: features.rows(number * rows, (number + 1) * rows), FIRST: self._first, TOP: top}
        outputs = {"frames": self._shown} | self._following(state, own) | below.outputs()
        return self._lane.bind(STRIP, 0, inputs | own.tensors | above.tensors, outputs)

    def _run(self, one: Pass, own: Block) -> None:
        one.run()
        if not self._lane.in_place:
            count = own.memory.shape[0]
            own.memory.copy_from(self._made.rows(0, count), self._lane.side)

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
