"""Train the demo model: flow matching with teacher forcing over chunks.

    python studies/train_demo.py --out runs/demo       # goes on from runs/demo/last.pt, if it is there
    python studies/train_demo.py --log models/demo/training.csv --curve models/demo/curve.png

The curriculum, `STAGES`: short clips first, so that the prompt is learned. Later chunks can copy their
context; only the first one, at high noise, needs the text. Clips of one chunk in large batches teach it at
low cost.

What it shares with other trainings, the objective among it: `studies/flow_training.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forcingkv.models.demo.data import make_clip
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from studies.flow_training import (
    CONTEXT_NOISE,
    Part,
    Rates,
    TeacherForcing,
    Trainer,
    frames_before,
    train_or_draw,
    train_stages,
)

SEED = 20261122
SAVE_EVERY = 100
FIRST_CHUNK_WEIGHT = 2.0
Loss = Callable[[dict[str, Tensor]], Tensor]
"""A batch -> each chunk's weighted share of the loss, (chunks,)."""


@dataclass(frozen=True, kw_only=True)
class Stage(Rates):
    """A stretch of training with clips of one length."""

    chunks: int
    batch: int
    singles: int = 0
    """Clips of one chunk trained beside each batch, lest the first chunk be forgotten."""


STAGES = (
    Stage(chunks=1, batch=32, steps=1700, rate=4e-3, rate_end=2.9e-3),
    Stage(chunks=3, batch=12, steps=200, rate=2.2e-3, rate_end=2.1e-3),
    Stage(chunks=7, batch=5, steps=600, rate=2e-3, rate_end=8.3e-4),
    Stage(chunks=7, batch=5, singles=32, steps=380, rate=8.3e-4, rate_end=2e-5),
)


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
    seen = [frames_before(spec, index) for index in range(stage.chunks)]
    attend = TeacherForcing(spec, stage.chunks if copies == 2 else 0, seen)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        prompt = model.prompt(batch["text"])
        flow, _ = model(batch["latents"], batch["time"], (cosines, sines), prompt, attend)
        error = (flow[:, :, -frames:] - batch["flow"]).square()
        per_chunk = torch.unflatten(error, 2, (stage.chunks, -1)).mean((0, 1, 3, 4, 5))
        return per_chunk * weights

    return torch.compile(loss, dynamic=False) if compiled else loss


def initialise(model: WanModel) -> None:
    """Small embeddings, and a head that starts by predicting nothing."""
    for name, parameter in model.named_parameters():
        if name.startswith("head.head") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name == "position_embedding":
            parameter.data = place_codes(model.spec)
        elif name.endswith("weight") and parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)


def place_codes(spec: ModelSpec) -> Tensor:
    """Smooth codes of a token's row and column: random mixtures of the cosines of each axis."""
    axes = [
        torch.cos(torch.pi * torch.arange(n) * (torch.arange(n)[:, None] + 0.5) / n)
        for n in spec.geometry().grid
    ]
    rows, columns = (axis @ torch.randn(len(axis), spec.dim) * 0.1 for axis in axes)
    return (rows[:, None] + columns[None, :]).flatten(0, 1)[None]


def stage_parts(model: WanModel, stage: Stage) -> list[Part]:
    """The stage's loss, and that of the single chunks trained beside it."""
    kinds = [stage]
    if stage.singles:
        kinds.append(replace(stage, chunks=1, batch=stage.singles))
    return [_part(model, kind, loss_function(model, kind)) for kind in kinds]


def _part(model: WanModel, stage: Stage, loss: Loss) -> Part:
    return lambda generator: loss(make_batch(model.spec, generator, stage))


def train(out: Path) -> None:
    """Train to the end of `STAGES`, from the last checkpoint in `out` if there is one."""
    torch.manual_seed(SEED)
    model = WanModel(load_spec("demo"))
    initialise(model)

    def row(stage: Stage, shares: Tensor) -> str:
        # The loss is a weighted mean over chunks; `first` is the first chunk's own.
        first = float(shares[0]) * (FIRST_CHUNK_WEIGHT + stage.chunks - 1) / FIRST_CHUNK_WEIGHT
        return f"{stage.chunks},{float(shares.sum()):.5f},{first:.5f}"

    trainer, parts_of = Trainer(model, SEED), partial(stage_parts, model)
    train_stages(out, trainer, STAGES, parts_of, "chunks,loss,first", row, SAVE_EVERY)


if __name__ == "__main__":
    train_or_draw(__doc__, train, "first", "first chunk", 0.03)
