"""The kernels of DynamicPrune in Triton, and their compilation ahead of time, for GPUs that need not be here.

The kernels (`token_cosines`, `select_segments`, `compact_segments`). Keys and values are (batch, heads,
tokens, WIDTH), contiguous. The candidates' tokens are those of the frames [transition frame, new 0, new 1,
...] but the last; the transition frame may be absent (0 tokens, any pointer). Offsets are 64-bit. What is
written in capitals is a constant of the compilation; WIDTH need not be a power of two. None uses atomics and
every sum has one order, so a launch repeated gives the same bits. How many programs a launch has: `launcher`.

The compilation. A cubin is what the GPU runs: launching it needs neither Triton nor a compiler. Triton writes
PTX, and its own ptxas assembles it here once more, for two reasons. Triton's target for compute capability
9.0 and up (sm_90a) gives cubins for that capability alone, while those for sm_120 run on sm_121 too. And
ptxas reports registers and spills.

Importing this raises MissingExtraError where Triton is not installed.
"""
# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import MissingExtraError
from forcingkv.headmaps.files import write_bytes
from forcingkv.prune.launcher import COMPACT_BLOCK, COSINE_BLOCK, KERNELS, MAX_CANDIDATES, SELECT_BLOCK
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.engines import KernelName, KernelRecord
from forcingkv.runtime.spec import Dtype

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    raise MissingExtraError("triton", "engines") from error

SMS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for by default: every GPU since Ampere runs one of them."""

_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@triton.jit
def token_cosines(
    transition_keys: tl.tensor,
    new_keys: tl.tensor,
    cosines: tl.tensor,
    heads: tl.int32,
    transition_tokens: tl.int32,
    new_tokens: tl.int32,
    frame_tokens: tl.int32,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """cosines[p]: between a candidate's token p and the one at its place a frame later, in float32.

    A token's vector is its keys of all heads side by side, of batch item 0. BLOCK tokens a program.
    """
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)  # noqa: N806
    column = tl.arange(0, COLUMNS)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (place < frame_tokens)[:, None] & (column < WIDTH)[None, :]
    spot = place.to(tl.int64)[:, None] * WIDTH + column[None, :]

    # A frame lies wholly in the one or the other tensor.
    first = tl.program_id(1) * frame_tokens
    old = first < transition_tokens
    keys = tl.multiple_of(tl.where(old, transition_keys, new_keys), 16)
    tokens = tl.where(old, transition_tokens, new_tokens)
    start = tl.where(old, first, first - transition_tokens)
    later_first = first + frame_tokens
    later_old = later_first < transition_tokens
    later_keys = tl.multiple_of(tl.where(later_old, transition_keys, new_keys), 16)
    later_tokens = tl.where(later_old, transition_tokens, new_tokens)
    later_start = tl.where(later_old, later_first, later_first - transition_tokens)

    dot = tl.zeros((BLOCK, COLUMNS), tl.float32)
    power = tl.zeros((BLOCK, COLUMNS), tl.float32)
    later_power = tl.zeros((BLOCK, COLUMNS), tl.float32)
    row = start.to(tl.int64)
    later_row = later_start.to(tl.int64)
    for _ in range(heads):
        x = tl.load(keys + row * WIDTH + spot, mask, 0.0).to(tl.float32)
        y = tl.load(later_keys + later_row * WIDTH + spot, mask, 0.0).to(tl.float32)
        dot += x * y
        power += x * x
        later_power += y * y
        row += tokens
        later_row += later_tokens

    norm = tl.maximum(tl.sqrt_rn(tl.sum(power, 1)), 1e-8)
    later_norm = tl.maximum(tl.sqrt_rn(tl.sum(later_power, 1)), 1e-8)
    cosine = tl.div_rn(tl.sum(dot, 1), norm * later_norm)
    tl.store(cosines + first + place, cosine, place < frame_tokens)


@triton.jit
def select_segments(
    cosines: tl.tensor,
    indices: tl.tensor,
    segment_tokens: tl.int32,
    candidates: tl.int32,
    kept: tl.int32,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """indices: the `kept` segments of least mean cosine, ascending; of equals the first. One program.

    CANDIDATES is a power of two, at least `candidates`. Every segment is summed in the same order, so
    equal segments have equal means.
    """
    segment = tl.arange(0, CANDIDATES)
    column = tl.arange(0, BLOCK)
    present = segment < candidates
    sums = tl.zeros((CANDIDATES, BLOCK), tl.float32)
    for start in range(0, segment_tokens, BLOCK):
        token = start + column
        mask = present[:, None] & (token < segment_tokens)[None, :]
        sums += tl.load(cosines + segment[:, None] * segment_tokens + token[None, :], mask, 0.0)
    similarity = tl.div_rn(tl.sum(sums, 1), segment_tokens.to(tl.float32))
    # What is no number comes last, and absent candidates after it: ranks stay a permutation.
    similarity = tl.where(present & (similarity == similarity), similarity, float("inf"))

    before = segment[None, :] < segment[:, None]
    less = similarity[None, :] < similarity[:, None]
    equal = similarity[None, :] == similarity[:, None]
    rank = tl.sum((less | (equal & before)).to(tl.int32), 1)
    chosen = rank < kept
    place = tl.sum((before & chosen[None, :]).to(tl.int32), 1)
    tl.store(indices + place, segment.to(tl.int64), chosen)


@triton.jit
def compact_segments(
    transition_keys: tl.tensor,
    transition_values: tl.tensor,
    new_keys: tl.tensor,
    new_values: tl.tensor,
    indices: tl.tensor,
    retained_keys: tl.tensor,
    retained_values: tl.tensor,
    transition_tokens: tl.int32,
    new_tokens: tl.int32,
    segment_tokens: tl.int32,
    kept: tl.int32,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Retained keys and values: the rows of the segments in `indices`, in that order, unchanged.

    Programs: (kept * blocks of a segment, batch * heads, 2), the last telling keys from values.
    """
    COLUMNS: tl.constexpr = triton.next_power_of_2(WIDTH)  # noqa: N806
    column = tl.arange(0, COLUMNS)
    blocks = tl.cdiv(segment_tokens, BLOCK)
    slot = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (place < segment_tokens)[:, None] & (column < WIDTH)[None, :]
    spot = place.to(tl.int64)[:, None] * WIDTH + column[None, :]
    head = tl.program_id(1).to(tl.int64)

    # A segment lies wholly in the one or the other tensor.
    token = tl.load(indices + slot) * segment_tokens
    old = token < transition_tokens
    row = tl.where(old, head * transition_tokens + token, head * new_tokens + token - transition_tokens)
    out = (head * kept + slot) * segment_tokens
    is_values = tl.program_id(2) == 1
    transition = tl.where(is_values, transition_values, transition_keys)
    new = tl.where(is_values, new_values, new_keys)
    source = tl.multiple_of(tl.where(old, transition, new), 16)
    retained = tl.multiple_of(tl.where(is_values, retained_values, retained_keys), 16)
    tl.store(retained + out * WIDTH + spot, tl.load(source + row * WIDTH + spot, mask), mask)


_KERNELS: Mapping[KernelName, tuple[Any, int, int]] = {
    "token_cosines": (token_cosines, COSINE_BLOCK, 4),
    "select_segments": (select_segments, SELECT_BLOCK, 8),
    "compact_segments": (compact_segments, COMPACT_BLOCK, 4),
}
"""Each with its BLOCK and the warps of a program."""


def compile_kernels(folder: Path, dtype: Dtype, width: int, sms: Sequence[int] = SMS) -> list[KernelRecord]:
    """Compile all kernels into `folder/kernels`.

    One cubin of `select_segments` serves any plan of up to `MAX_CANDIDATES` candidate segments
    (`launcher.check_candidates`); the others take any number.

    Args:
        folder: the bundle.
        dtype: of keys and values.
        width: of a head.
        sms: compute capabilities, 89 for 8.9.

    Returns their records, by compute capability, then kernel. Raises InputError where the folder cannot be
    written, RuntimeError where ptxas fails or a head is so wide that a kernel needs more registers than
    there are.
    """
    records = []
    for sm in sms:
        for name in KERNELS:
            file = f"kernels/{name}-{dtype}-sm{sm}.cubin"
            ptx, made = compile_for(name, dtype, width, sm)
            cubin, registers, spilled = assemble(ptx, sm)
            if spilled:
                raise RuntimeError(f"{name} for sm_{sm} spills {spilled} bytes a thread (width {width})")
            write_bytes(folder / file, cubin)
            launch = made.name, made.num_warps, made.shared
            records.append(KernelRecord(name, dtype, width, sm, file, *launch, registers, spilled))
    return records


def argument_types(name: KernelName, dtype: Dtype) -> dict[str, str]:
    """Triton's type of each argument of a kernel, in order, for keys and values of that dtype."""
    keys = DTYPES[dtype].triton
    assert keys is not None
    pointers = {"cosines": "*fp32", "indices": "*i64"}  # all others are keys and values
    annotations = _KERNELS[name][0].fn.__annotations__
    return {
        argument: {"tl.int32": "i32", "tl.constexpr": "constexpr"}.get(kind, pointers.get(argument, keys))
        for argument, kind in annotations.items()
        if argument != "return"
    }


def compile_for(name: KernelName, dtype: Dtype, width: int, sm: int) -> tuple[str, Any]:
    """A kernel's PTX for a compute capability and those it serves, and Triton's metadata of it."""
    kernel, block, warps = _KERNELS[name]
    types = argument_types(name, dtype)
    constants = {"WIDTH": width, "CANDIDATES": MAX_CANDIDATES, "BLOCK": block}
    # Pointers are multiples of 16 bytes, so rows are read 16 bytes at a time. Sizes may be any.
    pointers = [place for place, kind in enumerate(types.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        types,
        {argument: constants[argument] for argument, kind in types.items() if kind == "constexpr"},
        {(place,): [["tt.divisibility", 16]] for place in pointers},
    )
    options = {
        "num_warps": warps,
        # Old enough for drivers of 2024 where they know the GPU: engines can hold the PTX itself.
        "ptx_version": 84 if sm < 100 else 87 if sm in (100, 120) else 88,
        "enable_fp_fusion": False,  # one rounding for each operation, as in the interpreter
    }
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it names files of this machine
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise RuntimeError(f"{name} needs scratch memory, which launches do not give")
    return compiled.asm["ptx"].replace(f".target sm_{sm}a", f".target sm_{sm}"), compiled.metadata


def assemble(ptx: str, sm: int) -> tuple[bytes, int, int]:
    """The cubin, its registers, and the bytes a thread keeps in local memory."""
    with tempfile.TemporaryDirectory() as place:
        source, cubin = Path(place, "kernel.ptx"), Path(place, "kernel.cubin")
        source.write_text(ptx, encoding="ascii")
        ptxas = triton.knobs.nvidia.ptxas.path
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name=sm_{sm}", source.name, "-o", cubin.name]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ptxas fails for sm_{sm}: {done.stderr.strip()}")
        spills, registers = _SPILLS.search(done.stderr), _REGISTERS.search(done.stderr)
        if spills is None or registers is None:
            raise RuntimeError(f"ptxas reports no registers: {done.stderr.strip()}")
        return cubin.read_bytes(), int(registers[1]), sum(map(int, spills.groups()))
