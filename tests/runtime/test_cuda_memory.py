"""Memory, staging and streams of a lane, on a GPU that is stood in and does its work late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from forcingkv.runtime.backends import Lane, cuda_memory
from forcingkv.runtime.backends.cuda_memory import PAGE
from tests.runtime.engine_world import World


@pytest.fixture
def world(bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> World:
    return World(bundles("forcing-kv"), monkeypatch)


@pytest.fixture
def lane(world: World) -> Iterator[Lane]:
    lane = world.lane()
    yield lane
    lane.close()


def test_an_array_comes_back_as_it_was_written(lane: Lane) -> None:
    for dtype in ("float32", "float16", "int32", "int64", "uint8", "bfloat16"):
        kind = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        array = np.arange(60).astype(kind).reshape(3, 4, 5)
        tensor = lane.tensor(array.shape, dtype)
        assert (tensor.shape, tensor.dtype, tensor.nbytes) == (array.shape, dtype, array.nbytes)
        tensor.write(array, lane.main)
        found = tensor.fetch(lane.main).array()
        assert found.dtype == kind
        np.testing.assert_array_equal(found, array)
        tensor.write(array[::-1].transpose(0, 2, 1).copy().transpose(0, 2, 1), lane.main)
        np.testing.assert_array_equal(tensor.fetch(lane.main).array(), array[::-1])


def test_bfloat16_crosses_as_its_bits_and_nothing_else_does(lane: Lane) -> None:
    tensor = lane.tensor((2,), "bfloat16")
    with pytest.raises(ValueError, match=r"float32 \(2,\) does not fit into bfloat16 \(2,\)"):
        tensor.write(np.zeros(2, np.float32), lane.main)
    tensor = lane.tensor((2,), "float32")
    with pytest.raises(ValueError, match=r"float32 \(3,\) does not fit"):
        tensor.write(np.zeros(3, np.float32), lane.main)
    tensor.write(np.array([0.5, 2.0], np.float64), lane.main)
    assert tensor.fetch(lane.main).array().tolist() == [0.5, 2.0]


def test_views_are_the_same_memory(lane: Lane) -> None:
    whole = lane.tensor((4, 6), "float32")
    whole.write(np.arange(24, dtype=np.float32).reshape(4, 6), lane.main)
    assert whole.first((2, 5)).fetch(lane.main).array().tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert whole.rows(1, 3).fetch(lane.main).array().ravel().tolist() == list(range(6, 18))
    assert whole.rows(1, 3).rows(1, 2).first((3,)).fetch(lane.main).array().tolist() == [12, 13, 14]
    whole.rows(1, 2).clear(lane.main)
    whole.rows(3, 4).write(np.full((1, 6), 9, np.float32), lane.main)
    found = whole.fetch(lane.main).array().tolist()
    assert found == [[0, 1, 2, 3, 4, 5], [0] * 6, [12, 13, 14, 15, 16, 17], [9] * 6]
    with pytest.raises(ValueError, match="does not lie within"):
        whole.first((25,))
    for start, stop in ((3, 2), (-1, 2), (0, 5)):
        with pytest.raises(ValueError, match="there are no rows"):
            whole.rows(start, stop)


def test_empty_tensors_have_an_address_and_hold_nothing(lane: Lane, world: World) -> None:
    for tensor in (lane.tensor((0, 3), "float32"), lane.tensor((2, 3), "float32").rows(2, 2)):
        assert tensor.nbytes == 0
        world.cuda.bytes_at(cast(Any, tensor).address, 1)
        tensor.write(np.empty((0, 3), np.float32), lane.main)
        tensor.clear(lane.main)
        assert tensor.fetch(lane.main).array().shape == (0, 3)


def test_what_is_shared_is_the_memory_itself(lane: Lane, world: World) -> None:
    frames = lane.tensor((4, 8, 12, 3), "uint8")
    view = frames.rows(1, 3).shared()
    assert (view.shape, view.strides, view.dtype) == ((2, 8, 12, 3), None, np.uint8)
    assert view.ptr == cast(Any, frames).address + 8 * 12 * 3
    assert view.__dlpack_device__()[0] == 2, "CUDA"
    assert view.exporting_obj.owner.kind == "device", "what frees the memory is kept alive"
    assert lane.tensor((2,), "bfloat16").shared().dtype == np.uint16


def test_no_staging_is_used_again_while_a_copy_needs_it(lane: Lane, world: World) -> None:
    """The fake copies when it is waited for: pinned memory that was overwritten before would show."""
    tensors = [lane.tensor((3,), "int32") for _ in range(100)]
    fetched = []
    for number, tensor in enumerate(tensors):
        tensor.write(np.full(3, number, np.int32), lane.main)
        fetched.append(tensor.fetch(lane.main))
        tensor.fetch(lane.main)  # dropped at once, on its way
    assert world.cuda.live["pinned"] <= 64 + len(tensors), "those on their way and those held, not more"
    assert [int(fetch.array()[0]) for fetch in fetched] == list(range(100))
    before = world.cuda.live["pinned"]
    for number, tensor in enumerate(tensors * 3):
        tensor.write(np.full(3, number, np.int32), lane.main)
        fetched.append(tensor.fetch(lane.main))
        assert fetched[-1].array().tolist() == [number] * 3
    assert world.cuda.live["pinned"] == before, "what was read is used again, whoever still holds it"


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of two pages, and eight pages of pinned memory."""
    monkeypatch.setattr(cuda_memory, "SLICE", 2 * PAGE)
    monkeypatch.setattr(cuda_memory, "PINNED", 8 * PAGE)
    monkeypatch.setattr(cuda_memory, "WAITED_FOR", 4 * PAGE)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("numbers", [1, 2 * PAGE, 2 * PAGE + 1, 4 * PAGE, 4 * PAGE + 1, 50 * PAGE + 7])
def test_arrays_of_any_size_come_and_go_through_little_pinned_memory(
    lane: Lane, world: World, numbers: int
) -> None:
    """In slices, the last of them shorter; the fake copies late: one that was used again too soon shows."""
    tensor, random = lane.tensor((numbers,), "uint8"), np.random.default_rng(numbers)
    array = random.integers(0, 256, numbers, np.uint8)
    tensor.write(array, lane.main)
    fetch = tensor.fetch(lane.main)
    tensor.clear(lane.main)  # what is fetched is what was there then
    np.testing.assert_array_equal(fetch.array(), array)
    assert not tensor.fetch(lane.main).array().any()
    assert pinned_bytes(world) <= 8 * PAGE


@pytest.mark.usefixtures("tight")
def test_a_whole_state_takes_no_more_pinned_memory_than_the_bound(lane: Lane, world: World) -> None:
    """`restore` writes everything in a row and waits for nothing: each had its own piece (GPU.md, C7)."""
    arrays = [
        np.full((size, 3), size % 251, np.uint8) for size in (9000, 5, 70_000, 1300, 2730, 40_000, 9000)
    ]
    tensors = [lane.tensor(array.shape, "uint8") for array in arrays]
    for _ in range(3):
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.write(array, lane.main)
            assert pinned_bytes(world) <= 8 * PAGE
        for tensor, array in zip(tensors, arrays, strict=True):
            np.testing.assert_array_equal(tensor.fetch(lane.main).array(), array)
            assert pinned_bytes(world) <= 8 * PAGE
    slices = {size for kind, size in world.cuda.sizes if kind == "pinned"}
    assert max(slices) == 2 * PAGE, "no piece is large"


@pytest.mark.usefixtures("tight")
def test_copies_that_nobody_has_read_yet_count_beside_the_bound(lane: Lane, world: World) -> None:
    """Waiting for their reader would be for ever."""
    tensor = lane.tensor((4 * PAGE,), "uint8")
    fetched = []
    for number in range(6):
        tensor.write(np.full(4 * PAGE, number, np.uint8), lane.main)
        fetched.append(tensor.fetch(lane.main))
    assert [set(fetch.array().tolist()) for fetch in fetched] == [{number} for number in range(6)]
    del fetched
    for _ in range(4):
        small = lane.tensor((10,), "uint8")
        small.write(np.zeros(10, np.uint8), lane.main)
    assert pinned_bytes(world) <= 8 * PAGE, "given back when others are needed"


@pytest.mark.usefixtures("tight")
def test_large_arrays_of_other_kinds_and_layouts_are_converted_in_slices(lane: Lane) -> None:
    wide = np.arange(12 * PAGE, dtype=np.float64).reshape(3, 4, PAGE).transpose(2, 0, 1)
    tensor = lane.tensor(wide.shape, "float32")
    tensor.write(wide, lane.main)
    found = tensor.fetch(lane.main).array()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wide.astype(np.float32))


def pinned_bytes(world: World) -> int:
    return sum(size for kind, size in world.cuda.sizes if kind == "pinned")


def test_a_fetch_is_the_callers_own(lane: Lane) -> None:
    tensor = lane.tensor((2,), "float32")
    tensor.write(np.array([1, 2], np.float32), lane.main)
    fetch = tensor.fetch(lane.main)
    array = fetch.array()
    array += 1
    assert fetch.array() is array
    tensor.clear(lane.main)
    assert tensor.fetch(lane.main).array().tolist() == [0, 0]
    assert array.tolist() == [2, 3]


def test_marks_take_time(lane: Lane) -> None:
    tensor = lane.tensor((1,), "float32")
    started = lane.main.mark()
    tensor.write(np.ones(1, np.float32), lane.main)
    written = lane.main.mark()
    assert written.since(started) == pytest.approx(0.003), "a copy between two events, a millisecond each"
    written.wait()
