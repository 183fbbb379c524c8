"""What moving cached keys with the window costs in accuracy: keys turned by differences, again and again.

    python studies/moved_keys.py [--chunks 1000]

Two tables, in float32 and in bfloat16, of relative errors (norms of all keys) against keys that are rotated
in float64 for the position they have now. `once` is the error of keys that are rotated afresh and rounded:
what any way of caching them has. First the caches of windows with a sink of 3 frames (LongLive's: 12 frames
in chunks of 3), the worst chunk; then keys that no role of today keeps, turned by -3 frames as many times as
there are chunks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from forcingkv.models.kv import advance, empty_cache, turn_of
from forcingkv.models.kv_roles import Turn, turned
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import KeysValues, rotate
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.window import first_position

DTYPES = torch.float32, torch.bfloat16
WINDOWS = ((12, 3), (21, 3), (21, 1))
"""Frames of a window and of a chunk: of LongLive, of Self Forcing, and of frame-wise models."""
COUNTED = (1, 2, 6, 10, 100, 1000, 10_000)
"""Turns after which the second table has a row."""


class Errors(NamedTuple):
    """Relative errors of keys that were moved, and of the same keys rotated afresh."""

    moved: float
    once: float


def plan_of(frames: int, chunk: int) -> CachePlan:
    """A window of so many frames in chunks of so many, sink 3: two of LongLive's heads, and frames of
    16 tokens."""
    preset = replace(load_spec("longlive"), positions="relative", layers=1, heads=2)
    spec = replace(preset, attended_frames=frames, frames_per_chunk=chunk)
    return build_plan(spec, spec.geometry("64x64"), load_policy("full"))


def exactly(raw: Tensor, plan: CachePlan, position: int) -> Tensor:
    """Keys of a frame (1, heads, tokens, head_dim), rotated for a position in float64."""
    spec, (rows, columns) = plan.spec, plan.geometry.grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    angles = []
    for place, pairs in zip(
        (torch.full((len(places),), float(position)).double(), *places.T), spec.rotary_pairs, strict=True
    ):
        angles.append(place[:, None] * spec.rope_theta ** (-torch.arange(pairs).double() / pairs))
    table = torch.cat(angles, 1)
    return rotate(raw.double(), table.cos(), table.sin())


def as_the_model_makes_them(raw: Tensor, plan: CachePlan, position: int, dtype: torch.dtype) -> Tensor:
    """The same as a pass gives them: rotated in float32, then rounded."""
    tables = positions.rotary(plan.spec, plan.geometry, position, 1)
    return rotate(raw.float(), *map(torch.from_numpy, tables)).to(dtype)


def rolling(plan: CachePlan, dtype: torch.dtype, chunks: int) -> Errors:
    """The worst chunk of a video: all keys that the cache holds after it."""
    spec, group = plan.spec, plan.layers[0][0]
    generator = torch.Generator().manual_seed(0)
    shape = 1, spec.heads, plan.frame_tokens, spec.head_dim
    cache, raw, worst = empty_cache(plan, torch.zeros((), dtype=dtype)), [], Errors(0.0, 0.0)
    for chunk in range(chunks):
        first, frames = first_position(plan, chunk, chunk), range(spec.frames_per_chunk)
        raw += [torch.randn(shape, generator=generator).to(dtype) for _ in frames]
        newest = raw[-spec.frames_per_chunk :]
        keys = torch.cat(
            [as_the_model_makes_them(x, plan, first + n, dtype) for n, x in enumerate(newest)], 2
        )
        turn = turn_of(plan, chunk, torch.device("cpu"))
        cache, _ = advance(plan, cache, [KeysValues(keys, keys)], chunk=chunk, turn=turn)
        found, wanted = [], []
        own, begin = first_position(plan, chunk + 1, chunk + 1), (chunk + 1) * spec.frames_per_chunk
        for role in group.roles:
            found.append(cache[0][0][role.name].keys)
            for span in role.spans(plan, group, chunk + 1, None):
                at = own - (begin - span.frame) if role.moves else span.frame
                wanted.append(exactly(raw[span.frame], plan, at))
        errors = errors_of(torch.cat(found, 2), torch.cat(wanted, 2))
        worst = Errors(*map(max, zip(worst, errors, strict=True)))
    return worst


def again_and_again(dtype: torch.dtype, turns: int) -> dict[int, Errors]:
    """Keys turned by -3 frames, as many times."""
    plan = plan_of(12, 3)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(1, 64, plan.frame_tokens, plan.spec.head_dim, generator=generator).to(dtype)
    turn = Turn(*map(torch.from_numpy, positions.turn(plan.spec, -3)))
    keys, found = as_the_model_makes_them(raw, plan, 9, dtype), {}
    for count in range(1, turns + 1):
        keys = turned(keys, turn)
        if count in COUNTED or count == turns:
            found[count] = errors_of(keys, exactly(raw, plan, 9 - 3 * count))
    return found


def errors_of(keys: Tensor, wanted: Tensor) -> Errors:
    """Of keys, and of what they would be if they were rounded once."""
    return Errors(*(float((one.double() - wanted).norm() / wanted.norm()) for one in (keys, wanted.to(keys))))


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1000)
    chunks = parser.parse_args().chunks
    print(f"keys in a rolling window, worst of {chunks} chunks")
    for frames, chunk in WINDOWS:
        for dtype in DTYPES:
            moved, once = rolling(plan_of(frames, chunk), dtype, chunks)
            window = f"{frames} frames in chunks of {chunk}"
            print(f"  {window:<28}{dtype!s:<16} moved {moved:.1e}   once {once:.1e}")
    print("keys turned by -3 frames again and again")
    for dtype in DTYPES:
        for count, (moved, once) in again_and_again(dtype, chunks).items():
            print(f"  {dtype!s:<16} {count:>6} times   moved {moved:.1e}   once {once:.1e}")


if __name__ == "__main__":
    main()
