"""Memory and passes for encoding newest frames anew under another prompt (`runtime.kv.rebuild.encoding`)."""

from __future__ import annotations

import numpy as np

from forcingkv.runtime import positions
from forcingkv.runtime.backends import Lane, Pass, Tensor
from forcingkv.runtime.graph_records import TURN, latent_shape
from forcingkv.runtime.kv.buffers import KvCache
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.rebuild import (
    Encoding,
    encoded_position,
    encoding_moves,
    encodings,
    most_encoded,
    rows_of,
)
from forcingkv.runtime.positions import Floats


class RecachePass:
    """Encodes newest frames anew. Its memory is for as many as are ever encoded; fewer lie at its start."""

    def __init__(self, lane: Lane, plan: CachePlan, cache: KvCache, cross: dict[str, Tensor]) -> None:
        """`cross` are the prompt's keys and values."""
        self._lane, self._plan, self._cache, self._cross = lane, plan, cache, cross
        frames, spec = most_encoded(plan), plan.spec
        table = frames * plan.frame_tokens, spec.head_dim // 2
        self._tensors = {"latents": lane.tensor(latent_shape(plan, frames), "float32")}
        self._tensors |= {name: lane.tensor(table, "float32") for name in ("cosines", "sines")}
        self._turn = {name: lane.tensor((spec.head_dim,), "float32") for name in TURN if plan.relative}
        self._time = lane.tensor((1, 1, spec.time_width), "float32")
        clean = np.array([[spec.schedule.context_timestep]])
        self._time.write(positions.time_features(spec, clean), lane.main)
        self._rows = {one: self._rows_of(one) for one in encodings(plan)}
        self._passes: dict[tuple[tuple[int, int], Encoding], Pass] = {}

    def run(self, encoding: Encoding, latents: Floats) -> None:
        """Put the pass into the queue: the cache is what it makes.

        `latents` are the frames: (1, channels, encoding.frames, height, width).
        """
        if encoding.frames:
            spec, first = self._plan.spec, encoded_position(self._plan, encoding)
            tables = positions.rotary(spec, self._plan.geometry, first, encoding.frames)
            if self._turn:
                turn = positions.turn(spec, encoding_moves(self._plan, encoding))
                for tensor, table in zip(self._turn.values(), turn, strict=True):
                    tensor.write(table, self._lane.main)
            arrays = {"latents": latents, "cosines": tables[0], "sines": tables[1]}
            given = {name: self._tensors[name].first(array.shape) for name, array in arrays.items()}
            for name, array in arrays.items():
                given[name].write(array, self._lane.main)
            self._pass(encoding, given).run()
        self._cache.encoded(encoding)

    def _pass(self, encoding: Encoding, given: dict[str, Tensor]) -> Pass:
        """Bound once for each number of frames, and each place in memory that the cache has before."""
        alike = encoding.anywhere
        key = self._cache.key, alike
        if key not in self._passes:
            inputs = given | {"time": self._time} | self._turn | self._cross | self._rows[alike]
            inputs |= self._cache.seen_by(alike)
            outputs = self._cache.made_by(alike)
            self._passes[key] = self._lane.bind("recache", self._cache.phase_after(alike), inputs, outputs)
        return self._passes[key]

    def _rows_of(self, encoding: Encoding) -> dict[str, Tensor]:
        """Which tokens roles take, by input name."""
        made = rows_of(self._plan, encoding)
        tensors = {name: self._lane.tensor(rows.shape, "int32") for name, rows in made.items()}
        for name, rows in made.items():
            tensors[name].write(rows, self._lane.main)
        return tensors
