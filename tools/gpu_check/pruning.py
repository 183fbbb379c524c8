"""DynamicPrune's kernels on cases of random keys: on the GPU, or else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from forcingkv.models.wan import KeysValues
from forcingkv.prune.launcher import (
    COMPACT_BLOCK,
    COSINE_BLOCK,
    MAX_CANDIDATES,
    SELECT_BLOCK,
    KernelLauncher,
    LaunchSizes,
)
from forcingkv.prune.reference import prune_score
from forcingkv.runtime.kv.segments import Split
from forcingkv.runtime.spec import Dtype
from tools.gpu_check.check import Check

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Pruned: TypeAlias = "tuple[Tensor, KeysValues]"
"""Indices, and retained keys and values."""


@dataclass(frozen=True)
class Case:
    """Sizes of keys, and what is in them."""

    dtype: Dtype
    width: int
    frame: int
    batch: int = 2
    heads: int = 5
    transition: int = 1
    """Frames of it: 0 or 1."""
    frames: int = 3
    segments: int = 6
    kept: int = 6
    holds: str = "random"
    """`random`; `ties`: all tokens have the same keys; `nan`: one segment has NaN."""

    @property
    def split(self) -> Split:
        """How frames are split."""
        return Split(self.frame, self.segments)

    @property
    def sizes(self) -> LaunchSizes:
        """Of its launches."""
        tokens = self.transition * self.frame, self.frames * self.frame
        uneven = None if self.split.is_even else self.split
        kept = self.split.kept_tokens, self.kept
        return LaunchSizes(self.batch, self.heads, *tokens, *kept, self.frame, uneven)

    def draw(self, device: str) -> tuple[KeysValues, KeysValues]:
        """Transition and new keys and values; the same on every machine."""
        generator = torch.Generator().manual_seed(self.frame + self.width)

        def of(frames: int) -> KeysValues:
            shape = (self.batch, self.heads, frames, self.frame, self.width)
            keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
            if self.holds == "ties" and frames:
                keys[:] = 0
                keys[:, 0, ..., 0] = 2  # the cosine of a token and a later one is 1, without rounding
            if self.holds == "nan" and frames == self.frames:
                keys[:, :, 0, : self.split.kept_tokens] = torch.nan
            placed = (
                tensor.flatten(2, 3).to(device, getattr(torch, self.dtype)) for tensor in (keys, values)
            )
            return KeysValues(*placed)

        return of(self.transition), of(self.frames)


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers on the host: NaN equals itself there."""
    return tensor.detach().cpu().contiguous().view(INTEGERS[tensor.element_size()])


def same(found: Pruned, wanted: Pruned) -> bool:
    """Whether two are equal to the bit."""
    pairs = zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True)
    return all(torch.equal(bits(one), bits(other)) for one, other in pairs)


def reference(case: Case, transition: KeysValues, new: KeysValues) -> Pruned:
    """What torch computes."""
    keys, values, indices = prune_score(*transition, *new, case.frame, case.segments, case.kept)
    return indices, KeysValues(keys, values)


def pruner(check: Check) -> tuple[str, Callable[[Case, KeysValues, KeysValues], Pruned]]:
    """The device that keys have to be on, and what runs the kernels on them."""
    if check.gpu:
        launchers: dict[Any, KernelLauncher] = {}

        def on_gpu(case: Case, transition: KeysValues, new: KeysValues) -> Pruned:
            key = case.dtype, case.width, case.split.is_even
            if key not in launchers:
                launchers[key] = launcher(check, *key[:2], uneven=not case.split.is_even)
            return launch(launchers[key], case, transition, new)

        return "cuda", on_gpu
    check.stands_in("Triton's interpreter")
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from tests.prune.interpreter import Sizes, prune

    def interpreted(case: Case, transition: KeysValues, new: KeysValues) -> Pruned:
        blocks = COSINE_BLOCK, SELECT_BLOCK, COMPACT_BLOCK, MAX_CANDIDATES
        sizes = Sizes(case.frame, case.segments, case.kept, *blocks)
        _, indices, kept = prune(Here(), transition, new, sizes)
        return indices, kept

    return "cpu", interpreted


def launcher(check: Check, dtype: Dtype, width: int, *, uneven: bool = False) -> KernelLauncher:
    """The kernels for this GPU, from the kit or compiled here; torch's context is made current."""
    torch.zeros(1, device="cuda")
    core().Device(0).set_current()
    folder, records = check.kit.kernels(dtype, width, check.machine.sm, uneven=uneven)
    return KernelLauncher(folder, records, check.machine.sm)


def core() -> Any:
    """The module `cuda.core`. Raises MissingExtraError without it."""
    from forcingkv.runtime.engines import cuda_core

    return cuda_core()


def launch(
    loaded: KernelLauncher, case: Case, transition: KeysValues, new: KeysValues, pointer: int | None = None
) -> Pruned:
    """Launch the kernels as the plugin does, on torch's current stream.

    `pointer` stands for those of a transition frame that is not there.
    """
    from forcingkv.prune.plugin import launch as launch_operator

    shape = (case.batch, case.heads, case.kept * case.split.kept_tokens, case.width)
    indices = torch.full((case.kept,), -1, dtype=torch.int64, device="cuda")
    retained = KeysValues(new.keys.new_zeros(shape), new.keys.new_zeros(shape))
    workspace = torch.empty(max(1, case.sizes.workspace_bytes // 4), device="cuda")
    inputs = [tensor.data_ptr() for tensor in (*transition, *new)]
    if pointer is not None:
        inputs[:2] = [pointer] * 2
    outputs = [tensor.data_ptr() for tensor in (*retained, indices)]
    stream = torch.cuda.current_stream().cuda_stream
    launch_operator(loaded, case.sizes, inputs, outputs, workspace.data_ptr(), stream)
    torch.cuda.synchronize()
    return indices, retained


def follow_sizes(case: Case) -> LaunchSizes:
    """Of a launch that collects alone."""
    return replace(case.sizes, frame_tokens=0)


class Here(Executor):
    """Does at once, in this process, what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Do it."""
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done
