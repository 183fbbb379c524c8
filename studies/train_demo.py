"""Train the demo model: flow matching with teacher forcing over chunks.

    python studies/train_demo.py --out runs/demo       # goes on from runs/demo/last.pt, if it is there
    python studies/train_demo.py --log models/demo/training.csv --curve models/demo/curve.png

The curriculum, `STAGES`: short clips first, so that the prompt is learned. Later chunks can copy their
context; only the first one, at high noise, needs the text. Clips of one chunk in large batches teach it at
low cost.

The objective: every clip is given twice, as clean chunks, which only build context, and as noisy chunks, each
of which sees the clean chunks before it and itself. One pass trains all chunks of a clip, each at its own
noise level. Muon for the matrices of the blocks, AdamW for the rest; the shipped weights are an exponential
moving average.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.headmaps.writing import new_file, write_bytes
from forcingkv.models.demo.data import make_clip
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.plotting import figure, png
from forcingkv.runtime import positions
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words

SEED = 20261122
SAVE_EVERY = 100
WARM_UP = 100
EMA = 0.995
CHECKPOINT, WEIGHTS, LOG = "last.pt", "model.safetensors", "log.csv"
WINDOW = 25
"""Steps averaged into a point of the curve."""
FIRST_CHUNK_WEIGHT = 2.0
Loss = Callable[[dict[str, Tensor]], Tensor]
"""A batch -> each chunk's weighted share of the loss, (chunks,)."""

CONTEXT_NOISE = 0.1
"""Largest noise mixed into the context, so that the model forgives its own chunks' small faults."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training with clips of one length."""

    chunks: int
    batch: int
    steps: int
    rate: float
    """Learning rate at the start of the stage; it runs linearly to `rate_end`."""
    rate_end: float
    singles: int = 0
    """Clips of one chunk trained beside each batch, lest the first chunk be forgotten."""


STAGES = (
    Stage(chunks=1, batch=32, steps=1700, rate=4e-3, rate_end=2.9e-3),
    Stage(chunks=3, batch=12, steps=200, rate=2.2e-3, rate_end=2.1e-3),
    Stage(chunks=7, batch=5, steps=600, rate=2e-3, rate_end=8.3e-4),
    Stage(chunks=7, batch=5, singles=32, steps=380, rate=8.3e-4, rate_end=2e-5),
)


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


def optimizers(model: WanModel) -> list[torch.optim.Optimizer]:
    """Muon for block matrices, AdamW for all else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def place(step: int) -> tuple[Stage, float] | None:
    """The stage and learning rate of a step; None when training is over."""
    first = 0
    for stage in STAGES:
        if step < first + stage.steps:
            done = (step - first) / stage.steps
            rate = stage.rate + (stage.rate_end - stage.rate) * done
            return stage, rate * min(1, (step + 1) / WARM_UP)
        first += stage.steps
    return None


class Trainer:
    """The model, its average and its optimizers, at a step."""

    def __init__(self, spec: ModelSpec) -> None:
        torch.manual_seed(SEED)
        self.model = WanModel(spec)
        initialise(self.model)
        self.average = copy.deepcopy(self.model)
        self.tuners = optimizers(self.model)
        self.step = 0

    def update(self, losses: Sequence[tuple[Stage, Loss]], rate: float) -> Tensor:
        """One step of training on a batch of each; returns each chunk's share of the first's loss."""
        for tuner in self.tuners:
            for group in tuner.param_groups:
                group["lr"] = rate
        generator = np.random.default_rng((SEED, self.step))
        found = []
        for stage, loss in losses:
            parts = loss(make_batch(self.model.spec, generator, stage))
            parts.sum().backward()
            found.append(parts.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for tuner in self.tuners:
            tuner.step()
            tuner.zero_grad(set_to_none=True)
        with torch.no_grad():
            keep = min(EMA, (self.step + 1) / (self.step + 10))
            for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(new, 1 - keep)
        self.step += 1
        return found[0]

    def save(self, out: Path) -> None:
        """Write the checkpoint and the averaged weights, each whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "tuners": [tuner.state_dict() for tuner in self.tuners],
            "step": self.step,
        }
        with new_file(out / CHECKPOINT) as partial:
            torch.save(state, partial)
        with new_file(out / WEIGHTS) as partial:
            save_file(self.average.state_dict(), partial)

    def resume(self, out: Path) -> None:
        """Go on from the checkpoint in `out`; log rows of later steps are dropped, to be run again."""
        state = torch.load(out / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for tuner, saved in zip(self.tuners, state["tuners"], strict=True):
            tuner.load_state_dict(saved)
        self.step = state["step"]
        rows = (out / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
        (out / LOG).write_text("".join(rows[: self.step + 1]), encoding="utf-8")


def stage_losses(model: WanModel, stage: Stage) -> list[tuple[Stage, Loss]]:
    """The stage's loss, and that of the single chunks trained beside it."""
    parts = [stage]
    if stage.singles:
        parts.append(replace(stage, chunks=1, batch=stage.singles))
    return [(part, loss_function(model, part)) for part in parts]


def train(out: Path) -> None:
    """Train to the end of `STAGES`, from the last checkpoint in `out` if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(load_spec("demo"))
    if (out / CHECKPOINT).is_file():
        trainer.resume(out)
    else:
        (out / LOG).write_text("step,chunks,loss,first,rate,seconds\n", encoding="utf-8")
    current: Stage | None = None
    while (at := place(trainer.step)) is not None:
        stage, rate = at
        if stage is not current:
            torch.compiler.reset()
            current, losses = stage, stage_losses(trainer.model, stage)
        started = time.perf_counter()
        parts = trainer.update(losses, rate)
        # The loss is a weighted mean over chunks; `first` is the first chunk's own.
        first = float(parts[0]) * (FIRST_CHUNK_WEIGHT + stage.chunks - 1) / FIRST_CHUNK_WEIGHT
        seconds = time.perf_counter() - started
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(
                f"{trainer.step},{stage.chunks},{float(parts.sum()):.5f},{first:.5f},{rate:.6f},{seconds:.2f}\n"
            )
        if trainer.step % SAVE_EVERY == 0 or place(trainer.step) is None:
            trainer.save(out)


def draw_curve(log: Path, out: Path) -> None:
    """Draw the training curve: from columns step, chunks, loss, first of a log (CSV), into a PNG."""
    rows = pl.read_csv(log).with_columns(pl.col("loss", "first").rolling_mean(WINDOW, min_samples=1))
    curve = figure(8, 3.6)
    axes = curve.subplots()
    axes.plot(rows["step"], rows["loss"], label="all chunks")
    axes.plot(rows["step"], rows["first"], label="first chunk", linewidth=0.8)
    for row, chunks in enumerate(rows["chunks"].unique().sort()):
        start = int(rows.filter(chunks=chunks)["step"][0])
        axes.axvline(start, color="grey", linewidth=0.6)
        axes.annotate(f" {chunks} chunk{'s' * (chunks > 1)}", (start, 0.45 / 1.3**row), color="grey")
    axes.set(xlabel="step", ylabel="flow matching loss", ylim=(0.03, 0.6), yscale="log")
    axes.legend()
    write_bytes(out, png(curve))


def main() -> None:
    """Train, or draw the curve of a log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of checkpoints and log.csv")
    parser.add_argument("--log", type=Path, help="log of a training, to draw --curve of")
    parser.add_argument("--curve", type=Path, help="PNG to write")
    given = parser.parse_args()
    if given.log and given.curve:
        draw_curve(given.log, given.curve)
    elif given.out:
        train(given.out)
    else:
        parser.error("give --out, or --log and --curve")


if __name__ == "__main__":
    main()
