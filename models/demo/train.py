"""Train the demo model: flow matching with teacher forcing over chunks.

Every clip is given twice: clean chunks, which only build context, and noisy chunks, each of which
sees the clean chunks before it and itself. So one pass trains all chunks of a clip at their own
noise level. Muon for the matrices of the blocks, AdamW for the rest; the shipped weights are an
exponential moving average.

    python -m forcingkv.models.demo.train --out runs/demo       # resumes from runs/demo/last.pt
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.models.demo.data import make_clip
from forcingkv.models.demo.stages import STAGES, Stage
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words

SEED = 20261122
LOG = "log.jsonl"
SAVE_EVERY = 100
WARM_UP = 100
EMA = 0.995
FIRST_CHUNK_WEIGHT = 2.0
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


def loss_function(
    model: WanModel, stage: Stage, *, compiled: bool = True
) -> Callable[[dict[str, Tensor]], Tensor]:
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


def _forget_after(log: Path, step: int) -> None:
    """Drop log rows of steps that the checkpoint does not have: they are run again."""
    rows = log.read_text().splitlines()[:step]
    log.write_text("".join(row + "\n" for row in rows))


def train(out: Path) -> None:
    """Train to the end of `STAGES`, from the last checkpoint in `out` if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    spec = load_spec("demo")
    torch.manual_seed(SEED)
    model = WanModel(spec)
    initialise(model)
    average = copy.deepcopy(model)
    tuners = optimizers(model)
    step, last = 0, out / "last.pt"
    if last.is_file():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for tuner, saved in zip(tuners, state["tuners"], strict=True):
            tuner.load_state_dict(saved)
        step = state["step"]
        _forget_after(out / LOG, step)
    current, loss = None, None
    while (at := place(step)) is not None:
        stage, rate = at
        if stage is not current:
            torch.compiler.reset()
            current, loss = stage, loss_function(model, stage)
        assert loss is not None
        started = time.perf_counter()
        for tuner in tuners:
            for group in tuner.param_groups:
                group["lr"] = rate
        batch = make_batch(spec, np.random.default_rng((SEED, step)), stage)
        parts = loss(batch)
        parts.sum().backward()
        parts = parts.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tuner in tuners:
            tuner.step()
            tuner.zero_grad(set_to_none=True)
        with torch.no_grad():
            keep = min(EMA, (step + 1) / (step + 10))
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - keep)
        step += 1
        row = {
            "step": step,
            "chunks": stage.chunks,
            "loss": round(float(parts.sum()), 5),
            "first": round(float(parts[0]) / FIRST_CHUNK_WEIGHT * (FIRST_CHUNK_WEIGHT + stage.chunks - 1), 5),
            "rate": round(rate, 6),
            "seconds": round(time.perf_counter() - started, 2),
        }
        with (out / LOG).open("a") as log:
            log.write(json.dumps(row) + "\n")
        if step % SAVE_EVERY == 0 or place(step) is None:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "tuners": [tuner.state_dict() for tuner in tuners],
                "step": step,
            }
            torch.save(state, out / "next.pt")
            os.replace(out / "next.pt", last)
            save_file(average.state_dict(), out / "next.safetensors")
            os.replace(out / "next.safetensors", out / "model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log.jsonl")
    train(parser.parse_args().out)
