"""What goes wrong on a GPU: it is told in our words, and all that was taken is given back."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from forcingkv.prune import plugin
from forcingkv.runtime.backends import Lane, LaneOptions
from forcingkv.runtime.backends.tensorrt import open_lane
from forcingkv.runtime.faults import DeviceError, GoingOnWarning, MemoryShortError
from tests.runtime.engine_world import World
from tests.runtime.fake_streams import FakeCudaError
from tests.runtime.lane_driver import Driver

UNCLOSED = {"context", "engine", "event", "view"}
"""What has no `close` or is often dropped without: TensorRT's objects, marks, views of memory."""


@pytest.fixture
def world(bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> World:
    return World(bundles("forcing-kv"), monkeypatch)


def test_too_little_memory_is_told_with_the_bytes(world: World) -> None:
    lane = world.lane()
    room = world.cuda.room
    with pytest.raises(MemoryShortError, match=rf"not enough memory for .*GB more \({4 * room + 4} bytes\)"):
        lane.tensor((room + 1,), "float32")
    lane.close()
    world.reset(room=1000)
    with pytest.raises(MemoryShortError, match=r"5\.00 kB more \(5000 bytes\)"):
        world.lane()
    assert world.left == {}


def decode_pass(lane: Lane) -> Callable[[], None]:
    latents, frames = lane.tensor((1, 3, 3, 8, 12), "float32"), lane.tensor((3, 8, 12, 3), "uint8")
    bound = lane.bind("decode", 0, {"latents": latents}, {"frames": frames})
    return lambda: bound.run()


def test_a_refusal_tells_graph_and_phase_and_what_tensorrt_said(world: World) -> None:
    lane = world.lane()
    run = decode_pass(lane)
    world.tensorrt.refuse_at = world.tensorrt.refusable + 2
    with pytest.raises(DeviceError, match=r"could not run decode in phase 0 \(.*execute_async_v3: as"):
        run()
    run()
    world.tensorrt.refuse_at = world.tensorrt.refusable  # its addresses are set
    world.tensorrt.says = "[resizeAllocator] Requested amount of GPU memory (1 bytes): out of memory"
    with pytest.raises(MemoryShortError, match="could not run decode in phase 0"):
        run()
    lane.close()


@pytest.mark.parametrize("refused", [False, True])
def test_what_the_plugin_raised_comes_first(world: World, refused: bool) -> None:
    lane = world.lane()
    run = decode_pass(lane)
    world.tensorrt.refuse_at = world.tensorrt.refusable + 2 if refused else None
    plugin._errors.add(RuntimeError("DynamicPrune has no kernels"))
    with pytest.raises(DeviceError, match=r"decode in phase 0 \(RuntimeError: DynamicPrune has no kernels\)"):
        run()
    plugin.raise_plugin_error()
    lane.close()


def test_a_closed_lane_gives_all_back_and_refuses_everything(world: World) -> None:
    room = world.cuda.room
    lane = world.lane()
    run, tensor = decode_pass(lane), lane.tensor((2,), "float32")
    main, fetch, mark = lane.main, tensor.fetch(lane.main), lane.main.mark()
    lane.close()
    lane.close()
    uses: list[Callable[[], object]] = [
        run,
        main.mark,
        fetch.array,
        partial(lane.tensor, (2,), "float32"),
        partial(tensor.fetch, main),
        partial(tensor.write, np.zeros(2, np.float32), main),
        partial(tensor.clear, main),
        partial(lane.bind, "decode", 0, {}, {}),
        lane.sibling,
    ]
    assert world.cuda.left == {}, "all is closed, whoever still holds it"
    for use in uses:
        with pytest.raises(DeviceError, match="closed"):
            use()
    del run, tensor, fetch, mark, use, uses
    assert world.cuda.room == room
    assert world.left == {}


def short_run(world: World) -> None:
    """A lane from its opening to its end: every kind of call, and CUDA graphs."""
    lane = open_lane(world.bundle, LaneOptions("tensorrt-rtx", cuda_graphs=True))
    try:
        driver = Driver(lane, world.bundle)
        driver.start()
        driver._pass(0, "noisy").run()
        started = lane.side.mark()
        driver._decoded["latents"].clear(lane.side)
        for _ in range(3):
            driver._decode.run()
        driver._decoded["frames"].shared()
        for _ in range(2):
            driver._decoded["frames"].fetch(lane.main).array()
        lane.main.mark().since(started)
    finally:
        lane.close()


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Python looks through what the test makes alone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def outcome(world: World) -> Exception | None:
    """What a short run raises, without what it refers to."""
    try:
        short_run(world)
    except Exception as error:
        return error.with_traceback(None)
    return None


def outcome_and_warnings(world: World) -> tuple[Exception | None, list[type[Warning]]]:
    """What a short run raises, and the kinds of its warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return outcome(world), [warning.category for warning in told]


@pytest.mark.usefixtures("quick_collection")
@pytest.mark.parametrize(
    "failure",
    [
        FakeCudaError("CUDA_ERROR_LAUNCH_FAILED"),
        FakeCudaError("CUDA_ERROR_OUT_OF_MEMORY"),
        FakeCudaError("CUDA_ERROR_INVALID_VALUE"),
    ],
    ids=str,
)
def test_whatever_call_fails_everything_is_given_back(world: World, failure: Exception) -> None:
    world.reset(computes=False)
    assert outcome(world) is None
    assert world.left == {}
    assert set(world.cuda.dropped) == UNCLOSED | {"device"}
    assert world.cuda.dropped["device"] == 1, "the frames that were shared, whoever still had them"
    calls = world.cuda.calls
    assert len(set(calls)) > 30, "the run is to call everything that is called at all"
    expected = MemoryShortError if "MEMORY" in str(failure) else DeviceError
    begun = {"Stream.create_graph_builder", "GraphBuilder.begin_building", "GraphBuilder.end_building"}
    capturing = begun | {"GraphBuilder.complete", "Builder.close", "IExecutionContext.execute_async_v3"}
    costs_the_graph, gone_on = "INVALID" in str(failure), set[str]()
    for number, name in enumerate(calls):
        if (name == "Device.set_current" and number % 9) or (costs_the_graph and name not in capturing):
            continue  # all else is as with the others, and takes as long
        world.reset(computes=False)
        world.cuda.fail_at, world.cuda.failure = number, failure
        error, told = outcome_and_warnings(world)
        if told:  # all but memory that is short, and a GPU that is lost, only costs the CUDA graph
            assert (told, error) == ([GoingOnWarning], None)
            gone_on.add(name)
        else:
            assert type(error) is expected, (number, name, error)
        del error
        failure.__traceback__ = None
        assert world.left == {}, (number, name)
        dropped = sum(count for kind, count in world.cuda.dropped.items() if kind not in UNCLOSED)
        assert dropped <= 3, "that whose closing failed, what was not yet known, and what was shared"
    assert gone_on == (capturing if costs_the_graph else set())


@pytest.mark.usefixtures("quick_collection")
def test_whatever_tensorrt_refuses_everything_is_given_back(world: World) -> None:
    world.reset(computes=False)
    assert outcome(world) is None
    refusable, captures = world.tensorrt.refusable, 0
    for number in range(refusable):
        world.reset(computes=False)
        world.tensorrt.refuse_at = number
        error, told = outcome_and_warnings(world)
        if told:
            assert (told, error) == ([GoingOnWarning], None), "a capture that is refused"
            captures += 1
        else:
            assert type(error) is DeviceError
            assert "as the test wants it" in str(error)
        del error
        assert world.left == {}, number
    assert refusable > 50
    assert captures == 1
