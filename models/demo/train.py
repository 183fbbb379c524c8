"""Train the demo model: flow matching with teacher forcing over chunks.

Muon for the matrices of the blocks, AdamW for the rest; the shipped weights are an exponential moving
average. What is learned stands in `objective`, for how long in `stages`.

    python -m forcingkv.models.demo.train --out runs/demo       # resumes from runs/demo/last.pt
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from forcingkv.models.demo.objective import FIRST_CHUNK_WEIGHT, Loss, loss_function, make_batch
from forcingkv.models.demo.stages import STAGES, Stage
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime.spec import ModelSpec

SEED = 20261122
SAVE_EVERY = 100
WARM_UP = 100
EMA = 0.995
CHECKPOINT, WEIGHTS, LOG = "last.pt", "model.safetensors", "log.csv"


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
        torch.save(state, out / "next.pt")
        os.replace(out / "next.pt", out / CHECKPOINT)
        save_file(self.average.state_dict(), out / "next.safetensors")
        os.replace(out / "next.safetensors", out / WEIGHTS)

    def resume(self, out: Path) -> None:
        """Go on from the checkpoint in `out`; log rows of later steps are dropped, to be run again."""
        state = torch.load(out / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for tuner, saved in zip(self.tuners, state["tuners"], strict=True):
            tuner.load_state_dict(saved)
        self.step = state["step"]
        rows = (out / LOG).read_text().splitlines(keepends=True)
        (out / LOG).write_text("".join(rows[: self.step + 1]))


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
        (out / LOG).write_text("step,chunks,loss,first,rate,seconds\n")
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
        with (out / LOG).open("a") as log:
            log.write(
                f"{trainer.step},{stage.chunks},{float(parts.sum()):.5f},{first:.5f},{rate:.6f},{seconds:.2f}\n"
            )
        if trainer.step % SAVE_EVERY == 0 or place(trainer.step) is None:
            trainer.save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log.csv")
    train(parser.parse_args().out)
