"""What the DynamicPrune kernels take of a GPU: the table of docs/kernels.md.

    python benchmarks/kernel_table.py [dtype] [head width]

Compiles them (default: bfloat16, 128) for every compute capability of `prune.triton_kernels`; needs Triton,
and no GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import get_args

from forcingkv.prune.launcher import KERNELS
from forcingkv.prune.triton_kernels import compile_kernels
from forcingkv.runtime.engines import KernelRecord
from forcingkv.runtime.spec import Dtype

COLUMNS = ("kernel", "sm", "warps", "registers", "shared bytes", "spilled bytes", "cubin bytes")


def row(record: KernelRecord, folder: Path) -> tuple[str | int, ...]:
    """The cells of a kernel."""
    size = (folder / record.file).stat().st_size
    numbers = (record.warps, record.registers, record.shared_bytes, record.spill_bytes, size)
    return f"`{record.kernel}`", record.sm, *numbers


def table(dtype: Dtype, width: int) -> list[str]:
    """Lines of Markdown, kernel by kernel."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        records = compile_kernels(folder, dtype, width)
        records.sort(key=lambda record: KERNELS.index(record.kernel))
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(record, folder) for record in records)]
    return [f"| {' | '.join(map(str, cells))} |" for cells in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dtype", nargs="?", default="bfloat16", choices=get_args(Dtype))
    parser.add_argument("width", nargs="?", default=128, type=int)
    asked = parser.parse_args()
    print("\n".join(table(asked.dtype, asked.width)))
