"""What the demo model is trained on: noisy chunks that see the clean chunks before them.

Every clip is given twice: clean chunks, which only build context, and noisy chunks, each of which
sees the clean chunks before it and itself. So one pass trains all chunks of a clip at their own
noise level.

A clip whose prompt changes is given with its last prompt alone, as caches are that were rebuilt at the
change: its chunks before the change are context only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.demo.data import Clip, make_clip, make_switched_clip
from forcingkv.models.demo.stages import Stage
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words

__all__ = ["FIRST_CHUNK_WEIGHT", "Loss", "TeacherForcing", "loss_function", "make_batch"]

FIRST_CHUNK_WEIGHT = 2.0
Array = npt.NDArray[np.floating]
Loss = Callable[[dict[str, Tensor]], Tensor]
"""A batch -> each chunk's weighted share of the loss, (chunks,)."""

CONTEXT_NOISE = 0.1
"""Largest noise mixed into the context, so that the model forgives its own chunks' small faults."""


class TeacherForcing:
    """Attention over [clean chunks, noisy chunks]: chunk i sees itself and the clean ones before."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def __call__(self, layer: int, queries: Tensor, current: KeysValues) -> Tensor:
        if self.chunks == 1:
            return F.scaled_dot_product_attention(queries, current.keys, current.values)
        q, k, v = (x.chunk(2 * self.chunks, dim=2) for x in (queries, *current))
        out = []
        for part in range(2 * self.chunks):
            seen = [*range(part % self.chunks), part]
            keys = torch.cat([k[i] for i in seen], 2)
            values = torch.cat([v[i] for i in seen], 2)
            out.append(F.scaled_dot_product_attention(q[part], keys, values))
        return torch.cat(out, 2)


def sample_sigmas(rng: np.random.Generator, starts: npt.NDArray[np.int64], chunks: int) -> Array:
    """Noise levels (batch, chunks): logit-normal, higher for the chunk that its prompt begins with.

    That one, `starts` (batch,), needs the text.
    """
    centre = np.where(np.arange(chunks) == starts[:, None], 1.5, 0.7)
    return np.asarray(1 / (1 + np.exp(-(rng.standard_normal(centre.shape) * 1.3 + centre))))


def _clips(spec: ModelSpec, rng: np.random.Generator, stage: Stage) -> tuple[list[Clip], list[int]]:
    """Clips, and for each the chunk that its prompt begins with."""
    frames, clips, starts = stage.chunks * spec.frames_per_chunk, [], []
    for _ in range(stage.batch):
        if stage.switched and stage.chunks > 1 and rng.random() < stage.switched:
            start = int(rng.integers(1, stage.chunks))
            clips.append(make_switched_clip(rng, frames, start * spec.frames_per_chunk, "train"))
        else:
            start = 0
            clips.append(make_clip(rng, frames, "train"))
        starts.append(start)
    return clips, starts


def make_batch(spec: ModelSpec, rng: np.random.Generator, stage: Stage) -> dict[str, Tensor]:
    """Tensors of one training step."""
    frames = stage.chunks * spec.frames_per_chunk
    clips, first = _clips(spec, rng, stage)
    starts = np.asarray(first)
    clean = np.stack([clip.frames for clip in clips])[:, None]
    sigmas = sample_sigmas(rng, starts, stage.chunks)
    level = np.repeat(sigmas, spec.frames_per_chunk, 1)[:, None, :, None, None]
    noise = rng.standard_normal(clean.shape)
    noisy = (1 - level) * clean + level * noise
    times = 1000 * sigmas
    if stage.chunks > 1:
        blur = rng.uniform(0, CONTEXT_NOISE, (stage.batch, 1, frames, 1, 1))
        context = (1 - blur) * clean + blur * rng.standard_normal(clean.shape)
        noisy = np.concatenate([context, noisy], 2)
        times = np.concatenate([np.zeros_like(sigmas), times], 1)
    text = np.concatenate([encode_words(spec, clip.prompt) for clip in clips])
    data = {
        "latents": noisy,
        "flow": noise - clean,
        "time": positions.time_features(spec, times),
        "text": text,
        "counted": np.arange(stage.chunks) >= starts[:, None],
    }
    return {name: torch.from_numpy(np.asarray(a, np.float32)) for name, a in data.items()}


def loss_function(model: WanModel, stage: Stage, *, compiled: bool = True) -> Loss:
    """The loss of a stage, (chunks,): mean squared error of the flow, the first chunk counting more."""
    spec = model.spec
    frames = stage.chunks * spec.frames_per_chunk
    tables = positions.rotary(spec, spec.geometry(), 0, frames)
    copies = 1 if stage.chunks == 1 else 2
    cosines, sines = (torch.from_numpy(table).repeat(copies, 1) for table in tables)
    weights = torch.ones(stage.chunks)
    weights[0] = FIRST_CHUNK_WEIGHT
    weights = (weights / weights.sum()).to(torch.float32)
    attend = TeacherForcing(stage.chunks)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        prompt = model.prompt(batch["text"])
        flow, _ = model(batch["latents"], batch["time"], (cosines, sines), prompt, attend)
        error = (flow[:, :, -frames:] - batch["flow"]).square()
        per_chunk = torch.unflatten(error, 2, (stage.chunks, -1)).mean((1, 3, 4, 5))
        counted = batch["counted"]
        return (per_chunk * counted).sum(0) / counted.sum(0).clamp(min=1) * weights

    return torch.compile(loss, dynamic=False) if compiled else loss
