"""Devices with streams, and CUDA graphs, on torch: stand-ins note what is asked of them, in its order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from forcingkv.runtime import Bundle, MemoryShortError
from forcingkv.runtime.backends import LaneOptions, torch_device, torch_graphs, torch_tensors
from forcingkv.runtime.backends.torch_device import Queues, StreamQueue
from forcingkv.runtime.backends.torch_graphs import Captured, CaptureWarning
from forcingkv.runtime.backends.torch_lane import open_lane
from forcingkv.runtime.backends.torch_tensors import TorchTensor
from forcingkv.runtime.faults import DeviceError
from tests.runtime.lanes import TORCH
from tests.runtime.videos import PROMPT, assert_same, video_of

Bundles = Callable[[str], Path]
GPU = SimpleNamespace(type="cuda")


class Device:
    """Stands for `torch.cuda`: its streams and events write down what is done, in which stream."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.inside: list[str] = []
        made = self

        class Stream:
            def __init__(self, device: object, priority: int) -> None:
                self.name = f"stream {priority}"

            def synchronize(self) -> None:
                made.told.append(("wait", self.name))

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Stream) -> None:
                made.told.append(("mark", stream.name))

            def synchronize(self) -> None:
                made.told.append(("reached",))

            def elapsed_time(self, other: object) -> float:
                return 1500.0

        self.Stream, self.Event = Stream, Event

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.inside.append(stream.name)
        yield
        self.inside.pop()

    def synchronize(self, device: object = None) -> None:
        self.told.append(("device",))

    def empty_cache(self) -> None:
        self.told.append(("empty",))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Queues are made on it; tensors lie on the CPU, and are taken for tensors of a device with streams."""
    made = Device()
    monkeypatch.setattr(torch_device.torch, "get_device_module", lambda _: made)
    return made


def test_queues_are_streams_and_decoding_is_urgent(device: Device) -> None:
    queues = Queues.on(GPU)  # type: ignore[arg-type]
    assert queues.beside
    names = [queue.stream.name for queue in (queues.main, queues.side) if isinstance(queue, StreamQueue)]
    assert names == ["stream 0", "stream -1"]
    first, second = queues.main.mark(), queues.main.mark()
    second.wait()
    assert second.since(first) == 1.5
    queues.wait()
    marks = [("mark", "stream 0")] * 2
    assert device.told == [*marks, ("reached",), ("wait", "stream 0"), ("wait", "stream -1")]


def test_copies_are_made_in_the_stream_by_way_of_pinned_memory(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[object, ...]] = []
    copy, zero, empty = torch.Tensor.copy_, torch.Tensor.zero_, torch.empty

    def noted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def doing(self: torch.Tensor, *given: Any, **named: Any) -> Any:
            done.append((name, *device.inside, *named.items()))
            return plain(self, *given, **named)

        return doing

    def pinned(*given: Any, pin_memory: bool = False, **named: Any) -> Any:
        if pin_memory:
            done.append(("pinned", *device.inside))
        return empty(*given, **named)

    monkeypatch.setattr(torch_tensors, "STREAMS", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "copy_", noted("copy", copy))
    monkeypatch.setattr(torch.Tensor, "zero_", noted("zero", zero))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append(("pin",)) or self)
    monkeypatch.setattr(torch, "empty", pinned)
    queue = StreamQueue(GPU, -1)  # type: ignore[arg-type]
    tensor = TorchTensor(torch.zeros(2, 3))
    tensor.write(np.arange(6, dtype=np.float32).reshape(2, 3), queue)
    fetch = tensor.fetch(queue)
    assert device.told == [("mark", "stream -1")], "nobody has waited"
    tensor.clear(queue)
    quick = ("non_blocking", True)
    assert done == [
        ("pin",),
        ("copy", "stream -1", quick),
        ("pinned", "stream -1"),
        ("copy", "stream -1", quick),
        ("zero", "stream -1"),
    ]
    np.testing.assert_array_equal(fetch.array(), np.arange(6).reshape(2, 3))
    assert device.told[-1] == ("reached",)
    assert fetch.array() is not None
    assert device.told.count(("reached",)) == 1, "what has come is not waited for again"


def test_a_video_with_queues_beside_each_other_is_the_same(
    bundles: Bundles, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session as on a GPU: two streams, a chunk ahead; closed, it waits for both before memory goes."""
    with TORCH.open(bundles("taehv")) as plain:
        wanted = video_of(plain)
    on = Queues.on
    monkeypatch.setattr(torch_tensors, "STREAMS", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *given, pin_memory=False, **named: empty(*given, **named))
    monkeypatch.setattr(Queues, "on", classmethod(lambda cls, _: on(GPU)))  # type: ignore[arg-type]
    monkeypatch.setattr(torch_device, "trim", lambda: device.told.append(("given back",)))
    session = TORCH.open(bundles("taehv"))
    lane: Any = session._memory().lane
    assert lane.lookahead == 1
    seen: list[tuple[str, str]] = []
    bind = lane.bind

    def noted(graph: str, *given: Any) -> Any:
        bound = bind(graph, *given)
        work = bound._work

        def noting() -> None:
            seen.append((graph, *device.inside))  # type: ignore[arg-type]
            work()

        bound._work = noting
        return bound

    lane.bind = noted
    assert_same(session.generate(PROMPT, seed=7, chunks=7), wanted)
    assert set(seen) == {("step", "stream 0"), ("decode", "stream -1")}
    order = [graph for graph, _ in seen]
    assert order.index("decode") == 2 * 3, "the passes of two chunks are in the queue before one is decoded"
    device.told.clear()
    session.close()
    # The last clean pass is asked for its time before the queues are waited for.
    assert device.told == [("reached",), ("wait", "stream 0"), ("wait", "stream -1"), ("given back",)]


class Cuda:
    """Stands for what `torch.cuda` has for graphs, and counts captures and replays."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal, self.captures, self.replays = refusal, 0, 0
        made = self

        class CUDAGraph:
            def replay(self) -> None:
                made.replays += 1

            def reset(self) -> None:
                pass

        self.CUDAGraph = CUDAGraph

    @contextmanager
    def graph(self, graph: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream, capture_error_mode) == ("pool", "the stream", "thread_local")
        self.captures += 1
        yield
        if self.refusal:
            raise self.refusal


def captured(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> Captured:
    monkeypatch.setattr(torch_graphs.torch, "cuda", cuda)
    queue = object.__new__(StreamQueue)
    queue.stream = "the stream"
    return Captured(queue, "step in phase 2", "pool")


def test_the_second_run_is_captured_and_later_ones_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, ran = Cuda(), []
    one = captured(monkeypatch, cuda)
    for _ in range(4):
        one.run(lambda: ran.append(one.capturing))
    assert ran == [False, True], "as it is, then captured"
    assert (cuda.captures, cuda.replays) == (1, 3)


def test_what_cannot_be_captured_is_said_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, ran = Cuda(RuntimeError("operation not permitted when stream is capturing")), []
    one = captured(monkeypatch, cuda)
    one.run(lambda: ran.append(one.capturing))
    with pytest.warns(CaptureWarning, match=r"step in phase 2 cannot be captured .*not permitted") as told:
        one.run(lambda: ran.append(one.capturing))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            one.run(lambda: ran.append(one.capturing))
    assert len(told) == 1
    assert (cuda.captures, cuda.replays) == (1, 0)
    assert ran == [False, True, False, False, False, False], "the second run too was done"


def test_memory_that_runs_out_in_a_capture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch then says that the capture cannot be ended."""

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    cuda = Cuda()
    one = captured(monkeypatch, cuda)
    one.run(lambda: None)
    cuda.graph = graph  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryShortError), torch_device.faults("a pass"):
        one.run(fails)


def test_a_lane_without_cuda_refuses_cuda_graphs(bundles: Bundles) -> None:
    with pytest.raises(Exception, match="are of no use on the device cpu; expected cuda"):
        open_lane(Bundle.open(bundles("full")).computing_in(None), LaneOptions("torch", cuda_graphs=True))


def test_free_memory_is_what_the_device_has_and_what_torch_keeps_of_it(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.mem_get_info = lambda _: (1000, 5000)  # type: ignore[attr-defined]
    device.memory_reserved = lambda _: 700  # type: ignore[attr-defined]
    device.memory_allocated = lambda _: 300  # type: ignore[attr-defined]
    assert torch_device.free_bytes(GPU) == 1400  # type: ignore[arg-type]
    torch_device.wait_for(GPU)  # type: ignore[arg-type]
    torch_device.give_back(GPU)  # type: ignore[arg-type]
    assert device.told == [("device",), ("empty",)]

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device, "synchronize", lambda _: lost())
    with pytest.raises(DeviceError, match="start a new one"):
        torch_device.wait_for(GPU)  # type: ignore[arg-type]
    monkeypatch.setattr(device, "empty_cache", lost)
    torch_device.give_back(GPU)  # type: ignore[arg-type]
