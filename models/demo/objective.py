"""What the demo model is trained on: noisy chunks that see the clean chunks before them.

Every clip is given twice: clean chunks, which only build context, and noisy chunks, each of which
sees the clean chunks before it and itself. So one pass trains all chunks of a clip at their own
noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.demo.data import make_clip
from forcingkv.models.demo.stages import Stage
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words

FIRST_CHUNK_WEIGHT = 2.0
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


def sample_sigmas(rng: np.random.Generator, batch: int, chunks: int) -> np.ndarray[Any, Any]:
    """Noise levels (batch, chunks): logit-normal, higher for the first chunk, which needs the text."""
    centre = np.where(np.arange(chunks) == 0, 1.5, 0.7)
    return np.asarray(1 / (1 + np.exp(-(rng.standard_normal((batch, chunks)) * 1.3 + centre))))


def make_batch(spec: ModelSpec, rng: np.random.Generator, stage: Stage) -> dict[str, Tensor]:
    """Tensors of one training step."""
    frames = stage.chunks * spec.frames_per_chunk
    clips = [make_clip(rng, frames, "train") for _ in range(stage.batch)]
    clean = np.stack([clip.frames for clip in clips])[:, None]
    sigmas = sample_sigmas(rng, stage.batch, stage.chunks)
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
        per_chunk = torch.unflatten(error, 2, (stage.chunks, -1)).mean((0, 1, 3, 4, 5))
        return per_chunk * weights

    return torch.compile(loss, dynamic=False) if compiled else loss
