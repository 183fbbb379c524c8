"""Train demo-occluded, from the demo model's weights: digits that come back are to be those that went away.

    python studies/train_occluded.py --out runs/occluded  # goes on from last.pt in there, if there is one
    python studies/train_occluded.py --log models/demo_occluded/training.csv --curve curve.png

Of each clip all chunks build context, limited to the model's window, and four are trained: the chunk in which
digits come back at two noise levels, high ones, since that is where memory decides; the next one, in which
they are seen whole; and another. Pixels of a digit that comes back count more than others. Clips in which
digits are away longer than the window are trained only until they would come back: what cannot be known is
not learned, and no reason is given to hand a digit on from chunk to chunk while nobody sees it.
What it shares with the demo's training, the objective among it: `studies/flow_training.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo_occluded.data import CHUNK, Timeline, make_clip
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.backends.torch_model import compile_blocks
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

SEED = 20261130
SAVE_EVERY = 100
TRAINED = 4
"""Chunks of each clip that are trained: first, twice, one in which digits come back, where there is one."""
BACK_WEIGHT = 4.0
"""What a pixel of a digit that comes back counts; others count 1."""
KEPT = 0.1, 0.9
"""Least and most share of frames that are kept where some are dropped."""


@dataclass(frozen=True, kw_only=True)
class Stage(Rates):
    """A stretch of training with clips of one length."""

    chunks: int
    batch: int
    timelines: tuple[Timeline, ...]
    """Of which each step takes one."""
    dropped: float = 0.0
    """Share of trained chunks that see only some of the frames before them: see `seen_frames`."""
    waiting: float = 0.0
    """Share of the other trained chunks that are drawn among those in which digits are waited for. Where it
    is not 0, these are trained at high noise levels: whether the wait goes on or ends is decided there."""


def timelines(late: int, away: Sequence[int]) -> tuple[Timeline, ...]:
    """Digits that come late by so many chunks, and are away for each of these."""
    return tuple(Timeline(late, chunks) for chunks in away)


STAGES = (
    Stage(chunks=5, batch=6, steps=200, rate=1.5e-3, rate_end=1.5e-3, timelines=timelines(0, [1])),
    Stage(
        chunks=7,
        batch=5,
        steps=100,
        rate=1.5e-3,
        rate_end=1.38e-3,
        dropped=0.6,
        timelines=timelines(0, [1, 2, 3]),
    ),
    Stage(
        chunks=7,
        batch=5,
        steps=100,
        rate=1.38e-3,
        rate_end=1.26e-3,
        dropped=0.6,
        waiting=0.6,
        timelines=timelines(0, [1, 2, 3, 3]),
    ),
    Stage(
        chunks=9,
        batch=5,
        steps=400,
        rate=1.2e-3,
        rate_end=2e-5,
        dropped=0.6,
        waiting=0.6,
        timelines=timelines(0, [1, 2, 3, 4, 4, 5, 7]) + timelines(1, [1, 2]) + timelines(2, [1, 8]),
    ),
)


def trained_chunks(rng: np.random.Generator, stage: Stage, timeline: Timeline) -> list[int]:
    """Indices of the chunks of a clip that are trained: see `TRAINED` and `Stage.waiting`."""
    chunks = stage.chunks
    back = timeline.returns_within(chunks - 1)
    first = [int(rng.choice(back))] * 2 if back else []
    chosen = [*first, first[0] + 1] if first else []
    others = [index for index in range(chunks) if index not in chosen]
    if stage.waiting and back and rng.random() < stage.waiting:
        others = waiting_chunks(timeline, chunks)
    return chosen + [int(index) for index in rng.choice(others, TRAINED - len(chosen), replace=False)]


def waiting_chunks(timeline: Timeline, chunks: int) -> list[int]:
    """The chunks of a clip of that length in which digits are waited for."""
    return [index for index, (_, marks) in enumerate(islice(timeline.chunks(), chunks)) if marks]


def seen_frames(spec: ModelSpec, rng: np.random.Generator, chunk: int, dropped: float) -> list[int]:
    """The frames before a chunk that it sees: all that the model attends to, or some, the newest among them.

    Else digits that come back are copied from the one frame that shows them in the same place, and a view of
    them in any other frame is of no use.
    """
    frames = list(frames_before(spec, chunk))
    if rng.random() >= dropped:
        return frames
    kept = rng.random(len(frames)) < rng.uniform(*KEPT)
    return [frame for frame, keep in zip(frames, kept, strict=True) if keep or frame == frames[-1]]


class Batch(NamedTuple):
    """What one step trains."""

    tensors: dict[str, Tensor]
    trained: list[int]
    """Indices of the chunks."""
    seen: list[list[int]]
    """Frames that each of them sees before it."""


def make_batch(spec: ModelSpec, rng: np.random.Generator, stage: Stage) -> Batch:
    """Clips of one timeline: all chunks but the last as context, then those that are trained, noisy."""
    timeline = stage.timelines[rng.integers(len(stage.timelines))]
    clips = [make_clip(rng, timeline, stage.chunks, "train") for _ in range(stage.batch)]
    trained = trained_chunks(rng, stage, timeline)
    seen = [seen_frames(spec, rng, index, stage.dropped) for index in trained]
    returns = timeline.returns_within(stage.chunks)
    back = np.isin(trained, [*returns, *(index + 1 for index in returns)])
    chosen = [index * CHUNK + frame for index in trained for frame in range(CHUNK)]
    every = np.stack([clip.frames for clip in clips])[:, None]
    clean, before = every[:, :, chosen], every[:, :, : (stage.chunks - 1) * CHUNK]
    waits = waiting_chunks(timeline, stage.chunks) if stage.waiting else []
    centre = np.where(np.isin(trained, [0, *returns, *waits]), 1.5, 0.7)
    sigmas = 1 / (1 + np.exp(-(rng.standard_normal((stage.batch, TRAINED)) * 1.3 + centre)))
    level = np.repeat(sigmas, CHUNK, 1)[:, None, :, None, None]
    noise = rng.standard_normal(clean.shape)
    blur = rng.uniform(0, CONTEXT_NOISE, (stage.batch, 1, before.shape[2], 1, 1))
    context = (1 - blur) * before + blur * rng.standard_normal(before.shape)
    times = np.concatenate([np.zeros((stage.batch, stage.chunks - 1)), 1000 * sigmas], 1)
    shown = np.stack([clip.shown for clip in clips])[:, None, chosen]
    data = {
        "latents": np.concatenate([context, (1 - level) * clean + level * noise], 2),
        "flow": noise - clean,
        "digits": shown & np.repeat(back, CHUNK)[:, None, None],
        "time": positions.time_features(spec, times),
        "text": np.concatenate([encode_words(spec, clip.prompt) for clip in clips]),
    }
    return Batch(
        {name: torch.from_numpy(np.asarray(a, np.float32)) for name, a in data.items()}, trained, seen
    )


def loss_of(model: WanModel, stage: Stage, batch: Batch) -> Tensor:
    """Each trained chunk's share of the loss, (TRAINED,): weighted mean squared error of the flow."""
    spec, (data, trained, seen) = model.spec, batch
    size = spec.geometry().frame_tokens * CHUNK
    tables = positions.rotary(spec, spec.geometry(), 0, stage.chunks * CHUNK)
    given = [*range(stage.chunks - 1), *trained]
    tokens = [index * size + token for index in given for token in range(size)]
    cosines, sines = (torch.from_numpy(table[tokens]) for table in tables)
    attend = TeacherForcing(spec, stage.chunks - 1, seen)
    prompt = model.prompt(data["text"])
    flow, _ = model(data["latents"], data["time"], (cosines, sines), prompt, attend)
    error = (flow[:, :, -TRAINED * CHUNK :] - data["flow"]).square()
    weights = 1 + (BACK_WEIGHT - 1) * data["digits"]
    shares: Tensor = torch.unflatten(error * weights, 2, (TRAINED, CHUNK)).sum((0, 1, 3, 4, 5))
    mean: Tensor = shares / weights.sum()
    return mean


def begin(spec: ModelSpec) -> WanModel:
    """The demo model's weights; words, which mean other things here, drawn anew."""
    torch.manual_seed(SEED)
    demo = load_spec("demo")
    model = WanModel(spec)
    model.load_state_dict(dict(load_weights(demo)))
    table = model.get_parameter("text_embedding.0.weight").data
    old, words = len(demo.text.vocabulary), len(spec.text.vocabulary)
    places = table[:, old : old + spec.text_length].clone()
    torch.nn.init.xavier_uniform_(table)
    table[:, words : words + spec.text_length] = places
    return model


def train(out: Path) -> None:
    """Train to the end of `STAGES`, from the last checkpoint in `out` if there is one."""
    spec = load_spec("demo-occluded")
    model = begin(spec)
    trainer = Trainer(model, SEED)
    compile_blocks(model)

    def parts_of(stage: Stage) -> list[Part]:
        return [lambda generator: loss_of(model, stage, make_batch(spec, generator, stage))]

    def row(stage: Stage, shares: Tensor) -> str:
        back = float(shares[:2].mean())
        return f"{stage.chunks},{float(shares.sum()):.5f},{back * TRAINED:.5f}"

    train_stages(out, trainer, STAGES, parts_of, "chunks,loss,back", row, SAVE_EVERY)


if __name__ == "__main__":
    train_or_draw(__doc__, train, "back", "digits come back", 0.003)
