"""Compiling the DynamicPrune kernels ahead of time, for GPUs that need not be here.

A cubin is what the GPU runs: launching it needs neither Triton nor a compiler. Triton writes PTX, and its own
ptxas assembles it here once more, for two reasons. Triton's target for compute capability 9.0 and up (sm_90a)
gives cubins for that capability alone, while those for sm_120 run on sm_121 too. And ptxas reports registers
and spills.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import MissingExtraError
from forcingkv.headmaps.files import unwritable, write_bytes
from forcingkv.runtime.kernels import (
    COMPACT_BLOCK,
    COSINE_BLOCK,
    KERNELS,
    MAX_CANDIDATES,
    SELECT_BLOCK,
    KernelName,
    KernelRecord,
)
from forcingkv.runtime.spec import Dtype

SMS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for by default: every GPU since Ampere runs one of them."""

FOLDER = "kernels"
"""Where cubins lie in a bundle."""

WARPS: Mapping[KernelName, int] = {"token_cosines": 4, "select_segments": 8, "compact_segments": 4}

_POINTERS: Mapping[Dtype, str] = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Signature:
    """Types of a kernel's arguments, and its constants."""

    types: Mapping[str, str]
    constants: Mapping[str, int]


def compile_kernels(
    folder: Path,
    dtype: Dtype,
    width: int,
    sms: Sequence[int] = SMS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[KernelRecord]:
    """Compile all kernels into `folder/kernels`.

    One cubin of `select_segments` serves any plan of up to `MAX_CANDIDATES` candidate segments
    (`runtime.kernels.check_candidates`); the others take any number.

    Args:
        folder: the bundle.
        dtype: of keys and values.
        width: of a head.
        sms: compute capabilities, 89 for 8.9.
        progress: told what is being done.

    Returns:
        Their records, by compute capability, then kernel.

    Raises:
        MissingExtraError: Triton is not installed.
        RuntimeError: a kernel needs more registers than there are (its width is too large), or ptxas fails.
    """
    kernels = kernel_module()
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    records = []
    for sm in sms:
        progress(f"compiling kernels for sm_{sm}")
        for name in KERNELS:
            file = f"{FOLDER}/{name}-{dtype}-sm{sm}.cubin"
            compiled = compile_for(getattr(kernels, name), signature_of(name, dtype, width), sm, WARPS[name])
            cubin, registers, spilled = assemble(compiled.asm["ptx"], sm)
            if spilled:
                raise RuntimeError(f"{name} for sm_{sm} spills {spilled} bytes a thread (width {width})")
            write_bytes(folder / file, cubin)
            records.append(
                KernelRecord(
                    name,
                    dtype,
                    width,
                    sm,
                    file,
                    symbol=compiled.metadata.name,
                    warps=compiled.metadata.num_warps,
                    shared_bytes=compiled.metadata.shared,
                    registers=registers,
                    spill_bytes=spilled,
                )
            )
    return records


def kernel_module() -> Any:
    """The module `export.kernels`. Raises MissingExtraError without Triton."""
    try:
        return importlib.import_module("forcingkv.export.kernels")
    except ImportError as error:
        raise MissingExtraError("triton", "engines") from error


def signature_of(name: KernelName, dtype: Dtype, width: int) -> Signature:
    """Types of a kernel's arguments, in order, and its constants, for keys of that dtype and width."""
    kv = _POINTERS[dtype]
    if name == "token_cosines":
        pointers = {"transition_keys": kv, "new_keys": kv, "cosines": "*fp32"}
        sizes = ["heads", "transition_tokens", "new_tokens", "frame_tokens"]
        constants = {"WIDTH": width, "BLOCK": COSINE_BLOCK}
    elif name == "select_segments":
        pointers = {"cosines": "*fp32", "indices": "*i64"}
        sizes = ["segment_tokens", "candidates", "kept"]
        constants = {"CANDIDATES": MAX_CANDIDATES, "BLOCK": SELECT_BLOCK}
    else:
        tensors = ["transition_keys", "transition_values", "new_keys", "new_values"]
        retained = ["retained_keys", "retained_values"]
        pointers = dict.fromkeys(tensors, kv) | {"indices": "*i64"} | dict.fromkeys(retained, kv)
        sizes = ["transition_tokens", "new_tokens", "segment_tokens", "kept"]
        constants = {"WIDTH": width, "BLOCK": COMPACT_BLOCK}
    return Signature(
        pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr"), constants
    )


def compile_for(kernel: Any, signature: Signature, sm: int, warps: int) -> Any:
    """Triton's compilation of a kernel for a compute capability: `asm["ptx"]` and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Pointers are multiples of 16 bytes, so rows are read 16 bytes at a time. Sizes may be any.
    types = signature.types.values()
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind.startswith("*")}
    source = ASTSource(kernel, dict(signature.types), dict(signature.constants), aligned)
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
        raise RuntimeError(f"{kernel.__name__} needs scratch memory, which launches do not give")
    return compiled


def assemble(ptx: str, sm: int) -> tuple[bytes, int, int]:
    """The cubin, its registers, and the bytes a thread keeps in local memory."""
    import triton

    with tempfile.TemporaryDirectory() as place:
        source, cubin = Path(place, "kernel.ptx"), Path(place, "kernel.cubin")
        source.write_text(ptx.replace(f".target sm_{sm}a", f".target sm_{sm}"), encoding="ascii")
        ptxas = triton.knobs.nvidia.ptxas.path
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name=sm_{sm}", source.name, "-o", cubin.name]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ptxas fails for sm_{sm}: {done.stderr.strip()}")
        spills, registers = _SPILLS.search(done.stderr), _REGISTERS.search(done.stderr)
        if spills is None or registers is None:
            raise RuntimeError(f"ptxas reports no registers: {done.stderr.strip()}")
        return cubin.read_bytes(), int(registers[1]), sum(map(int, spills.groups()))
