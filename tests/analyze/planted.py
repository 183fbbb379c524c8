"""A model whose heads are built static, dynamic, or switching with the denoising step.

Nothing is mocked: the weights go into the ordinary `WanModel`, which generates videos as any other. The
input of a block's self-attention is `normed(x) * (1 + scale) + shift`. Here

- one channel for each role carries no content (1 + scale = 0) and has the shift +1 or -1: the sign that the
  role has at that denoising step. `time_projection` is solved for these shifts, see `_time_projection`;
- 1 + scale of every other channel is `content`, and its shift is 0.

A head's query is its role's channel times a vector v, its key is v (a bias); v lies in the slow time pair of
the rotary embedding, which turns by `TURN` a frame, and in no spatial pair. Small random weights add content
to both. So without content the logit of a key D frames before the query is

    sign(role, step) * amplitude(layer) * cos(TURN * D + LEAN)

(`logits`), which falls with D as far as the video reaches: with +1 a head prefers the newest frames and is
static, with -1 the oldest and is dynamic.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.checkpoint import Weights, random_weights
from forcingkv.runtime.positions import time_features
from forcingkv.runtime.spec import ModelSpec, Schedule
from tests.conftest import small_spec

__all__ = ["CHUNKS", "ROLES", "amplitude", "logits", "planted"]

ROLES = {"static": (1, 1, 1, 1), "dynamic": (-1, -1, -1, -1), "switching": (1, 1, 1, -1)}
"""Role -> its sign at each denoising step."""

CHUNKS = 5
TURN = math.pi / 16
LEAN = 2 * TURN
"""Radians a frame, and radians from key to query. A key lies 14 frames before its query at most (the first of
the video's 15, for the last) and 2 frames after it (in the chunk of 3), so the cosine falls all the way, from
that of 0 to that of pi."""

HEAD_DIM = 12
SLOW_PAIR = 1
"""Of the pairs of a head of 12 the first two are those of time; they turn by 1 and by rope_theta^(-1/2)."""


def planted(roles: list[list[str]], seed: int, content: float = 0.2) -> tuple[ModelSpec, Weights]:
    """The model whose head h of layer l has the role `roles[l][h]`.

    Args:
        roles: a row for each layer, names of `ROLES`.
        seed: of all weights that are not planted.
        content: how much of a token's content reaches queries, keys and values; 0: none, then `logits`
            holds exactly.
    """
    spec = small_spec(
        name="planted",
        layers=len(roles),
        heads=len(roles[0]),
        head_dim=HEAD_DIM,
        rope_theta=TURN**-2,
        width=6,
        height=4,
        schedule=Schedule((1000.0, 750.0, 500.0, 250.0)),
    )
    drawn = random_weights(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {"time_projection.1.weight": _time_projection(spec, drawn)}
    tensors["time_projection.1.bias"] = torch.zeros(drawn.shapes["time_projection.1.bias"])
    for layer, row in enumerate(roles):
        name = f"blocks.{layer}"
        tensors[f"{name}.modulation"] = _modulation(drawn[f"{name}.modulation"], content)
        phases = torch.rand(spec.heads, generator=generator) * 2 * math.pi
        queries, keys = _directions(phases + LEAN), _directions(phases)
        for part in "qkv":
            weight = drawn[f"{name}.self_attn.{part}.weight"].clone()
            weight[:, : len(ROLES)] = 0
            tensors[f"{name}.self_attn.{part}.weight"] = weight
        for head, role in enumerate(row):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            tensors[f"{name}.self_attn.q.weight"][rows, list(ROLES).index(role)] = queries[head]
        tensors[f"{name}.self_attn.q.bias"] = torch.zeros(spec.dim)
        tensors[f"{name}.self_attn.k.bias"] = keys.flatten()
        # Vectors v have RMS 1, so the norm leaves them; its weights set the amplitude.
        sharpness = amplitude(layer) / HEAD_DIM**0.5
        tensors[f"{name}.self_attn.norm_q.weight"] = torch.full((spec.dim,), sharpness)
    return spec, Weights(drawn.shapes, lambda name: tensors.get(name, drawn[name]))


def amplitude(layer: int) -> float:
    """Of the logits. Deeper layers are blunter, so the head that is least static is never in layer 0."""
    return 8.0 - 0.5 * layer


def logits(role: str, step: int, layer: int, distance: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Logits of keys that lie so many frames before the query, without content."""
    cosines: npt.NDArray[np.float64] = np.cos(TURN * distance + LEAN)
    return ROLES[role][step] * amplitude(layer) * cosines


def _directions(phases: Tensor) -> Tensor:
    """(heads, head_dim): unit-RMS vectors in the slow time pair, at those angles."""
    vectors = torch.zeros(len(phases), HEAD_DIM)
    vectors[:, 2 * SLOW_PAIR] = phases.cos() * HEAD_DIM**0.5
    vectors[:, 2 * SLOW_PAIR + 1] = phases.sin() * HEAD_DIM**0.5
    return vectors


def _modulation(drawn: Tensor, content: float) -> Tensor:
    """A block's own part of shift, scale and gate (1, 6, dim), of self-attention and feed-forward."""
    modulation = drawn.clone()
    shift1, scale1, gate1, _, _, gate2 = modulation[0]
    shift1.zero_()
    scale1.fill_(content - 1)
    scale1[: len(ROLES)] = -1
    gate1.fill_(0.5)
    gate2.fill_(0.5)
    return modulation


def _time_projection(spec: ModelSpec, drawn: Weights) -> Tensor:
    """The weight with which the shift of channel i is the sign of role i at each step; all else is 0.

    What `time_projection` multiplies is a known vector at each timestep of the schedule; there are fewer of
    them than channels, so the least squares solution is exact. The clean pass is given the last step's signs.
    """
    schedule = spec.schedule
    times = (*schedule.later.timesteps, schedule.context_timestep)
    hidden = torch.from_numpy(time_features(spec, np.array(times)))
    for layer in (0, 2):
        name = f"time_embedding.{layer}"
        hidden = F.silu(F.linear(hidden, drawn[f"{name}.weight"], drawn[f"{name}.bias"]))
    wanted = torch.tensor([(*signs, signs[-1]) for signs in ROLES.values()], dtype=torch.float64)
    weight = torch.zeros(drawn.shapes["time_projection.1.weight"])
    weight[: len(ROLES)] = wanted @ torch.linalg.pinv(hidden.double()).T
    return weight
