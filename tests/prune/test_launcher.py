"""Launches of the DynamicPrune kernels: with a cuda.core that records, and on a GPU where there is one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.fields import from_data
from forcingkv.models.wan import KeysValues
from forcingkv.prune.launcher import (
    KEPT_STREAMS,
    KERNELS,
    MAX_CANDIDATES,
    SELECT_GRID,
    UNEVEN_KERNELS,
    KernelLauncher,
    LaunchSizes,
    compact_grid,
    cosine_grid,
)
from forcingkv.prune.reference import prune_score
from forcingkv.runtime.engines import KernelName, KernelRecord
from forcingkv.runtime.kv.segments import Split

WARPS = {"token_cosines": 4, "select_segments": 8, "compact_segments": 2}
WARPS |= {"select_uneven_segments": 8, "compact_uneven_segments": 2}
SHARED = {"token_cosines": 64, "select_segments": 512, "compact_segments": 0}
SHARED |= {"select_uneven_segments": 512, "compact_uneven_segments": 0}


def write_bundle(
    folder: Path, sms: tuple[int, ...] = (80, 86, 90, 120), kernels: tuple[KernelName, ...] = KERNELS
) -> list[KernelRecord]:
    """Files in the place of cubins, and their records."""
    (folder / "kernels").mkdir()
    records = []
    for sm in sms:
        for name in kernels:
            file = f"kernels/{name}-bfloat16-sm{sm}.cubin"
            (folder / file).write_text(f"{name} for {sm}", encoding="ascii")
            record = KernelRecord(
                name, "bfloat16", 128, sm, file, f"{name}_symbol", WARPS[name], SHARED[name], 40, 0
            )
            records.append(record)
    return records


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was launched: stream, configuration, kernel, arguments. A kernel is (cubin, symbol)."""
    calls: list[tuple[Any, ...]] = []

    def from_cubin(content: bytes) -> SimpleNamespace:
        return SimpleNamespace(get_kernel=lambda symbol: (content, symbol))

    fake = SimpleNamespace(
        ObjectCode=SimpleNamespace(from_cubin=from_cubin),
        Stream=SimpleNamespace(from_handle=lambda handle: f"stream {handle}"),
        LaunchConfig=dict,
        launch=lambda stream, config, kernel, *arguments: calls.append((stream, config, kernel, arguments)),
    )
    monkeypatch.setitem(sys.modules, "cuda.core", fake)
    return calls


SIZES = LaunchSizes(
    batch=1,
    heads=7,
    transition_tokens=1560,
    new_tokens=4680,
    segment_tokens=260,
    kept=6,
    frame_tokens=1560,
)
P = [16 * n for n in range(1, 8)]
"""Pointers."""


def launch_of(name: str, grid: tuple[int, int, int], *arguments: int, sm: int = 90) -> tuple[Any, ...]:
    config = {"grid": grid, "block": (32 * WARPS[name], 1, 1), "shmem_size": SHARED[name]}
    return "stream 9", config, (f"{name} for {sm}".encode(), f"{name}_symbol"), (*arguments, 0, 0)


def test_scoring_launches_two_kernels(tmp_path: Path, launched: list[tuple[Any, ...]]) -> None:
    launcher = KernelLauncher(tmp_path, write_bundle(tmp_path), 90)
    launcher.score(*P[:4], SIZES, 9)
    assert launched == [
        launch_of("token_cosines", (98, 3, 1), *P[:3], 7, 1560, 4680, 1560),
        launch_of("select_segments", (1, 1, 1), P[2], P[3], 260, 18, 6),
    ]
    assert (launcher.dtype, launcher.width) == ("bfloat16", 128)
    for _, _, _, arguments in launched:
        sizes = [argument for argument in arguments[:-2] if argument not in P]
        assert {type(size) for size in sizes} == {np.int32}  # what cuda.core passes as 4 bytes


def test_uneven_segments_have_kernels_of_their_own(tmp_path: Path, launched: list[tuple[Any, ...]]) -> None:
    """1,024 tokens in 6 segments: 170 of each are kept."""
    uneven = Split(1024, 6)
    sizes = LaunchSizes(1, 7, 1024, 3072, uneven.kept_tokens, 6, 1024, uneven)
    launcher = KernelLauncher(tmp_path, write_bundle(tmp_path, kernels=UNEVEN_KERNELS), 90)
    launcher.score(*P[:4], sizes, 9)
    launcher.collect(P, replace(sizes, frame_tokens=0), 9)
    assert launcher.uneven
    assert launched == [
        launch_of("token_cosines", (64, 3, 1), *P[:3], 7, 1024, 3072, 1024),
        launch_of("select_uneven_segments", (1, 1, 1), P[2], P[3], 1024, 6, 18, 6),
        launch_of("compact_uneven_segments", (36, 7, 2), *P, 1024, 3072, 1024, 6, 6),
    ]
    with pytest.raises(InputError, match=f"the policy has {MAX_CANDIDATES + 2} segments to choose"):
        launcher.score(*P[:4], replace(sizes, new_tokens=11 * 1024), 9)


def test_no_transition_frame_is_a_null_pointer(tmp_path: Path, launched: list[tuple[Any, ...]]) -> None:
    launcher = KernelLauncher(tmp_path, write_bundle(tmp_path), 90)
    sizes = replace(SIZES, batch=2, transition_tokens=0)
    launcher.score(0, *P[1:4], sizes, 9)
    launcher.collect([0, 0, *P[2:]], sizes, 9)
    assert launched == [
        launch_of("token_cosines", (98, 2, 1), 0, *P[1:3], 7, 0, 4680, 1560),
        launch_of("select_segments", (1, 1, 1), P[2], P[3], 260, 12, 6),
        launch_of("compact_segments", (54, 14, 2), 0, 0, *P[2:], 0, 4680, 260, 6),
    ]


@pytest.mark.parametrize("given", [8, 1, 0xDEAD_BEEF])
def test_what_stands_for_an_empty_tensor_is_no_address(
    tmp_path: Path, launched: list[tuple[Any, ...]], given: int
) -> None:
    """TensorRT gives null for some layers, and for others what no kernel could read from."""
    launcher = KernelLauncher(tmp_path, write_bundle(tmp_path), 90)
    sizes = replace(SIZES, transition_tokens=0)
    launcher.score(given, *P[1:4], sizes, 9)
    launcher.collect([given, given, *P[2:]], sizes, 9)
    assert [arguments[:2] for *_, arguments in launched] == [(0, P[1]), (P[2], P[3]), (0, 0)]
    with pytest.raises(ValueError, match="not all pointers are multiples of 16"):
        launcher.collect([given, given, *P[2:]], SIZES, 9)


def test_streams_and_configurations_are_made_once_and_forgotten_in_time(
    tmp_path: Path, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuda-core makes a class for each handle it is given."""
    cuda, made = sys.modules["cuda.core"], []
    stream = SimpleNamespace(from_handle=lambda handle: made.append(handle) or f"stream {handle}")
    monkeypatch.setattr(cuda, "Stream", stream)
    monkeypatch.setattr(cuda, "LaunchConfig", lambda **given: made.append(given["grid"]) or given)
    launcher = KernelLauncher(tmp_path, write_bundle(tmp_path), 90)
    for _ in range(3):
        launcher.collect(P, SIZES, 9)
        launcher.collect(P, replace(SIZES, heads=5), 7)
    assert made == [9, (54, 7, 2), 7, (54, 5, 2)]
    assert [call[:2] for call in launched[:2]] == [call[:2] for call in launched[4:]]
    assert launched[0][0] == "stream 9"
    made.clear()
    for handle in range(100, 100 + KEPT_STREAMS):
        launcher.collect(P, SIZES, handle)
    launcher.collect(P, SIZES, 9)
    assert made[-1] == 9, "it was forgotten for newer ones"


def test_collecting_launches_one(tmp_path: Path, launched: list[tuple[Any, ...]]) -> None:
    launcher = KernelLauncher(tmp_path, write_bundle(tmp_path), 90)
    launcher.collect(P, SIZES, 9)
    assert launched == [launch_of("compact_segments", (54, 7, 2), *P, 1560, 4680, 260, 6)]


def test_grids_cover_what_is_left_over() -> None:
    assert cosine_grid(17, 34, 16) == (2, 2, 1)
    assert cosine_grid(16, 32, 16) == (1, 2, 1)
    assert compact_grid(2, 3, 33, 5, 32) == (10, 6, 2)
    assert SELECT_GRID == (1, 1, 1)
    assert SIZES.workspace_bytes == 4 * 4680


@pytest.mark.parametrize(
    ("device", "chosen"),
    [(75, None), (80, 80), (86, 86), (87, 86), (89, 86), (90, 90), (100, None), (120, 120), (121, 120)],
)
def test_the_best_that_the_gpu_runs_is_loaded(
    tmp_path: Path, launched: list[tuple[Any, ...]], device: int, chosen: int | None
) -> None:
    records = write_bundle(tmp_path)
    if chosen is None:
        with pytest.raises(InputError, match=rf"sm_{device}; expected .* sm_80, sm_86, sm_90, sm_120\."):
            KernelLauncher(tmp_path, records, device)
        return
    KernelLauncher(tmp_path, records, device).collect(P, SIZES, 9)
    assert launched == [launch_of("compact_segments", (54, 7, 2), *P, 1560, 4680, 260, 6, sm=chosen)]


@pytest.mark.usefixtures("launched")
def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    records = write_bundle(tmp_path)
    with pytest.raises(InputError, match="expected a bundle with kernels"):
        KernelLauncher(tmp_path, [], 90)
    with pytest.raises(ValueError, match=r"'compact_segments', 'token_cosines'\] for sm_90"):
        KernelLauncher(tmp_path, [r for r in records if r.kernel != "select_segments"], 90)
    mixed = [replace(r, kernel="select_uneven_segments") if "select" in r.kernel else r for r in records]
    with pytest.raises(ValueError, match="lacks a kernel"):
        KernelLauncher(tmp_path, mixed, 90)
    with pytest.raises(ValueError, match="kernels of"):
        KernelLauncher(tmp_path, [*records, replace(records[0], width=64)], 90)
    with pytest.raises(InputError, match="not inside the folder"):
        KernelLauncher(tmp_path, [replace(record, file="../x") for record in records], 90)
    (tmp_path / records[0].file).unlink()
    with pytest.raises(InputError, match="is missing"):
        KernelLauncher(tmp_path, records, 80)


def test_what_would_fault_on_the_gpu_is_refused(tmp_path: Path, launched: list[tuple[Any, ...]]) -> None:
    launcher = KernelLauncher(tmp_path, write_bundle(tmp_path), 90)
    with pytest.raises(ValueError, match="compact_segments: not all pointers are multiples of 16"):
        launcher.collect([*P[:6], P[6] + 8], SIZES, 9)
    many = replace(
        SIZES, transition_tokens=1, new_tokens=MAX_CANDIDATES + 1, segment_tokens=1, frame_tokens=1
    )
    with pytest.raises(InputError, match=f"the policy has {MAX_CANDIDATES + 1} segments to choose"):
        launcher.score(*P[:4], many, 9)
    assert launched == []
    launcher.score(*P[:4], replace(many, transition_tokens=0), 9)
    assert len(launched) == 2


def test_without_cuda_core_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingExtraError, match=r"needs cuda-core.*forcingkv\[tensorrt-rtx\]"):
        KernelLauncher(tmp_path, write_bundle(tmp_path), 90)


def test_a_record_is_read_back_from_a_manifest(tmp_path: Path) -> None:
    (record, *_) = write_bundle(tmp_path)
    assert from_data(KernelRecord, json.loads(json.dumps(asdict(record))), "manifest") == record
    with pytest.raises(InputError, match="kernel is 'other'"):
        from_data(KernelRecord, asdict(record) | {"kernel": "other"}, "manifest")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transition_frames", [0, 1])
@pytest.mark.parametrize("frame", [210, 211, 215])
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 128), ("float16", 64), ("float32", 12)])
def test_the_gpu_chooses_and_collects_as_torch_does(
    tmp_path: Path, dtype: Any, width: int, transition_frames: int, frame: int
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("cuda.core", reason="cuda-core is not installed", exc_type=ImportError)
    from cuda.core import Device

    from forcingkv.prune.kernel_compiler import compile_kernels

    sm = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    Device().set_current()
    batch, heads, segments, size, kept = 2, 5, 6, 35, 6
    split = Split(frame, segments)
    kernels = KERNELS if split.is_even else UNEVEN_KERNELS
    records = compile_kernels(tmp_path, dtype, width, (sm,), kernels)
    launcher = KernelLauncher(tmp_path, records, sm)
    torch.manual_seed(transition_frames)

    def draw(frames: int) -> KeysValues:
        shape = (batch, heads, frames * frame, width)
        kind = getattr(torch, dtype)
        return KeysValues(*(torch.randn(shape, device="cuda").to(kind) for _ in range(2)))

    transition, new = draw(transition_frames), draw(3)
    tokens = transition.keys.shape[2], new.keys.shape[2]
    sizes = LaunchSizes(batch, heads, *tokens, size, kept, frame, None if split.is_even else split)
    cosines = torch.empty(sizes.workspace_bytes // 4, device="cuda")
    indices = torch.empty(kept, dtype=torch.int64, device="cuda")
    retained = [new.keys.new_empty(batch, heads, kept * size, width) for _ in range(2)]
    pointers = [tensor.data_ptr() for tensor in (*transition, *new, indices, *retained)]
    stream = torch.cuda.current_stream().cuda_stream
    launcher.score(pointers[0], pointers[2], cosines.data_ptr(), pointers[4], sizes, stream)
    launcher.collect(pointers, sizes, stream)
    torch.cuda.synchronize()

    *expected, chosen = prune_score(*transition, *new, frame, segments, kept)
    assert indices.tolist() == chosen.tolist()
    for found, wanted in zip(retained, expected, strict=True):
        assert torch.equal(found, wanted)
