"""Runs the kernels in Triton's interpreter, on the CPU.

In a process of its own: whether kernels are interpreted or compiled is settled when Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forcingkv.models.wan import KeysValues
from forcingkv.prune.launcher import SELECT_GRID, compact_grid, cosine_grid
from forcingkv.runtime.kv.segments import Split

Bits = npt.NDArray[Any]

GUARD, GUARDED = 1 << 12, -7.0
"""Numbers on each side of a tensor that no kernel may read, and what they are."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a launch, and how much a program does."""

    frame_tokens: int
    segments: int
    kept: int
    cosine_block: int
    select_block: int
    compact_block: int
    candidates: int
    """The constant CANDIDATES, a power of two."""

    @property
    def split(self) -> Split:
        return Split(self.frame_tokens, self.segments)

    @property
    def segment_tokens(self) -> int:
        """What is kept of a segment."""
        return self.frame_tokens // self.segments

    @property
    def numbers(self) -> list[int]:
        """What a kernel is told of how frames are split."""
        return [self.segment_tokens] if self.split.is_even else [self.frame_tokens, self.segments]


@contextmanager
def interpreter() -> Iterator[Executor]:
    """The process."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_interpret) as pool:
        yield pool


def prune(
    pool: Executor, transition: KeysValues, new: KeysValues, sizes: Sizes
) -> tuple[Tensor, Tensor, KeysValues]:
    """Cosines, indices, and retained keys and values, from the three kernels."""
    tensors = [bits(tensor).numpy() for tensor in (*transition, *new)]
    dtype = new.keys.dtype
    cosines, indices, *retained = pool.submit(_prune, tensors, dtype, sizes).result()
    keys, values = (torch.from_numpy(kept).view(dtype) for kept in retained)
    return torch.from_numpy(cosines), torch.from_numpy(indices), KeysValues(keys, values)


def select(pool: Executor, cosines: Tensor, segment_tokens: int, kept: int) -> list[int]:
    """Indices from cosines alone."""
    candidates = len(cosines) // segment_tokens
    return list(pool.submit(_select, cosines.numpy(), [segment_tokens], candidates, kept, {}).result())


def select_uneven(pool: Executor, cosines: Tensor, split: Split, kept: int) -> list[int]:
    """Indices from cosines alone, of frames whose segments have not as many tokens each."""
    numbers = [split.frame_tokens, split.segments]
    candidates = len(cosines) // split.frame_tokens * split.segments
    return list(pool.submit(_select, cosines.numpy(), numbers, candidates, kept, {}).result())


def collect(pool: Executor, tensors: Sequence[Tensor], indices: list[int], sizes: Sizes) -> list[Tensor]:
    """Retained keys and values, in float32, of segments with those indices, whatever they are.

    `tensors`: transition keys and values, new keys and values. Each lies between others, full of `GUARDED`.
    """
    arrays = [tensor.numpy() for tensor in tensors]
    return [torch.from_numpy(kept) for kept in pool.submit(_collect, arrays, indices, sizes).result()]


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: what is equal in these is equal to the bit."""
    return tensor.view(INTEGERS[tensor.element_size()])


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set[int]()

    def patched_once(function: Any) -> object:
        """The language stays that of the interpreter: it would be found and replaced for every call."""
        module = id(function.__globals__)
        if module not in patched:
            patch(function)
            patched.add(module)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched_once


def _prune(tensors: list[Bits], dtype: torch.dtype, sizes: Sizes) -> list[Bits]:
    from forcingkv.prune import triton_kernels

    transition_keys, transition_values, new_keys, new_values = (
        torch.from_numpy(array).view(dtype) for array in tensors
    )
    _, heads, new_tokens, width = new_keys.shape
    transition_tokens = transition_keys.shape[2]
    candidate_tokens = transition_tokens + new_tokens - sizes.frame_tokens
    cosines = torch.full((candidate_tokens,), torch.nan)
    triton_kernels.token_cosines[cosine_grid(sizes.frame_tokens, candidate_tokens, sizes.cosine_block)](
        transition_keys,
        new_keys,
        cosines,
        heads,
        transition_tokens,
        new_tokens,
        sizes.frame_tokens,
        WIDTH=width,
        BLOCK=sizes.cosine_block,
    )
    constants = {"CANDIDATES": sizes.candidates, "BLOCK": sizes.select_block}
    candidates = candidate_tokens // sizes.frame_tokens * sizes.segments
    indices = torch.from_numpy(_select(cosines.numpy(), sizes.numbers, candidates, sizes.kept, constants))
    tensors_of = transition_keys, transition_values, new_keys, new_values
    retained = _copied(tensors_of, indices, sizes)
    return [cosines.numpy(), indices.numpy(), *(bits(kept).numpy() for kept in retained)]


def _copied(tensors: Sequence[Tensor], indices: Tensor, sizes: Sizes) -> list[Tensor]:
    """Retained keys and values of the segments with those indices."""
    from forcingkv.prune import triton_kernels

    batch, heads, new_tokens, width = tensors[2].shape
    shape = (batch, heads, sizes.kept * sizes.segment_tokens, width)
    retained = [torch.zeros(shape, dtype=tensors[2].dtype) for _ in range(2)]
    grid = compact_grid(batch, heads, sizes.segment_tokens, sizes.kept, sizes.compact_block)
    even = sizes.split.is_even
    compact = triton_kernels.compact_segments if even else triton_kernels.compact_uneven_segments
    compact[grid](
        *tensors,
        indices,
        *retained,
        tensors[0].shape[2],
        new_tokens,
        *sizes.numbers,
        sizes.kept,
        WIDTH=width,
        BLOCK=sizes.compact_block,
    )
    return retained


def _collect(tensors: list[Bits], indices: list[int], sizes: Sizes) -> list[Bits]:
    guarded = []
    for array in tensors:
        flat = torch.full((array.size + 2 * GUARD,), GUARDED, dtype=torch.float32)
        inner = flat[GUARD : GUARD + array.size].view(array.shape)
        inner.copy_(torch.from_numpy(array))
        guarded.append(inner)
    return [kept.numpy() for kept in _copied(guarded, torch.tensor(indices), sizes)]


def _select(
    cosines: Bits, numbers: list[int], candidates: int, kept: int, constants: Mapping[str, int]
) -> Bits:
    from forcingkv.prune import triton_kernels

    # One place more than is asked for: a kernel that writes past its output shows.
    indices = torch.full((kept + 1,), -1)
    even = len(numbers) == 1
    kernel = triton_kernels.select_segments if even else triton_kernels.select_uneven_segments
    kernel[SELECT_GRID](
        torch.from_numpy(cosines),
        indices,
        *numbers,
        candidates,
        kept,
        **{"CANDIDATES": 64, "BLOCK": 64} | constants,
    )
    assert indices[-1] == -1
    return np.asarray(indices[:-1])
