"""Compiling the kernels of DynamicPrune ahead of time, for GPUs that need not be here.

A cubin is what the GPU runs: launching it needs neither Triton nor a compiler. Triton writes PTX, and its own
ptxas assembles it here once more, for two reasons. Triton's target for compute capability 9.0 and up (sm_90a)
gives cubins for that capability alone, while those for sm_120 run on sm_121 too. And ptxas reports registers
and spills.

Importing this raises MissingExtraError where Triton is not installed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import MissingExtraError
from forcingkv.headmaps.writing import write_bytes
from forcingkv.prune.launcher import (
    COMPACT_BLOCK,
    COSINE_BLOCK,
    KERNELS,
    MAX_CANDIDATES,
    SELECT_BLOCK,
    SMS,
)
from forcingkv.prune.triton_kernels import (
    compact_segments,
    compact_uneven_segments,
    select_segments,
    select_uneven_segments,
    token_cosines,
)
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.engines import KernelName, KernelRecord
from forcingkv.runtime.spec import Dtype

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    raise MissingExtraError("triton", "engines") from error

_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")

_KERNELS: Mapping[KernelName, tuple[Any, int, int]] = {
    "token_cosines": (token_cosines, COSINE_BLOCK, 4),
    "select_segments": (select_segments, SELECT_BLOCK, 8),
    "compact_segments": (compact_segments, COMPACT_BLOCK, 4),
    "select_uneven_segments": (select_uneven_segments, SELECT_BLOCK, 8),
    "compact_uneven_segments": (compact_uneven_segments, COMPACT_BLOCK, 4),
}
"""Each with its BLOCK and the warps of a program."""


def compile_kernels(
    folder: Path,
    dtype: Dtype,
    width: int,
    sms: Sequence[int] = SMS,
    kernels: Sequence[KernelName] = KERNELS,
) -> list[KernelRecord]:
    """Compile the kernels of a bundle into `folder/kernels`.

    One cubin of a kernel that selects serves any plan of up to `MAX_CANDIDATES` candidate segments
    (`launcher.check_candidates`); the others take any number.

    Args:
        folder: the bundle.
        dtype: of keys and values.
        width: of a head.
        sms: compute capabilities, 89 for 8.9 (`launcher.kernel_sms`).
        kernels: `KERNELS`, or `UNEVEN_KERNELS` where a frame's segments have not as many tokens each.

    Returns their records, by compute capability, then kernel. Raises InputError where the folder cannot be
    written, RuntimeError where ptxas fails or a head is so wide that a kernel needs more registers than
    there are.
    """
    records = []
    for sm in sms:
        for name in kernels:
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
