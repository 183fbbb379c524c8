"""Launching the kernels of a bundle: they are compiled ahead of time, so this needs no Triton.

How much one program of a kernel does, and how many programs there are, stands here too: launches have it in
common with the compilation, the quick plugins and the tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import inside
from forcingkv.runtime.engines import KernelName, KernelRecord, cuda_core
from forcingkv.runtime.kv.segments import Split

Grid: TypeAlias = tuple[int, int, int]

KERNELS: tuple[KernelName, ...] = ("token_cosines", "select_segments", "compact_segments")
"""In the order of their launches, for frames whose segments have as many tokens each."""
UNEVEN_KERNELS: tuple[KernelName, ...] = (
    "token_cosines",
    "select_uneven_segments",
    "compact_uneven_segments",
)
"""The same for all other frames (`runtime.kv.segments`)."""

SMS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels can be compiled for. Their cubins run on later minor versions too."""

COSINE_BLOCK = 16
"""Tokens that one program of `token_cosines` compares."""
SELECT_BLOCK = 64
"""Tokens of a segment that `select_segments` reads at a time."""
COMPACT_BLOCK = 32
"""Tokens that one program of `compact_segments` copies."""
MAX_CANDIDATES = 64
"""Segments that `select_segments` can choose from: 6 segments of up to 10 frames, with some to spare."""
ALIGNMENT = 16
"""Bytes that every pointer is a multiple of: the kernels read and write that much at once."""
KEPT_STREAMS, KEPT_CONFIGS = 16, 256
"""Streams and launch configurations that a launcher remembers: sessions have two streams each, and kernels a
configuration for each phase and number of heads."""


@dataclass(frozen=True)
class LaunchSizes:
    """The sizes of one layer's keys and values (batch, heads, tokens, width) and of the choice."""

    batch: int
    heads: int
    transition_tokens: int
    """0 without a transition frame, whose pointers the kernels are then given as 0."""
    new_tokens: int
    segment_tokens: int
    """What is kept of a segment."""
    kept: int
    frame_tokens: int = 0
    """Only scoring needs it: 0 for layers that follow."""
    uneven: Split | None = None
    """How frames are split whose segments have not as many tokens each."""

    @property
    def candidate_tokens(self) -> int:
        """Tokens of all frames but the last: those that have one a frame later to be compared with."""
        return self.transition_tokens + self.new_tokens - self.frame_tokens

    @property
    def candidates(self) -> int:
        """Segments to choose from."""
        if self.uneven:
            return self.candidate_tokens // self.uneven.frame_tokens * self.uneven.segments
        return self.candidate_tokens // self.segment_tokens

    @property
    def workspace_bytes(self) -> int:
        """Bytes that scoring needs for its cosines, in float32; 0 for layers that follow."""
        return 4 * self.candidate_tokens if self.frame_tokens else 0


def cosine_grid(frame_tokens: int, candidate_tokens: int, block: int = COSINE_BLOCK) -> Grid:
    """Programs of `token_cosines`: blocks of a frame, candidate frames."""
    return -(-frame_tokens // block), candidate_tokens // frame_tokens, 1


SELECT_GRID: Grid = 1, 1, 1
"""Programs of `select_segments`: one, since it is one small choice."""


def compact_grid(batch: int, heads: int, segment_tokens: int, kept: int, block: int = COMPACT_BLOCK) -> Grid:
    """Programs of `compact_segments`: blocks of the kept segments, heads, keys and values."""
    return kept * -(-segment_tokens // block), batch * heads, 2


def check_candidates(candidates: int) -> None:
    """Raises InputError if there are more segments to choose from than the kernel can take."""
    if candidates > MAX_CANDIDATES:
        raise InputError(
            f"has {candidates} segments to choose the retained ones from",
            where="the policy",
            expected=f"at most {MAX_CANDIDATES}",
            hint="Split frames into fewer segments.",
        )


def best_sm(compiled: Sequence[int], sm: int) -> int | None:
    """Of compute capabilities that kernels are compiled for the one whose cubins a GPU `sm` runs best.

    Cubins run on GPUs of the same major version and the same or a higher minor one. None if it runs none.
    """
    return max((known for known in compiled if sm // 10 * 10 <= known <= sm), default=None)


def kernel_sms(sms: Sequence[int]) -> tuple[int, ...]:
    """What kernels are compiled for so that the GPUs `sms` run them: of `SMS`, each once, ascending.

    Raises InputError for a GPU that runs none of those.
    """
    chosen = {sm: best_sm(SMS, sm) for sm in sms}
    for sm, found in chosen.items():
        if found is None:
            raise InputError(
                "has no kernels that choose segments",
                where=f"sm_{sm}",
                expected=f"a GPU that runs those for {', '.join(f'sm_{known}' for known in SMS)}",
                hint="For this one use a policy that retains no segments, such as window.",
            )
    return tuple(sorted({found for found in chosen.values() if found}))


class KernelLauncher:
    """The kernels of a bundle, loaded for one GPU.

    Pointers are addresses in the GPU's memory, and `stream` is the handle of the stream to launch in. The
    CUDA device must have been set up before (`cuda.core.Device().set_current()`).

    Attributes:
        dtype: of keys and values.
        width: of a head.
        uneven: whether the kernels are those for uneven segments.
        digest: the same for the same kernels.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[KernelRecord],
        sm: int,
        content: Callable[[str], bytes] | None = None,
    ) -> None:
        """Load the kernels of the bundle in `folder` that run on compute capability `sm`, 89 for 8.9.

        `content` gives what is in a file of it, checked (`Bundle.content`); None: it is read here.

        Raises InputError where there are none, MissingExtraError where cuda-core is not installed.
        """
        sms = sorted({record.sm for record in records})
        chosen = best_sm(sms, sm)
        if chosen is None:
            there = ", ".join(f"sm_{known}" for known in sms)
            raise InputError(
                f"holds no kernels that run on sm_{sm}",
                where=str(folder),
                expected=f"a GPU that runs those for {there}" if there else "a bundle with kernels",
                hint="Export the bundle again for this GPU.",
            )
        self._records = {record.kernel: record for record in records if record.sm == chosen}
        kinds = {(record.dtype, record.width) for record in records}
        self.uneven = set(self._records) == set(UNEVEN_KERNELS)
        if len(kinds) > 1 or not (self.uneven or set(self._records) == set(KERNELS)):
            raise ValueError(
                f"{folder} lacks a kernel, or mixes dtypes or widths: there are {sorted(self._records)}"
                f" for sm_{chosen}, and kernels of {sorted(kinds)}"
            )
        self.dtype, self.width = kinds.pop()
        self._cuda = cuda_core()
        self._kernels: dict[KernelName, Any] = {}
        digest = hashlib.sha256()
        for name, record in self._records.items():
            path = inside(folder, record.file)
            if not path.is_file():
                raise InputError("is missing", where=str(path), hint="Export the bundle again.")
            cubin = content(record.file) if content else path.read_bytes()
            digest.update(f"{replace(record, file='')}{len(cubin)}".encode() + cubin)
            self._kernels[name] = self._cuda.ObjectCode.from_cubin(cubin).get_kernel(record.symbol)
        self.digest = digest.digest()
        cuda, loaded = self._cuda, self._records
        # cuda-core makes a class for each handle it is given, and a pass has some 30 launches.
        self._stream = lru_cache(KEPT_STREAMS)(cuda.Stream.from_handle)

        @lru_cache(KEPT_CONFIGS)
        def config(name: KernelName, grid: Grid) -> Any:
            block = 32 * loaded[name].warps, 1, 1
            return cuda.LaunchConfig(grid=grid, block=block, shmem_size=loaded[name].shared_bytes)

        self._config = config

    def score(
        self, transition_keys: int, new_keys: int, cosines: int, indices: int, sizes: LaunchSizes, stream: int
    ) -> None:
        """Choose the `kept` least similar segments: their indices (kept,) int64, ascending.

        `cosines` points to `sizes.workspace_bytes` of workspace. Batch item 0 decides. Raises InputError for
        more candidates than the kernel takes.
        """
        check_candidates(sizes.candidates)
        grid = cosine_grid(sizes.frame_tokens, sizes.candidate_tokens)
        numbers = [sizes.heads, sizes.transition_tokens, sizes.new_tokens, sizes.frame_tokens]
        pointers = [*_meant([transition_keys], sizes), new_keys, cosines]
        self._launch("token_cosines", grid, pointers, numbers, stream)
        name: KernelName = "select_uneven_segments" if sizes.uneven else "select_segments"
        numbers = [*_split_numbers(sizes), sizes.candidates, sizes.kept]
        self._launch(name, SELECT_GRID, (cosines, indices), numbers, stream)

    def collect(self, pointers: Sequence[int], sizes: LaunchSizes, stream: int) -> None:
        """Copy the chosen segments to retained keys and values (batch, heads, kept * tokens, width).

        `pointers`: transition keys and values, new keys and values, indices, retained keys and values.
        """
        grid = compact_grid(sizes.batch, sizes.heads, sizes.segment_tokens, sizes.kept)
        name: KernelName = "compact_uneven_segments" if sizes.uneven else "compact_segments"
        numbers = [sizes.transition_tokens, sizes.new_tokens, *_split_numbers(sizes), sizes.kept]
        self._launch(name, grid, [*_meant(pointers[:2], sizes), *pointers[2:]], numbers, stream)

    def _launch(
        self, name: KernelName, grid: Grid, pointers: Sequence[int], sizes: Sequence[int], stream: int
    ) -> None:
        if any(pointer % ALIGNMENT for pointer in pointers):
            raise ValueError(f"{name}: not all pointers are multiples of {ALIGNMENT}: {pointers}")
        # Every kernel of Triton's ends with two pointers to scratch memory, which these do not use.
        arguments = (*pointers, *map(np.int32, sizes), 0, 0)
        self._cuda.launch(self._stream(stream), self._config(name, grid), self._kernels[name], *arguments)


def _meant(transition: Sequence[int], sizes: LaunchSizes) -> list[int]:
    """Pointers to a transition frame: 0 where there is none. What TensorRT gives for an empty tensor is no
    address: null for some layers, and for others anything.
    """
    return [pointer if sizes.transition_tokens else 0 for pointer in transition]


def _split_numbers(sizes: LaunchSizes) -> list[int]:
    """What a kernel is told of how frames are split."""
    return [sizes.uneven.frame_tokens, sizes.uneven.segments] if sizes.uneven else [sizes.segment_tokens]
