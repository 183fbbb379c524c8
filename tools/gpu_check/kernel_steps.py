"""Steps about DynamicPrune's kernels: their binary interface, their numbers, and indices without meaning."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forcingkv.headmaps.errors import MissingExtraError
from forcingkv.models.wan import KeysValues
from forcingkv.prune.launcher import (
    KERNELS,
    SELECT_GRID,
    UNEVEN_KERNELS,
    Grid,
    KernelLauncher,
    compact_grid,
    cosine_grid,
)
from forcingkv.runtime.engines import KernelName, KernelRecord
from forcingkv.runtime.spec import Dtype
from tools.gpu_check.check import Check
from tools.gpu_check.kit import Quick
from tools.gpu_check.make_kit import KINDS, QUICK
from tools.gpu_check.pruning import (
    Case,
    bits,
    core,
    follow_sizes,
    launch,
    launcher,
    pruner,
    reference,
    same,
)

ARGUMENTS: dict[KernelName, list[int]] = {
    "token_cosines": [8] * 3 + [4] * 4,
    "select_segments": [8] * 2 + [4] * 3,
    "compact_segments": [8] * 7 + [4] * 4,
    "select_uneven_segments": [8] * 2 + [4] * 4,
    "compact_uneven_segments": [8] * 7 + [4] * 5,
}
"""Bytes of each argument that launches pass; two pointers of Triton's come behind."""


def cubins(check: Check) -> None:
    """Compiled kernels take the arguments that launches pass, and a GPU takes its own version's alone."""
    sm, sizes = check.machine.sm or 90, _sizes_in_driver if check.gpu else _sizes_in_file
    if not check.gpu:
        check.stands_in("the cubins' own tables, read by Triton's cuobjdump")
    count = 0
    for dtype, width in KINDS:
        for names in (KERNELS, UNEVEN_KERNELS):
            folder, records = check.kit.kernels(dtype, width, sm, uneven=names is UNEVEN_KERNELS)
            for record in records:
                found, wanted = sizes(folder / record.file, record), [*ARGUMENTS[record.kernel], 8, 8]
                check.expect(
                    found == wanted, f"{record.file} takes arguments of {found} bytes; launches pass {wanted}"
                )
                count += 1
    check.note(kernels=count, from_kit=check.kit.folder is not None)
    if check.gpu:
        other = 80 if sm // 10 != 8 else 90
        folder, records = check.kit.kernels("bfloat16", 128, other)
        try:
            _sizes_in_driver(folder / records[0].file, records[0])
        except Exception as error:
            check.note(other_version=f"sm_{other} is refused: {error}"[:200])
        else:
            check.fail(f"the driver takes a cubin for sm_{other} on sm_{sm}")


def _sizes_in_driver(file: Path, record: KernelRecord) -> list[int]:
    """What the driver says that a kernel takes."""
    core().Device(0).set_current()
    kernel = core().ObjectCode.from_cubin(file.read_bytes()).get_kernel(record.symbol)
    return [info.size for info in kernel.arguments_info]


def _sizes_in_file(file: Path, record: KernelRecord) -> list[int]:
    """What the cubin says of itself."""
    command = [str(_tool("cuobjdump")), "--dump-elf", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x\w+\s+Size    : 0x(\w+)", told)
    return [int(size, 16) for _, size in sorted((int(place, 16), size) for place, size in found)]


def _tool(name: str) -> Path:
    """A program that comes with Triton. Raises MissingExtraError without Triton."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise MissingExtraError("triton", "engines")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def kernels(check: Check) -> None:
    """They choose and collect what torch does, to the bit, whatever the keys hold, and again alike."""
    device, prune = pruner(check)
    frames = (210, 211, 215) if check.gpu else (30, 31)
    heads = 5 if check.gpu else 2
    kinds: tuple[tuple[Dtype, int], ...] = ("bfloat16", 128), ("float16", 64), ("float32", 12)
    cases = [
        Case(dtype, width, frame, transition=transition, heads=heads)
        for dtype, width in kinds
        for frame in (frames if check.gpu or dtype == "float32" else frames[:1])
        for transition in (0, 1)
    ]
    cases += [replace(cases[-1], frame=frame, holds=holds) for frame in frames for holds in ("ties", "nan")]
    for case in cases:
        keys = case.draw(device)
        found, wanted = prune(case, *keys), reference(case, *keys)
        check.expect(
            torch.equal(bits(found[0]), bits(wanted[0])),
            f"{case}: chosen are {found[0].tolist()}, by torch {wanted[0].tolist()}",
        )
        check.expect(same(found, wanted), f"{case}: what is collected differs from torch")
        if case.holds == "ties":
            check.expect(
                found[0].tolist() == list(range(case.kept)), f"{case}: ties go to {found[0].tolist()}"
            )
        if check.gpu:  # an interpreter has no order of its own
            check.expect(same(prune(case, *keys), found), f"{case}: a second launch gives other bits")
    check.note(cases=len(cases))
    if check.gpu:
        _empty_transition(check)
        _large(check)


def _empty_transition(check: Check) -> None:
    """TensorRT passes null or anything as the pointer of an empty input."""
    case = Case("bfloat16", 128, 210, transition=0)
    keys, loaded = case.draw("cuda"), launcher(check, "bfloat16", 128)
    wanted, refused = reference(case, *keys), []
    for pointer in (0, 8):
        try:
            found = launch(loaded, case, *keys, pointer=pointer)
        except ValueError as error:
            refused.append(f"pointer {pointer} of an empty transition: {error}")
        else:
            check.expect(same(found, wanted), f"pointer {pointer} of an empty transition changes the result")
    check.expect(not refused, "; ".join(refused))


def _large(check: Check) -> None:
    """A layer of a public model at 1080P: the numbers, and how fast segments are copied."""
    case = Case("bfloat16", 128, 8160, batch=1, heads=6)
    keys, loaded = case.draw("cuda"), launcher(check, "bfloat16", 128)
    found = launch(loaded, case, *keys)
    check.expect(same(found, reference(case, *keys)), "at 1080P the result differs from torch")
    check.expect(same(launch(loaded, case, *keys), found), "at 1080P a second launch gives other bits")
    pointers = [tensor.data_ptr() for tensor in (*keys[0], *keys[1], found[0], *found[1])]
    stream = torch.cuda.current_stream().cuda_stream
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = 50
    loaded.collect(pointers, follow_sizes(case), stream)
    begin.record()
    for _ in range(times):
        loaded.collect(pointers, follow_sizes(case), stream)
    end.record()
    torch.cuda.synchronize()
    seconds = begin.elapsed_time(end) / 1000 / times
    moved = 2 * sum(tensor.nbytes for tensor in found[1])
    check.note(compact_seconds=seconds, compact_gb_per_second=moved / seconds / 1e9)


def garbage(check: Check) -> None:
    """Indices that mean nothing, as a builder may feed them, read nothing that is not there.

    It comes last: without the bound in the kernel it may take the context with it.
    """
    case = Case("float32", 12, 30, batch=1, heads=2)
    worst = torch.tensor([-1, 10**6, -(10**6), 2**40, -(2**40), 18], dtype=torch.int64)
    device, _ = pruner(check)
    keys = case.draw(device)
    shape = (case.batch, case.heads, case.kept * case.split.kept_tokens, case.width)
    retained = KeysValues(*(torch.zeros(shape, device=device) for _ in range(2)))
    tensors = [*keys[0], *keys[1], worst.to(device), *retained]
    if check.gpu:
        loaded = launcher(check, case.dtype, case.width)
        stream = torch.cuda.current_stream().cuda_stream
        loaded.collect([tensor.data_ptr() for tensor in tensors], follow_sizes(case), stream)
        torch.cuda.synchronize()
    else:
        _interpret_compact(case, tensors)
    rows = {row.tobytes() for kv in keys for row in kv.keys.cpu().numpy().reshape(-1, case.width)}
    strange = sum(row.tobytes() not in rows for row in retained.keys.cpu().numpy().reshape(-1, case.width))
    check.expect(not strange, f"{strange} rows were collected that are in none of the inputs")


def _interpret_compact(case: Case, tensors: list[torch.Tensor]) -> None:
    from forcingkv.prune import triton_kernels
    from forcingkv.prune.launcher import COMPACT_BLOCK

    sizes = case.sizes
    grid = compact_grid(sizes.batch, sizes.heads, sizes.segment_tokens, sizes.kept)
    numbers = sizes.transition_tokens, sizes.new_tokens, sizes.segment_tokens, sizes.kept
    triton_kernels.compact_segments[grid](*tensors, *numbers, WIDTH=case.width, BLOCK=COMPACT_BLOCK)


def quick_plugins(check: Check) -> None:
    """The PTX that engines hold takes inputs, sizes, outputs, and gives the bits of the cubins."""
    made = {
        name: check.kit.quick(name, QUICK[name], "bfloat16", 128, check.machine.sm or 90) for name in KERNELS
    }
    if not check.gpu:
        check.stands_in("the PTX's own declaration, and Triton's ptxas")
        for name, quick in made.items():
            outputs, arguments = QUICK[name], ARGUMENTS[name]
            pointers = arguments.count(8)
            wanted = [8] * (pointers - outputs) + [4] * arguments.count(4) + [8] * outputs
            found = _sizes_in_ptx(quick.ptx)
            check.expect(found == wanted, f"the PTX of {name} takes {found}; TensorRT passes {wanted}")
            _assembles(check, name, quick)
        check.note(kernels=len(made))
        return
    case = Case("bfloat16", 128, 210)
    keys = case.draw("cuda")
    launch_all = _quick_launches(case, made, *keys)
    by_cubins = launch(launcher(check, "bfloat16", 128), case, *keys)
    check.expect(same(launch_all, by_cubins), "the kernels from PTX give other bits than those from cubins")


def _sizes_in_ptx(ptx: str) -> list[int]:
    head = re.search(r"\.entry \w+\(\n(.*?)\n\)", ptx, re.DOTALL)
    assert head is not None
    return [int(size) // 8 for size in re.findall(r"\.param \.[ubs](\d+)", head[1])]


def _assembles(check: Check, name: str, quick: Quick) -> None:
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "kernel.ptx")
        source.write_text(quick.ptx, encoding="ascii")
        command = [
            str(_tool("ptxas")),
            "--gpu-name=sm_90",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    check.expect(not done.returncode, f"ptxas refuses the PTX of {name}: {done.stderr[:300]}")


def _quick_launches(
    case: Case, made: dict[KernelName, Quick], transition: KeysValues, new: KeysValues
) -> tuple[torch.Tensor, KeysValues]:
    """Launch the three kernels as TensorRT does: inputs, sizes, outputs."""
    cuda, sizes = core(), case.sizes
    torch.zeros(1, device="cuda")
    cuda.Device(0).set_current()
    stream = cuda.Stream.from_handle(torch.cuda.current_stream().cuda_stream)

    def run(name: KernelName, grid: Grid, inputs: Any, numbers: list[int], outputs: Any) -> None:
        quick = made[name]
        kernel = cuda.ObjectCode.from_ptx(quick.ptx.encode()).get_kernel(quick.symbol)
        config = cuda.LaunchConfig(grid=grid, block=(32 * quick.warps, 1, 1), shmem_size=quick.shared_bytes)
        pointers = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs)]
        cuda.launch(stream, config, kernel, *pointers[0], *map(np.int32, numbers), *pointers[1])
        loaded.append(kernel)

    loaded: list[Any] = []
    cosines = torch.empty(sizes.candidate_tokens, device="cuda")
    indices = torch.empty(case.kept, dtype=torch.int64, device="cuda")
    shape = (case.batch, case.heads, case.kept * case.split.kept_tokens, case.width)
    retained = KeysValues(new.keys.new_zeros(shape), new.keys.new_zeros(shape))
    tokens = [sizes.transition_tokens, sizes.new_tokens]
    keys = [transition.keys, new.keys]
    grid = cosine_grid(case.frame, sizes.candidate_tokens)
    run("token_cosines", grid, keys, [case.heads, *tokens, case.frame], [cosines])
    numbers = [sizes.segment_tokens, sizes.candidates, case.kept]
    run("select_segments", SELECT_GRID, [cosines], numbers, [indices])
    grid = compact_grid(case.batch, case.heads, sizes.segment_tokens, case.kept)
    inputs = [*transition, *new, indices]
    run("compact_segments", grid, inputs, [*tokens, sizes.segment_tokens, case.kept], retained)
    torch.cuda.synchronize()
    return indices, retained


def launches(check: Check) -> None:
    """What a launch costs the host."""
    times = 1000
    if not check.gpu:
        _recorded_launches(check, times)
        return
    import time

    case = Case("bfloat16", 128, 210)
    keys, loaded = case.draw("cuda"), launcher(check, "bfloat16", 128)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        indices, retained = launch(loaded, case, *keys)
        pointers = [tensor.data_ptr() for tensor in (*keys[0], *keys[1], indices, *retained)]
        began = time.perf_counter()
        for _ in range(times):
            loaded.collect(pointers, follow_sizes(case), stream.cuda_stream)
        queued = time.perf_counter() - began
        stream.synchronize()
    check.note(host_seconds_a_launch=queued / times, seconds_a_launch=(time.perf_counter() - began) / times)
    check.expect(same((indices, retained), reference(case, *keys)), "after 1000 launches the bits differ")


def _recorded_launches(check: Check, times: int) -> None:
    """How many streams and configurations a thousand launches make."""
    import sys
    from types import SimpleNamespace
    from unittest.mock import patch

    check.stands_in("a cuda.core that records")
    made = {"streams": 0, "configurations": 0, "launches": 0}

    def count(what: str) -> Any:
        def one(*_: Any, **__: Any) -> Any:
            made[what] += 1
            return object()

        return one

    recording = SimpleNamespace(
        ObjectCode=SimpleNamespace(from_cubin=lambda _: SimpleNamespace(get_kernel=lambda symbol: symbol)),
        Stream=SimpleNamespace(from_handle=count("streams")),
        LaunchConfig=count("configurations"),
        launch=count("launches"),
    )
    case = Case("bfloat16", 128, 210)
    folder, records = check.kit.kernels("bfloat16", 128, 90)
    with patch.dict(sys.modules, {"cuda.core": recording}):
        loaded = KernelLauncher(folder, records, 90)
        for _ in range(times):
            loaded.collect([16 * place for place in range(1, 8)], follow_sizes(case), 9)
    check.note(**made)
    check.expect(made["launches"] == times, f"{made['launches']} launches came of {times}")
