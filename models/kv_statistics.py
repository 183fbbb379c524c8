"""Scores of keys by statistics of queries: the formula of TriAttention, in parts that cost little.

With q the mean query of a rotary pair as a complex number, |q|* the mean of its size, and k a key before
rotation, a key that lies D frames before the next chunk is worth

    sum over pairs  mean over d of Re(q conj(k) exp(i w (D + d)))  +  (|q|* - |q|) |k|

where w is 0 for pairs of rows and columns, and d is 1, 2, 4, ..., 128 frames. (docs/method.md, "Tokens by a
score".) The mean over d is a factor of its own; of a key as it is cached, rotated by its frame, only the
position of the next chunk matters, not its own; and what rows, columns and sizes add never changes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forcingkv.models.kv_constants import constant
from forcingkv.models.kv_roles import CleanPass
from forcingkv.runtime import positions
from forcingkv.runtime.kv.statistics import AHEAD, QueryStatistics, required_statistics
from forcingkv.runtime.positions import Floats


def lasting_worth(done: CleanPass, keys: Tensor) -> Tensor:
    """What pairs of rows and columns, and the sizes of all pairs add to the worth of whole frames' keys
    (batch, heads, tokens, head_dim) as they are cached: float32 (batch, heads, tokens)."""
    spec, frame = done.plan.spec, done.plan.frame_tokens
    time = spec.rotary_pairs[0]
    assert done.rotary is not None, "what the chunk's keys were rotated by is asked for"
    cosines, sines = (table[:frame, time:].float() for table in done.rotary)
    real, imaginary = (_constant(done, part)[:, None, time:] for part in ("real", "imaginary"))
    # The mean query of each place, rotated as its keys are: (heads, frame tokens, 2 * pairs).
    turned = real * cosines - imaginary * sines, real * sines + imaginary * cosines
    queries = torch.stack(turned, -1).flatten(2)
    by_frame = torch.unflatten(keys.float(), 2, (-1, frame))
    met = (by_frame[..., 2 * time :] * queries[:, None]).sum(-1).flatten(2)
    sizes = torch.linalg.vector_norm(torch.unflatten(keys.float(), -1, (-1, 2)), dim=-1)
    worth: Tensor = met + (sizes * _constant(done, "left")[:, None]).sum(-1)
    return worth


def worth_in_time(done: CleanPass, keys: Tensor) -> Tensor:
    """What pairs of time add to the worth of keys as they are cached: float32 (batch, heads, tokens)."""
    time = done.plan.spec.rotary_pairs[0]
    assert done.rotary is not None, "what the chunk's keys were rotated by is asked for"
    cosines, sines = (table[:1, :time].float() for table in done.rotary)
    real, imaginary = (_constant(done, part) for part in ("real to come", "imaginary to come"))
    turned = real * cosines - imaginary * sines, real * sines + imaginary * cosines
    query = torch.stack(turned, -1).flatten(1)
    return (keys[..., : 2 * time].float() * query[:, None]).sum(-1)


def _constant(done: CleanPass, part: str) -> Tensor:
    """Numbers of the group's heads: float32 (heads, pairs), or (heads, pairs of time) of what is to come."""
    statistics = required_statistics(done.plan)
    assert statistics is not None, "this role scores by them"
    group, layer = done.group, done.layer

    def make() -> Floats:
        heads = done.plan.orders[layer][group.start : group.stop]
        return np.ascontiguousarray(_numbers(done, statistics, heads)[part], np.float32)

    key = statistics.digest, layer, done.plan.orders[layer], group.start, group.stop
    frames, spec = done.plan.spec.frames_per_chunk, done.plan.spec
    return constant((part, *key, frames, spec.rotary_pairs, spec.rope_theta), done.new.keys.device, make)


def _numbers(done: CleanPass, statistics: QueryStatistics, heads: tuple[int, ...]) -> dict[str, Floats]:
    spec = done.plan.spec
    mean, size = statistics.of_heads(done.layer, heads)
    time = spec.rotary_pairs[0]
    # What turns a query from the chunk's first frame to those that are to come, on average.
    turns = [_turn(spec.frames_per_chunk + ahead, time, spec.rope_theta) for ahead in AHEAD]
    to_come = mean[:, :time] * np.mean(turns, 0)
    return {
        "real": mean.real,
        "imaginary": mean.imag,
        "left": np.maximum(size - np.abs(mean), 0),
        "real to come": to_come.real,
        "imaginary to come": to_come.imag,
    }


def _turn(frames: float, pairs: int, theta: float) -> npt.NDArray[np.complex128]:
    turn: npt.NDArray[np.complex128] = np.exp(1j * positions.angles_of(np.array([frames]), pairs, theta)[0])
    return turn
