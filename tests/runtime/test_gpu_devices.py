"""Which GPU, at every call; a GPU that is lost; what is said of one that cannot be used."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import DeviceError, Session, devices
from forcingkv.runtime.backends import LaneOptions, onnxruntime
from forcingkv.runtime.backends.cuda import fault
from forcingkv.runtime.engines import cuda_core, device_sm, why_no_gpu
from forcingkv.runtime.memory import device_free_bytes
from forcingkv.runtime.preflight import check_memory
from tests.runtime.engine_world import World
from tests.runtime.fake_streams import FakeCudaError
from tests.runtime.videos import PROMPT, assert_same, video_of

Bundles = Callable[[str], Path]


@pytest.fixture
def world(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(bundles("forcing-kv"), monkeypatch)


def opened(world: World, **options: Any) -> Session:
    return Session.open(world.bundle, backend="tensorrt-rtx", preflight=False, **options)


NAMES = {None: 0, "cuda": 0, "cuda:0": 0, "cuda:1": 1, "cuda:12": 12}


@pytest.mark.parametrize("name", NAMES)
def test_devices_have_names(name: str | None) -> None:
    assert devices.cuda_number(name, "tensorrt") == NAMES[name]


@pytest.mark.parametrize(
    "name", ["", "cpu", "mps", "cuda:", "cuda:-1", "cuda:1 ", "CUDA", "cuda:٣", "cuda:1:2"]
)
def test_what_is_no_gpu_of_nvidia_is_refused(world: World, name: str) -> None:
    with pytest.raises(InputError, match=r"^--device is .*; expected cuda, cuda:0.*: tensorrt-rtx runs on"):
        opened(world, device=name)


@pytest.mark.parametrize("number", [0, 1])
def test_everything_is_done_on_the_device_that_was_asked_for(world: World, number: int) -> None:
    """The fakes refuse a call while another device is the thread's current one."""
    with opened(world, device=f"cuda:{number}", cuda_graphs=True, frames="device") as session:
        chunk = video_of(session, 3)[-1]
        with session.sibling(preflight=False) as sibling:
            video_of(sibling, 2)
        assert chunk.frames.__dlpack_device__() == (2, number)
        assert {stream.device for stream in world.cuda.streams.values()} == {number}
        assert session.runs_on == ("the GPU (TensorRT)" if number == 0 else "the GPU cuda:1 (TensorRT)")
    del chunk
    assert world.left == {}


@pytest.mark.parametrize("callers", [0, 1, None])
@pytest.mark.parametrize("number", [0, 1])
def test_the_device_is_current_at_every_call_and_the_callers_own_after_it(
    world: World, callers: int | None, number: int
) -> None:
    """Another library may choose a device between any two calls, and is to find it again."""
    me, found = threading.get_ident(), []
    with opened(world, device=f"cuda:{number}") as session:
        expected = video_of(session, 3)
        video = session.generate(PROMPT, seed=7, chunks=3)
        for _ in range(3):
            if callers is None:
                world.cuda.current.pop(me)
            else:
                world.cuda.current[me] = callers
            found.append(next(video))
            assert world.cuda.current[me] == (number if callers is None else callers)
        assert_same(found, expected)
        world.cuda.current[me] = 1 - number
    assert world.left == {}


def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(world: World) -> None:
    with pytest.raises(
        InputError, match=r"there is no GPU cuda:7; expected one of 2, .*CUDA_VISIBLE_DEVICES"
    ):
        opened(world, device="cuda:7")


def test_free_memory_is_that_of_the_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 1000, 1: 2000}
    runtime = SimpleNamespace(cudaMemGetInfo=lambda: (0, free[world.cuda.here or 0], 5000))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    world.cuda.current[threading.get_ident()] = 1
    assert (device_free_bytes(), device_free_bytes(1)) == (1000, 2000)
    assert world.cuda.here == 1, "the caller's"
    with pytest.raises(InputError, match=r"on the GPU cuda:1.*|2\.00 kB"):
        check_memory(world.bundle, LaneOptions("tensorrt-rtx", device="cuda:1"))
    runtime.cudaMemGetInfo = lambda: (2, 0, 0)
    with pytest.raises(InputError, match=r"the GPU cuda:0 does not say how much memory is free \(2\)"):
        device_free_bytes()


LOST = [
    "CUDA_ERROR_ILLEGAL_ADDRESS: While executing a kernel, the device encountered a load or store",
    "CUDA_ERROR_LAUNCH_FAILED: An exception occurred on the device while executing a kernel",
    "CUDA_ERROR_LAUNCH_TIMEOUT: This indicates that the device kernel took too long to execute",
    "CUDA_ERROR_ASSERT: A device-side assert triggered during kernel execution",
    "CUDA_ERROR_ECC_UNCORRECTABLE: This indicates that an uncorrectable ECC error was detected",
    "CUDA_ERROR_HARDWARE_STACK_ERROR: While executing a kernel, the device encountered a stack error",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchFailure",
    "cudaErrorAssert",
    "Error Code 1: Cuda Runtime (an illegal memory access was encountered)",
    "CUDA error: device-side assert triggered",
    "unspecified launch failure",
]
NOT_LOST = [
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUDA_ERROR_INVALID_VALUE",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    "CUDA_ERROR_NOT_READY",
    "CUDA_ERROR_INVALID_CONTEXT",
    "could not allocate",
    "AssertionError: no kernels",
]


@pytest.mark.parametrize("said", LOST)
def test_errors_that_end_a_process_s_use_of_a_gpu_are_known(said: str) -> None:
    assert devices.is_sticky(said)
    assert f"({said}), and this process cannot use the GPU any more" in str(fault("run step", said))


@pytest.mark.parametrize("said", ["CUDA failure 700: an illegal memory access was encountered", LOST[0]])
def test_every_backend_says_that_a_new_process_is_needed(said: str) -> None:
    from forcingkv.runtime.backends.torch_device import faults

    with (
        pytest.raises(DeviceError, match="this process cannot use the GPU any more: start a new one"),
        faults("a"),
    ):
        raise RuntimeError(said)
    for error in (onnxruntime._fault("step", RuntimeError(said)), fault("run step", said)):
        assert "this process cannot use the GPU any more: start a new one" in str(error)


@pytest.mark.parametrize("said", NOT_LOST)
def test_other_errors_are_not_taken_for_such(said: str) -> None:
    assert not devices.is_sticky(said)
    assert "process" not in str(fault("run step", said))


def test_a_lost_gpu_is_told_at_once_and_another_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = opened(world, device="cuda:1")
    with opened(world) as session, session.sibling(preflight=False) as sibling:
        video = session.generate(PROMPT, seed=1, chunks=4)
        next(video)
        world.cuda.lost = FakeCudaError(LOST[0])
        with pytest.raises(DeviceError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS.*start a new one"):
            list(video)
        told = r"^cuda:0 failed before \(.*ILLEGAL_ADDRESS.*\), and this process cannot .* start a new one"
        uses: list[Callable[[], object]] = [
            lambda: session.generate(PROMPT, seed=1, chunks=1),
            lambda: sibling.generate(PROMPT, seed=1, chunks=1),
            lambda: session.sibling(preflight=False),
            lambda: opened(world),
            lambda: device_free_bytes(),
            lambda: check_memory(world.bundle, LaneOptions("tensorrt-rtx")),
        ]
        for use in uses:
            asked = len(world.cuda.calls)
            with pytest.raises(DeviceError, match=told):
                use()
            assert len(world.cuda.calls) == asked, "nothing is asked of it any more"
    # Closing both raised nothing: there is nothing to give back, and the first error is the one to show.
    assert len(video_of(other, 2)) == 2
    other.close()


def test_a_gpu_that_is_lost_while_a_lane_closes_is_told(world: World) -> None:
    lane = world.lane()
    world.cuda.lost = FakeCudaError(LOST[1])
    with pytest.raises(DeviceError, match=r"could not close the lane .*LAUNCH_FAILED.*start a new one"):
        lane.close()
    with pytest.raises(DeviceError, match="the lane is closed"):
        lane.tensor((1,), "float32")


def core(version: str | None) -> Any:
    return SimpleNamespace(**({} if version is None else {"__version__": version}))


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("0.3.2", False),
        ("0.9", False),
        ("1.0.0", True),
        ("1.2.2", True),
        ("1.0.0rc1", True),
        ("10.1", True),
        (None, True),
    ],
)
def test_a_cuda_core_that_is_too_old_is_refused(
    version: str | None, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", core(version))
    if good:
        assert cuda_core() is sys.modules["cuda.core"]
    else:
        with pytest.raises(
            InputError, match=rf"cuda-core is version {version}; expected 1\.0 or newer.*pip "
        ):
            cuda_core()


def test_an_old_cuda_core_is_told_when_a_session_opens(world: World) -> None:
    world.cuda.__version__ = "0.7.0"
    with pytest.raises(InputError, match=r"cuda-core is version 0\.7\.0; expected 1\.0 or newer"):
        opened(world)


def test_why_there_is_no_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CUDA_ERROR_NO_DEVICE: no CUDA-capable devices were detected"

    def device(number: int) -> None:
        raise FakeCudaError(said)

    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=device))
    assert (device_sm(), why_no_gpu()) == (None, said)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert device_sm() is None
    assert "needs cuda-core, which is not installed" in str(why_no_gpu())


def test_decoding_comes_before_passes_on_the_gpu(world: World) -> None:
    lane: Any = world.lane()
    assert (lane.main.stream.priority, lane.side.stream.priority) == (None, -1)
    lane.close()
