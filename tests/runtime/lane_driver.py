"""Drives a lane of any backend as a session does, in as few lines as that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from forcingkv.runtime import positions
from forcingkv.runtime.backends import Array, Lane, Pass, Tensor
from forcingkv.runtime.bundle import CLEAN, Bundle
from forcingkv.runtime.kv.plan import CacheEntry

__all__ = ["Driver", "Made"]


@dataclass
class Made:
    """What a chunk gave: latents, frames, and the KV cache after its clean pass."""

    latents: Array
    frames: Array
    cache: dict[str, Array]


class Driver:
    """Makes videos with random noise. Each cached tensor has two buffers, swapped after clean passes."""

    def __init__(self, lane: Lane, bundle: Bundle, seed: int = 0) -> None:
        self._lane, self._plan, self._random = lane, bundle.plan, np.random.default_rng(seed)
        records, last = bundle.manifest.graphs, bundle.plan.phases[-1].first_chunk
        self._text = self._like(records["prompt"].inputs)
        self._cross = self._like(records["prompt"].outputs)
        sizes = {e: (math.prod(bundle.plan.entry_shape(e, last)),) for e in bundle.plan.entries}
        self._sides = [{e: lane.tensor(s, "float32", state=True) for e, s in sizes.items()} for _ in range(2)]
        varied = {entry.name for entry in bundle.plan.entries} | set(bundle.plan.rows(0))
        self._clean = self._clean_flags() if records["step"].skips_caches else {}
        known = varied | set(self._cross) | set(self._clean)
        step = {n: r for n, r in records["step"].inputs.items() if n not in known}
        self._given = self._like(step)
        self._rows = {name: lane.tensor((bundle.plan.chunk_tokens,), "int32") for name in bundle.plan.rows(0)}
        self._spare = self._like({"latents": step["latents"]})["latents"]
        self._decoded = self._like({**records["decode"].inputs, **records["decode"].outputs})
        self._passes: dict[tuple[int, int, str], Pass] = {}
        decoding = [{n: self._decoded[n] for n in which} for which in (records["decode"].inputs, ["frames"])]
        self._prompt = lane.bind("prompt", 0, self._text, self._cross)
        self._decode = lane.bind("decode", 0, *decoding)

    def _clean_flags(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The input that says whether a pass is clean: where it is not, and where it is."""
        no, yes = (self._lane.tensor((1,), "bool") for _ in range(2))
        no.write(np.array([False]), self._lane.main)
        yes.write(np.array([True]), self._lane.main)
        return {CLEAN: (no, yes)}

    def start(self) -> None:
        """Begin a video with a prompt."""
        self._write(self._text, "text")
        self._prompt.run()

    def chunk(self, number: int) -> Made:
        """Make a chunk, and wait for it."""
        main, side, schedule = self._lane.main, self._lane.side, self._plan.spec.schedule
        frames = self._plan.spec.frames_per_chunk
        tables = positions.rotary(self._plan.spec, self._plan.geometry, number * frames, frames)
        for name, table in zip(("cosines", "sines"), tables, strict=True):
            self._given[name].write(table, main)
        for name in self._rows:
            self._rows[name].write(np.arange(self._plan.chunk_tokens, dtype=np.int32), main)
        self._write(self._given, "latents")
        for timestep, sigma in zip(schedule.later.timesteps, schedule.later.sigmas[:-1], strict=True):
            self._pass_on(number, timestep, sigma)
            self._pass(number, "noisy").run()
            # Back to where every pass reads them, by way of the host: not how a session does it.
            self._given["latents"].write(self._spare.fetch(main).array(), main)
        self._pass_on(number, schedule.context_timestep, 0.0)
        self._pass(number, "clean").run()
        latents = self._given["latents"].fetch(main)
        self._decoded["latents"].write(latents.array(), side)
        self._decode.run()
        shown = self._decoded["frames"].fetch(side)
        kept = {e.name: t.fetch(main) for e, t in self._views(number + 1).items()}
        return Made(latents.array(), shown.array(), {name: fetch.array() for name, fetch in kept.items()})

    def _pass_on(self, number: int, timestep: float, sigma: float) -> None:
        levels = {"sigma": [sigma], "sigma_next": [sigma / 2]}
        for name, level in levels.items():
            self._given[name].write(np.array(level, np.float32), self._lane.main)
        features = positions.time_features(self._plan.spec, np.array([[timestep]]))
        self._given["time"].write(features, self._lane.main)
        if "noise" in self._given:
            self._write(self._given, "noise")

    def _pass(self, number: int, kind: str) -> Pass:
        key = (self._plan.phases.index(self._plan.phase(number)), number % 2, kind)
        if key not in self._passes:
            held = {entry.name: tensor for entry, tensor in self._views(number).items()}
            rows = {
                name: self._rows[name].first(rows.shape) for name, rows in self._plan.rows(number).items()
            }
            following = {f"next.{e.name}": self._next(e, number) for e in self._plan.entries}
            if self._clean and kind == "noisy":
                following = {}
            told = {name: tensors[kind == "clean"] for name, tensors in self._clean.items()}
            self._passes[key] = self._lane.bind(
                "step",
                key[0],
                {**self._given, **self._cross, **held, **rows, **told},
                {"next_latents": self._spare, **following},
            )
        return self._passes[key]

    def _views(self, number: int) -> dict[CacheEntry, Tensor]:
        """What passes of that chunk read; the sink is always on the first side."""
        return {
            entry: self._side(entry, number)[entry].first(self._plan.entry_shape(entry, number))
            for entry in self._plan.entries
        }

    def _next(self, entry: CacheEntry, number: int) -> Tensor:
        steady = self._plan.phases[-1].first_chunk
        shape = self._plan.entry_shape(entry, steady if entry.role.name == "retained" else number + 1)
        if entry.role.name == "sink" and number:
            shape = (*shape[:2], 0, shape[3])
        return self._side(entry, number + 1)[entry].first(shape)

    def _side(self, entry: CacheEntry, number: int) -> dict[CacheEntry, Tensor]:
        return self._sides[0 if entry.role.name == "sink" else number % 2]

    def _like(self, records: dict[str, Any]) -> dict[str, Tensor]:
        return {name: self._lane.tensor(r.shape, r.dtype) for name, r in records.items()}

    def _write(self, tensors: dict[str, Tensor], name: str) -> None:
        values = self._random.standard_normal(tensors[name].shape, np.float32)
        tensors[name].write(values, self._lane.main)
