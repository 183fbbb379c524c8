"""Recording: what every head attends to while a video is generated, under any policy.

The attention matrix is never held: queries and keys are gone through in blocks, of which each query's
log-sum-exp is kept (as in FlashAttention), so memory grows neither with the number of keys nor of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from forcingkv.analyze.recording import COLUMNS, Passes, passes_of, told_step
from forcingkv.headmaps import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.kv import Cache, read_role
from forcingkv.models.kv_roles import GroupCache
from forcingkv.models.wan import Attend, KeysValues, WanModel
from forcingkv.runtime.given import GivenNoise
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
from forcingkv.runtime.kv.roles import whole_frames
from forcingkv.runtime.schedule import CLEAN_PASS, MOST_STEPS

CURRENT = "current"
LEAST_ROWS = 2
"""Rows of a frame; fewer give no standard error."""
KEY_BLOCK = 2048
"""Keys looked at together."""
LOGITS = 2**20
"""Logits held together, over all heads."""
EXACT = ("cpu", "cuda", "meta")
"""Kinds of devices that are known to have float64; for others rows are added up on the host."""


class KeyRun(NamedTuple):
    """Keys of tokens that lie one after the other in a latent frame."""

    keys: Tensor
    """(heads, tokens, head_dim), after RoPE."""
    slot: int
    """Place in the output that their mass is added to."""
    offset: int = 0
    """Place of the first of them in its frame."""


class AttentionStatistics(NamedTuple):
    """Means over the measured query rows of each query frame, and their standard errors.

    Each (heads, query frames) but `mass` (heads, query frames, slots); float64.
    """

    mass: Tensor
    """Share of attention on each slot; sums to 1 over slots."""
    entropy: Tensor
    """Of the attention over keys, in nats: -sum p ln p."""
    same_position: Tensor
    """Share of attention on keys that lie where the query does in its frame, its own included."""
    mass_error: Tensor
    entropy_error: Tensor
    same_position_error: Tensor


def attention_statistics(
    queries: Tensor, runs: Sequence[KeyRun], places: Tensor, slots: int, frame_tokens: int
) -> AttentionStatistics:
    """Measure the attention of some query rows of each query frame over all keys.

    The error of a mean over n of the N rows of a frame, drawn without replacement, is
    s / sqrt(n) * sqrt(1 - n / N), s being the standard deviation of the rows (Cochran, Sampling
    Techniques, 2.6): 0 if all rows are measured. 1.96 errors hold the mean of all rows in 95% of draws as
    far as the mean is normally distributed: for mass and entropy it is, from some dozens of rows on;
    for the same-position mass of a sharp head, to which a few rows contribute nearly all, less.

    Args:
        queries: (heads, query frames, rows, head_dim), after RoPE.
        runs: every key that the queries attend to, each once.
        places: (query frames, rows) int64, where each row lies in its frame.
        slots: how many slots the runs name.
        frame_tokens: tokens of a frame (N).
    """
    heads, frames, rows, _ = queries.shape
    pieces = [
        KeyRun(keys, run.slot, run.offset + block * KEY_BLOCK)
        for run in runs
        for block, keys in enumerate(run.keys.split(KEY_BLOCK, 1))
    ]
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32  # never half precision
    membership = torch.zeros(len(pieces), slots, dtype=dtype, device=queries.device)
    for number, piece in enumerate(pieces):
        membership[number, piece.slot] = 1
    blocks = _blocks(pieces)
    longest = max(len(block) * block[0].keys.shape[1] for block in blocks)
    step = max(1, LOGITS // (heads * longest))
    exact = queries.device.type in EXACT
    place = queries.device if exact else torch.device("cpu")
    sums = torch.zeros(2, heads, frames, slots + 2, dtype=torch.float64, device=place)
    for frame in range(frames):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            values = _row_values(queries[:, frame, part], blocks, places[frame, part], membership)
            values = (values if exact else _on_the_host(values)).double()
            sums[0, :, frame] += values.sum(1)
            sums[1, :, frame] += values.square().sum(1)
    mean = sums[0] / rows
    spread = (sums[1] / rows - mean.square()).clamp(min=0) / max(rows - 1, 1)
    error = (spread * (1 - rows / frame_tokens)).sqrt()
    return AttentionStatistics(
        *(part for both in (mean, error) for part in (both[..., :slots], both[..., slots], both[..., -1]))
    )


def _blocks(pieces: Sequence[KeyRun]) -> list[list[KeyRun]]:
    """The pieces in their order, neighbours of one length together, as many as `KEY_BLOCK` tokens hold."""
    blocks: list[list[KeyRun]] = []
    for piece in pieces:
        tokens = piece.keys.shape[1]
        fits = blocks and blocks[-1][0].keys.shape[1] == tokens
        if fits and (len(blocks[-1]) + 1) * tokens <= KEY_BLOCK:
            blocks[-1].append(piece)
        else:
            blocks.append([piece])
    return blocks


def _row_values(
    queries: Tensor, blocks: Sequence[Sequence[KeyRun]], places: Tensor, membership: Tensor
) -> Tensor:
    """(heads, rows, slots + 2): mass of each slot, entropy and same-position mass of each row."""
    scaled = queries.to(membership) * queries.shape[-1] ** -0.5
    values = zip(*(_block_values(scaled, block, places) for block in blocks), strict=True)
    by_piece, means, owns = (torch.cat(parts, -1) for parts in values)
    total = by_piece.logsumexp(-1, keepdim=True)
    share = (by_piece - total).exp()
    entropy = total - (share * means).sum(-1, keepdim=True)
    own = (owns - total).exp().sum(-1, keepdim=True)
    return torch.cat([share @ membership, entropy, own], -1)


def _block_values(scaled: Tensor, block: Sequence[KeyRun], places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(heads, rows, pieces) each: log-sum-exp of a row's logits, their softmax mean, its own place's."""
    # Put together here, not before, so that no second copy of all keys is held.
    keys = torch.cat([piece.keys for piece in block], 1) if len(block) > 1 else block[0].keys
    logits = (scaled @ keys.to(scaled).transpose(1, 2)).unflatten(-1, (len(block), -1))
    tokens = logits.shape[-1]
    place = places.unsqueeze(-1) - places.new_tensor([piece.offset for piece in block])
    here = (place >= 0) & (place < tokens)
    index = place.clamp(0, tokens - 1).expand(len(logits), -1, -1).unsqueeze(-1)
    own = logits.gather(-1, index).squeeze(-1).masked_fill(~here, -torch.inf)
    highest = logits.amax(-1, keepdim=True)
    logits -= highest
    weights = logits.exp()
    weight = weights.sum(-1)
    mean = weights.mul_(logits).sum(-1) / weight
    highest = highest.squeeze(-1)
    return highest + weight.log(), highest + mean, own


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
    """Collects the statistics of the passes of one sample. `watch` is given to `generate`.

    Args:
        plan: what generation runs under.
        sample: index of the video.
        seed: seed of the video; also decides which query rows are measured.
        rows: query rows measured of each pass and layer, in equal parts of the chunk's frames; None:
            all, with which there is no error.
        orders: for each layer the model's own index of the head at each place (`models.heads`).
        passes: those that are recorded; the attention of others is left as it is.
    """

    def __init__(
        self,
        plan: CachePlan,
        sample: int,
        seed: int = 0,
        rows: int | None = None,
        orders: Sequence[Sequence[int]] | None = None,
        passes: Passes = "denoise",
    ) -> None:
        self.plan, self.sample, self.seed, self.passes = plan, sample, seed, passes
        frames = plan.spec.frames_per_chunk
        share = max(LEAST_ROWS, -(-rows // frames)) if rows else plan.frame_tokens
        self._rows = min(plan.frame_tokens, share)
        self._orders = orders or [range(plan.spec.heads)] * plan.spec.layers
        self._chosen: list[int] | None = None
        self._parts: list[_Part] = []

    def watch(self, chunk: int, step: int, cache: Cache, attend: Attend) -> Attend:
        """Attention that does what `attend` does and notes where it goes, in passes that are recorded."""
        if step not in {made.step for made in passes_of(self.plan.spec, chunk, self.passes)}:
            return attend

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
                here = tuple(map(_on_the_host, values))
                self._parts.append(_Part(chunk, step, layer, heads, keys, slots, here))
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
        # A seed has no sign, and no denoising pass has this number.
        number = MOST_STEPS if step == CLEAN_PASS else step
        generator = np.random.default_rng((self.seed, chunk, number, layer))
        drawn = [generator.choice(tokens, self._rows, replace=False) for _ in range(frames)]
        return torch.from_numpy(np.sort(np.stack(drawn), axis=1))

    def _runs(
        self, chunk: int, group: HeadGroup, held: GroupCache, current: Tensor
    ) -> tuple[list[KeyRun], list[tuple[str, int]]]:
        """The keys a group meets, and for each slot its role and latent frame."""
        plan = self.plan
        seen = [
            (
                role.name,
                read_role(plan, group, role, held[role.name], current).keys[0],
                role.spans(plan, group, chunk, self._chosen),
            )
            for role in group.roles
        ]
        seen.append(
            (CURRENT, current, whole_frames(plan, chunk * plan.spec.frames_per_chunk, plan.chunk_tokens))
        )
        slots: dict[tuple[str, int], int] = {}
        runs: list[KeyRun] = []
        for role, keys, spans in seen:
            for span, part in zip(spans, keys.split([span.tokens for span in spans], 1), strict=True):
                slot = slots.setdefault((role, span.frame), len(slots))
                runs.append(KeyRun(part, slot, span.offset))
        return runs, list(slots)

    def _rows_of(self, part: _Part) -> pl.DataFrame:
        arrays = [value.numpy().astype(np.float32) for value in part.values]
        if not all(np.isfinite(array).all() for array in arrays):
            raise InputError(
                f"the attention of layer {part.layer} is not a number",
                where=f"sample {self.sample}, chunk {part.chunk}, {told_step(part.step)}",
                expected="finite queries and keys",
                hint="Check the checkpoint for NaN weights.",
            )
        mass, entropy, same, mass_error, entropy_error, same_error = arrays
        sink = np.array([frame == 0 for _, frame in part.slots])  # one slot at most
        head, frame = np.indices(entropy.shape, dtype=np.int32).reshape(2, -1)
        heads = np.asarray(part.heads, np.int32)[head]
        # Whole columns: repeating one number takes polars a query of its own.
        of_all = (self.sample, part.chunk, part.step, part.layer, part.keys)
        sample, chunk, step, layer, keys = (np.full_like(head, number) for number in of_all)
        roles, key_frames = zip(*part.slots, strict=True)
        columns = (
            *(sample, chunk, step, layer, heads, frame, keys),
            entropy.ravel(),
            same.ravel(),
            mass[..., sink].sum(-1).ravel(),
            [key_frames] * len(head),
            [roles] * len(head),
            mass.reshape(len(head), -1),
            mass_error.reshape(len(head), -1),
            entropy_error.ravel(),
            same_error.ravel(),
            mass_error[..., sink].sum(-1).ravel(),
        )
        return pl.DataFrame(dict(zip(COLUMNS, columns, strict=True)), schema=COLUMNS)


def _on_the_host(statistics: Tensor) -> Tensor:
    """Where a video's statistics wait for its end, and take no memory of a GPU. Meta tensors stay."""
    return statistics if statistics.is_meta else statistics.cpu()


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
    passes: Passes = "denoise",
    progress: Callable[[int], None] = lambda chunk: None,
    given: GivenNoise | None = None,
    keep: Callable[[Tensor], None] = lambda latents: None,
) -> pl.DataFrame:
    """Generate one video and return its statistics, in the columns of `analyze.recording`.

    `progress` is called with the number of chunks done; `given` is the noise, where it is not the seed's;
    `keep` is given the latents of each chunk (1, channels, frames, height, width).
    Raises InputError where attention is not a number.
    """
    recorder = Recorder(plan, sample, seed, rows, orders, passes)
    noise = seeded_noise(plan, seed, given)
    for made in generate(model, plan, text, noise, chunks, recorder.watch):
        recorder.chosen(made.indices)
        keep(made.latents)
        progress(made.index + 1)
    return recorder.frame()
