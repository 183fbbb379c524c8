"""Recording: what every head attends to while a video is generated, under any policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from forcingkv.analyze.mass import KeyRun, attention_statistics
from forcingkv.analyze.recording import COLUMNS
from forcingkv.headmaps import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.kv import Cache, GroupCache
from forcingkv.models.wan import Attend, KeysValues, WanModel
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
from forcingkv.runtime.kv.roles import whole_frames

CURRENT = "current"
LEAST_ROWS = 2
"""Rows of a frame; fewer give no standard error."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Part:
    """What one head group did in one pass and layer: statistics, and what its slots stand for."""

    chunk: int
    step: int
    layer: int
    heads: Sequence[int]
    keys: int
    slots: Sequence[tuple[str, int]]
    values: tuple[Tensor, ...]


class Recorder:
    """Collects the statistics of every denoising pass of one sample. `watch` is given to `generate`.

    Args:
        plan: what generation runs under.
        sample: index of the video.
        seed: seed of the video; also decides which query rows are measured.
        rows: query rows measured of each pass and layer, in equal parts of the chunk's frames; None:
            all, with which there is no error.
        orders: for each layer the model's own index of the head at each place (`models.heads`).
    """

    def __init__(
        self,
        plan: CachePlan,
        sample: int,
        seed: int = 0,
        rows: int | None = None,
        orders: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.plan, self.sample, self.seed = plan, sample, seed
        frames = plan.spec.frames_per_chunk
        share = max(LEAST_ROWS, -(-rows // frames)) if rows else plan.frame_tokens
        self._rows = min(plan.frame_tokens, share)
        self._orders = orders or [range(plan.spec.heads)] * plan.spec.layers
        self._chosen: list[int] | None = None
        self._parts: list[_Part] = []

    def watch(self, chunk: int, step: int, cache: Cache, attend: Attend) -> Attend:
        """Attention that does what `attend` does and notes where it goes."""

        def recorded(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
            places = self._places(chunk, step, layer).to(queries.device)
            for group, held in zip(self.plan.layers[layer], cache[layer], strict=True):
                part = slice(group.start, group.stop)
                mine = torch.unflatten(queries[0, part], 1, (-1, self.plan.frame_tokens))
                if self._rows < self.plan.frame_tokens:
                    mine = torch.stack([mine[:, f, p] for f, p in enumerate(places)], 1)
                runs, slots = self._runs(chunk, group, held, current.keys[0, part])
                values = attention_statistics(mine, runs, places, len(slots), self.plan.frame_tokens)
                keys = sum(run.keys.shape[1] for run in runs)
                heads = self._orders[layer][part]
                self._parts.append(_Part(chunk, step, layer, heads, keys, slots, tuple(values)))
            return attend(layer, queries, current)

        return recorded

    def chosen(self, indices: Tensor | None) -> None:
        """Note which segments a clean pass chose, if any."""
        if indices is not None:
            self._chosen = indices.tolist()

    def frame(self) -> pl.DataFrame:
        """All rows noted so far, in the columns of `analyze.recording`.

        Raises InputError, naming the pass, where attention is not a number.
        """
        return pl.concat([self._rows_of(part) for part in self._parts])

    def _places(self, chunk: int, step: int, layer: int) -> Tensor:
        """(frames, rows) int64: the measured rows of each frame."""
        frames, tokens = self.plan.spec.frames_per_chunk, self.plan.frame_tokens
        if self._rows == tokens:
            return torch.arange(tokens).expand(frames, -1)
        generator = np.random.default_rng((self.seed, chunk, step, layer))
        drawn = [generator.choice(tokens, self._rows, replace=False) for _ in range(frames)]
        return torch.from_numpy(np.sort(np.stack(drawn), axis=1))

    def _runs(
        self, chunk: int, group: HeadGroup, held: GroupCache, current: Tensor
    ) -> tuple[list[KeyRun], list[tuple[str, int]]]:
        """The keys a group meets, and for each slot its role and latent frame."""
        plan = self.plan
        own = whole_frames(plan, chunk * plan.spec.frames_per_chunk, plan.chunk_tokens)
        seen = [
            (role.name, held[role.name].keys[0], role.spans(plan, group, chunk, self._chosen))
            for role in group.roles
        ]
        slots: list[tuple[str, int]] = []
        runs: list[KeyRun] = []
        for role, keys, spans in [*seen, (CURRENT, current, own)]:
            for span, part in zip(spans, keys.split([span.tokens for span in spans], 1), strict=True):
                if (role, span.frame) not in slots:
                    slots.append((role, span.frame))
                runs.append(KeyRun(part, slots.index((role, span.frame)), span.offset))
        return runs, slots

    def _rows_of(self, part: _Part) -> pl.DataFrame:
        arrays = [value.cpu().numpy().astype(np.float32) for value in part.values]
        if not all(np.isfinite(array).all() for array in arrays):
            raise InputError(
                f"the attention of layer {part.layer} is not a number",
                where=f"sample {self.sample}, chunk {part.chunk}, step {part.step}",
                expected="finite queries and keys",
                hint="Check the checkpoint for NaN weights.",
            )
        mass, entropy, same, mass_error, entropy_error, same_error = arrays
        heads, frames, _ = mass.shape
        sink = np.array([frame == 0 for _, frame in part.slots])  # one slot at most
        head, frame = np.indices((heads, frames), dtype=np.int32).reshape(2, -1)

        def column(name: str, value: int) -> pl.Series:
            return pl.Series(name, np.full(heads * frames, value, np.int32))

        def lists(name: str, values: Array) -> pl.Series:
            return pl.Series(name, values.reshape(heads * frames, -1)).arr.to_list()

        roles, key_frames = zip(*part.slots, strict=True)
        rows = pl.DataFrame(
            [
                column("sample", self.sample),
                column("chunk", part.chunk),
                column("step", part.step),
                column("layer", part.layer),
                pl.Series("head", np.asarray(part.heads, np.int32)[head]),
                pl.Series("query_frame", frame),
                column("keys", part.keys),
                pl.Series("entropy", entropy.ravel()),
                pl.Series("same_position", same.ravel()),
                pl.Series("sink", mass[..., sink].sum(-1).ravel()),
                pl.Series("key_frame", [key_frames] * len(head), pl.List(pl.Int32)),
                pl.Series("role", [roles] * len(head), pl.List(pl.String)),
                lists("mass", mass),
                lists("mass_error", mass_error),
                pl.Series("entropy_error", entropy_error.ravel()),
                pl.Series("same_position_error", same_error.ravel()),
                pl.Series("sink_error", mass_error[..., sink].sum(-1).ravel()),
            ]
        )
        assert rows.schema == COLUMNS, rows.schema
        return rows


def record_sample(
    model: WanModel,
    plan: CachePlan,
    text: Tensor,
    seed: int,
    sample: int,
    chunks: int,
    *,
    rows: int | None = None,
    orders: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int], None] = lambda chunk: None,
) -> pl.DataFrame:
    """Generate one video and return its statistics, in the columns of `analyze.recording`.

    `progress` is called with the number of chunks done. Raises InputError where attention is not a number.
    """
    recorder = Recorder(plan, sample, seed, rows, orders)
    for made in generate(model, plan, text, seeded_noise(plan, seed), chunks, recorder.watch):
        recorder.chosen(made.indices)
        progress(made.index + 1)
    return recorder.frame()
