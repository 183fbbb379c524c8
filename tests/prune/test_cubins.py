"""Kernels compiled for GPUs that are not here."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.fields import from_data
from forcingkv.prune import kernel_compiler
from forcingkv.prune.kernel_compiler import compile_kernels
from forcingkv.prune.launcher import KERNELS, SMS, UNEVEN_KERNELS
from forcingkv.runtime.engines import KernelRecord

ROOT = Path(__file__).parents[2]

# Pointers of 8 bytes, sizes of 4 (padded to 8), and two pointers that no launch uses: as the launcher passes.
ARGUMENT_BYTES = {
    "token_cosines": 3 * 8 + 4 * 4 + 2 * 8,
    "select_segments": 2 * 8 + 4 * 4 + 2 * 8,
    "compact_segments": 7 * 8 + 4 * 4 + 2 * 8,
    "select_uneven_segments": 2 * 8 + 4 * 4 + 2 * 8,
    "compact_uneven_segments": 7 * 8 + 5 * 4 + 4 + 2 * 8,
}
BEFORE_ARGUMENTS = 352
"""Bytes of constant memory that come before a kernel's arguments on compute capability 8.x."""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that Triton compiled before is used again."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def resources(cubin: Path) -> dict[str, int]:
    """What cuobjdump says of a cubin's one kernel, and the architecture it is for."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (function,) = re.findall(r"Function (\w+):", said)
    assert cubin.name.startswith(f"{function}-")
    return {name: int(value) for name, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", said)}


ALL = tuple(dict.fromkeys(KERNELS + UNEVEN_KERNELS))
"""The first of them is in both."""


@pytest.mark.usefixtures("fresh")
def test_small_heads_compile_in_every_dtype(tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        records = compile_kernels(tmp_path, dtype, 12, (89,), ALL)
        assert [record.kernel for record in records] == list(ALL)
        for record in records:
            assert record.file == f"kernels/{record.kernel}-{dtype}-sm89.cubin"
            assert from_data(KernelRecord, asdict(record), "record") == record
            found = resources(tmp_path / record.file)
            assert (found["REG"], found["STACK"], found["LOCAL"]) == (record.registers, 0, 0)
            assert found["CONSTANT"] == BEFORE_ARGUMENTS + ARGUMENT_BYTES[record.kernel]
    assert len(list((tmp_path / "kernels").iterdir())) == 3 * len(ALL)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("sms", [(120,), pytest.param(SMS, marks=pytest.mark.long)])
def test_public_models_compile_for_every_gpu_alike_each_time(
    sms: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    records = compile_kernels(first, "bfloat16", 128, sms, ALL)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    again = compile_kernels(second, "bfloat16", 128, (120,), ALL)
    assert again == [record for record in records if record.sm == 120]
    for record in again:
        assert (first / record.file).read_bytes() == (second / record.file).read_bytes()

    assert [(r.sm, r.kernel) for r in records] == [(sm, kernel) for sm in sms for kernel in ALL]
    for record in records:
        cubin = (first / record.file).read_bytes()
        assert str(ROOT).encode() not in cubin
        assert str(Path(sys.prefix)).encode() not in cubin
        assert record.spill_bytes == 0
        assert record.registers > 0
        assert record.shared_bytes <= 48 << 10  # more would have to be asked for before a launch


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_kernel_that_would_spill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"token_cosines for sm_80 spills \d+ bytes a thread \(width 512\)"
    ):
        compile_kernels(tmp_path, "bfloat16", 512, (80,))
    assert not (tmp_path / "kernels").exists()


@pytest.mark.usefixtures("fresh")
def test_what_ptxas_says_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ptxas fails for sm_80"):
        kernel_compiler.assemble("no PTX", 80)
    taken = tmp_path / "bundle"
    taken.write_text("a file", encoding="ascii")
    with pytest.raises(InputError, match="cannot be written"):
        compile_kernels(taken, "bfloat16", 128, (80,))


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "forcingkv.prune.kernel_compiler")
    with pytest.raises(MissingExtraError, match=r"needs triton.*forcingkv\[engines\]"):
        importlib.import_module("forcingkv.prune.kernel_compiler")
