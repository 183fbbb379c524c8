"""What trainings of the demo models share: attention of teacher forcing, optimizers, stages, checkpoints.

The objective: every clip is given twice, as clean chunks, which only build context, and as noisy chunks, each
of which sees the clean chunks before it and itself. One pass trains several chunks of a clip, each at its own
noise level. Muon for the matrices of the blocks, AdamW for the rest; the shipped weights are an exponential
moving average.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from forcingkv.headmaps.writing import new_file, write_bytes
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.plotting import figure, png
from forcingkv.runtime.spec import ModelSpec

WARM_UP = 100
EMA = 0.995
CHECKPOINT, WEIGHTS, LOG = "last.pt", "model.safetensors", "log.csv"
WINDOW = 25
"""Steps averaged into a point of the curve."""
CONTEXT_NOISE = 0.1
"""Largest noise mixed into the context, so that the model forgives its own chunks' small faults."""

Part: TypeAlias = Callable[[np.random.Generator], Tensor]
"""Draws a batch and gives the shares of its loss, whose sum is the loss."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How long a stage of training is, and its learning rate, running linearly from `rate` to `rate_end`."""

    steps: int
    rate: float
    rate_end: float


S = TypeVar("S", bound=Rates)


class TeacherForcing:
    """Attention over [clean chunks, noisy chunks]: a chunk sees clean frames before it and itself.

    What the last layer makes of clean chunks nobody reads, so it is not computed.
    """

    def __init__(self, spec: ModelSpec, clean: int, seen: Sequence[Sequence[int]]) -> None:
        """`clean` chunks of context, from the first on; `seen`: for each noisy chunk, the frames among them
        that it sees. Clean chunks see as much as the model attends to."""
        self.clean, self.size, self.last = clean, spec.frames_per_chunk, spec.layers - 1
        self.seen = [*(frames_before(spec, index) for index in range(clean)), *seen]

    def __call__(self, layer: int, queries: Tensor, current: KeysValues) -> Tensor:
        frames = [x.split(x.shape[2] // (len(self.seen) * self.size), 2) for x in (queries, *current)]
        out = []
        for part, before in enumerate(self.seen):
            if part < self.clean and layer == self.last:
                out += [torch.zeros_like(frame) for frame in frames[0][: self.size]]
                continue
            own = range(part * self.size, (part + 1) * self.size)
            q = torch.cat([frames[0][frame] for frame in own], 2)
            k, v = (torch.cat([x[frame] for frame in (*before, *own)], 2) for x in frames[1:])
            out.append(F.scaled_dot_product_attention(q, k, v))
        return torch.cat(out, 2)


def frames_before(spec: ModelSpec, chunk: int) -> range:
    """The frames before a chunk that the model attends to under the policy `full`."""
    end = chunk * spec.frames_per_chunk
    return range(max(0, end + spec.frames_per_chunk - spec.attended_frames), end)


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


def place(stages: Sequence[S], step: int) -> tuple[S, float] | None:
    """The stage and learning rate of a step; None when training is over."""
    first = 0
    for stage in stages:
        if step < first + stage.steps:
            done = (step - first) / stage.steps
            rate = stage.rate + (stage.rate_end - stage.rate) * done
            return stage, rate * min(1, (step + 1) / WARM_UP)
        first += stage.steps
    return None


class Trainer:
    """The model, its average and its optimizers, at a step."""

    def __init__(self, model: WanModel, seed: int) -> None:
        self.model, self.seed = model, seed
        self.average = copy.deepcopy(self.model)
        self.tuners = optimizers(self.model)
        self.step = 0

    def update(self, parts: Sequence[Part], rate: float) -> Tensor:
        """One step of training on a batch of each part; returns the shares of the first part's loss."""
        for tuner in self.tuners:
            for group in tuner.param_groups:
                group["lr"] = rate
        generator = np.random.default_rng((self.seed, self.step))
        found = []
        for part in parts:
            shares = part(generator)
            shares.sum().backward()
            found.append(shares.detach())
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


def train_stages(
    out: Path,
    trainer: Trainer,
    stages: Sequence[S],
    parts_of: Callable[[S], Sequence[Part]],
    columns: str,
    row: Callable[[S, Tensor], str],
    save_every: int,
) -> None:
    """Train to the end of the stages, from the last checkpoint in `out` if there is one.

    Args:
        out: folder of checkpoint, averaged weights and log.
        trainer: the model at step 0.
        stages: the curriculum.
        parts_of: what each step of a stage trains; asked once, when the stage begins.
        columns: of the log, between `step` and `rate,seconds`.
        row: their values at a step, from the shares of its loss.
        save_every: steps between checkpoints.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / CHECKPOINT).is_file():
        trainer.resume(out)
    else:
        (out / LOG).write_text(f"step,{columns},rate,seconds\n", encoding="utf-8")
    current: S | None = None
    while (at := place(stages, trainer.step)) is not None:
        stage, rate = at
        if stage is not current:
            torch.compiler.reset()
            current, parts = stage, parts_of(stage)
        started = time.perf_counter()
        shares = trainer.update(parts, rate)
        seconds = time.perf_counter() - started
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{trainer.step},{row(stage, shares)},{rate:.6f},{seconds:.2f}\n")
        if trainer.step % save_every == 0 or place(stages, trainer.step) is None:
            trainer.save(out)


def draw_curve(log: Path, out: Path, second: str, name: str, least: float) -> None:
    """Draw the training curve: from columns step, chunks, loss and `second` of a log (CSV), into a PNG.

    `name` is what the second curve is called, `least` the smallest loss shown.
    """
    rows = pl.read_csv(log).with_columns(pl.col("loss", second).rolling_mean(WINDOW, min_samples=1))
    curve = figure(8, 3.6)
    axes = curve.subplots()
    axes.plot(rows["step"], rows["loss"], label="all chunks")
    axes.plot(rows["step"], rows[second], label=name, linewidth=0.8)
    for number, chunks in enumerate(rows["chunks"].unique().sort()):
        start = int(rows.filter(chunks=chunks)["step"][0])
        axes.axvline(start, color="grey", linewidth=0.6)
        axes.annotate(f" {chunks} chunk{'s' * (chunks > 1)}", (start, 0.45 / 1.3**number), color="grey")
    axes.set(xlabel="step", ylabel="flow matching loss", ylim=(least, 0.6), yscale="log")
    axes.legend()
    write_bytes(out, png(curve))


def train_or_draw(
    doc: str | None, train: Callable[[Path], None], second: str, name: str, least: float
) -> None:
    """The command line of a training, `doc` its description: it trains, or draws the curve of a log.

    `second`, `name` and `least` as in `draw_curve`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of checkpoints and log.csv")
    parser.add_argument("--log", type=Path, help="log of a training, to draw --curve of")
    parser.add_argument("--curve", type=Path, help="PNG to write")
    given = parser.parse_args()
    if given.log and given.curve:
        draw_curve(given.log, given.curve, second, name, least)
    elif given.out:
        train(given.out)
    else:
        parser.error("give --out, or --log and --curve")
