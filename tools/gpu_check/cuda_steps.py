"""Steps about what the runtime does with CUDA itself: streams, graphs, memory, contexts, shared frames."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil

from forcingkv.runtime.backends.cuda import CudaQueue, Gpu
from forcingkv.runtime.backends.cuda_memory import CudaMemory, CudaTensor
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.faults import MemoryShortError
from tools.gpu_check.check import Check
from tools.gpu_check.machine import free_bytes
from tools.gpu_check.stand_ins import cuda, drop_current, left_over

COUNT = 4096


class Place:
    """A GPU with two queues and memory, as a lane has them."""

    def __init__(self) -> None:
        self.gpu = Gpu()
        self.main, self.side = CudaQueue(self.gpu), CudaQueue(self.gpu)
        self.memory = CudaMemory(self.gpu, self.main)

    def filled(self, value: float) -> CudaTensor:
        """A tensor (COUNT,) float32 that holds a value."""
        tensor = self.memory.tensor((COUNT,), "float32")
        tensor.write(np.full(COUNT, value, np.float32), self.main)
        return tensor

    def holds(self, tensor: CudaTensor) -> float:
        """What all of a tensor holds; NaN where it is not one value."""
        array = tensor.fetch(self.main).array()
        return float(array[0]) if (array == array[0]).all() else math.nan


@contextmanager
def place(check: Check) -> Iterator[Place]:
    """A place; what it took has to be given back."""
    with cuda(check) as core:
        made = Place()
        yield made
        made.gpu.close()
        gc.collect()
        check.expect(not left_over(core), f"not given back: {left_over(core)}")


def in_thread(work: Callable[[], object]) -> None:
    """Do it in a new thread, and raise what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in raised:
        raise error


def graphs(check: Check) -> None:
    """Two captured graphs on two sets of buffers keep apart, whatever else happens meanwhile."""
    with place(check) as here:
        sources, targets = [here.filled(1), here.filled(2)], [here.filled(0), here.filled(0)]

        def copying(target: CudaTensor, source: CudaTensor) -> Callable[[], None]:
            return lambda: target.copy_from(source, here.main)

        work = [copying(target, source) for target, source in zip(targets, sources, strict=True)]
        for one in work:
            one()
        replay = [here.main.captured(one, f"copy {number}") for number, one in enumerate(work)]
        for turn, (which, value) in enumerate([(0, 5.0), (1, 6.0), (0, 7.0), (1, 8.0)]):
            sources[which].write(np.full(COUNT, value, np.float32), here.main)
            replay[which]()
            found = here.holds(targets[which])
            check.expect(
                found == value, f"replay {turn} of graph {which} copied {found}, and {value} was there"
            )
        _captured_beside_others(check, here)
        _capture_that_fails(check, here)


def _captured_beside_others(check: Check, here: Place) -> None:
    """Capture while another thread takes memory of its own, on the device and pinned, and gives it back."""
    source, target = here.filled(3), here.filled(0)
    stop, turns = threading.Event(), [0]

    def others() -> None:
        while not stop.is_set():
            other = Place()
            other.holds(other.filled(4))
            other.gpu.close()
            turns[0] += 1

    def work() -> None:
        target.copy_from(source, here.main)
        if check.gpu:  # the stand-in's threads share a list of what is left to do
            time.sleep(0.05)

    if check.gpu:
        thread = threading.Thread(target=others)
        thread.start()
    try:
        replays = [here.main.captured(work, "a copy beside others") for _ in range(10 if check.gpu else 1)]
    finally:
        stop.set()
        if check.gpu:
            thread.join()
    for replay in replays:
        target.clear(here.main)
        replay()
        check.expect(
            here.holds(target) == 3, "a graph captured beside another thread's memory copies wrongly"
        )
    check.note(turns_of_the_other_thread=turns[0])


def _capture_that_fails(check: Check, here: Place) -> None:
    """What raises in a capture leaves the stream usable."""
    source, target = here.filled(9), here.filled(0)

    def work() -> None:
        target.copy_from(source, here.main)
        raise MemoryShortError("as the check wants it")

    try:
        here.main.captured(work, "what fails")
    except MemoryShortError:
        pass
    else:
        check.fail("an error in a capture did not come out")
    target.copy_from(source, here.main)
    check.expect(here.holds(target) == 9, "after a capture that failed the stream copies wrongly")


def memory(check: Check) -> None:
    """Arrays come back as they went, from two threads too; what is taken is given back."""
    before = _free(check)
    with place(check) as here:
        _round_trips(check, here)
        _two_threads(check, here, 1000 if check.gpu else 100)
        _too_much(check, here)
        if check.gpu:
            _pinned(check, here)
        late = here.filled(1).fetch(here.main)
    try:
        late.array()
    except Exception as error:
        check.note(fetch_after_close=type(error).__name__)
    else:
        check.fail("a copy was read after its lane was closed")
    if check.gpu:
        missing = before - _free(check)
        check.note(bytes_not_given_back=missing)
        check.expect(missing < 64 << 20, f"{missing:,} bytes of the GPU were not given back")


def _free(check: Check) -> int:
    if not check.gpu:
        return 0
    from tools.gpu_check.pruning import core

    core().Device(0).set_current()
    core().Device(0).sync()
    return free_bytes()


def _round_trips(check: Check, here: Place) -> None:
    random, dtypes = np.random.default_rng(0), list(DTYPES.values())
    for one in dtypes:
        host = np.dtype(one.bits)
        tensor = here.memory.tensor((3, 5, 7), one.name)
        array = random.integers(0, 2 if one.name == "bool" else 100, (3, 5, 7)).astype(host)
        tensor.write(array, here.main)
        part = tensor.rows(1, 3)
        for found, wanted in (
            (tensor, array),
            (part, array[1:3]),
            (tensor.first((2, 5)), array.ravel()[:10]),
        ):
            came = found.fetch(here.main).array()
            check.expect((came.ravel() == wanted.ravel()).all(), f"{one.name} did not come back as it went")
        tensor.clear(here.main)
        check.expect(not tensor.fetch(here.main).array().any(), f"{one.name} was not cleared")
    check.note(dtypes=[one.name for one in dtypes])


def _two_threads(check: Check, here: Place, times: int) -> None:
    """Many writes and fetches that nobody waits for, from a thread for each queue."""
    wrong: list[str] = []

    def work(queue: CudaQueue, sign: int) -> None:
        tensor = here.memory.tensor((COUNT,), "float32")
        fetches = []
        for number in range(times):
            tensor.write(np.full(COUNT, sign * number, np.float32), queue)
            fetches.append(tensor.fetch(queue))
            if number % 50 == 49:
                kept, fetches = fetches, []
                first = number - len(kept) + 1
                found = [float(fetch.array()[-1]) for fetch in kept]
                if found != [sign * (first + place) for place in range(len(kept))]:
                    wrong.append(f"{found}")

    threads = [threading.Thread(target=work, args=one) for one in ((here.main, 1), (here.side, -1))]
    for thread in threads:
        thread.start()
        if not check.gpu:  # the stand-in's queues are no threads
            thread.join()
    for thread in threads:
        thread.join()
    check.expect(not wrong, f"copies of two threads mix: {wrong[:1]}")
    check.note(copies=2 * times)


def _too_much(check: Check, here: Place) -> None:
    try:
        here.memory.tensor((200, 1 << 30), "uint8")
    except MemoryShortError as error:
        check.note(too_much=str(error)[:160])
    else:
        check.fail("200 GiB were given")
    check.expect(here.holds(here.filled(4)) == 4, "after a refusal memory is not usable")


def _pinned(check: Check, here: Place) -> None:
    """What pinned memory costs, and how much of it writing a large state takes."""
    process, piece = psutil.Process(), 256 << 20
    began, before = time.perf_counter(), process.memory_info().rss
    taken = here.memory.take(1 << 30)
    seconds = time.perf_counter() - began
    here.memory.give(taken)
    array = np.ones(piece, np.uint8)
    tensors = [here.memory.tensor((piece,), "uint8") for _ in range(16)]
    began, most = time.perf_counter(), 0
    for tensor in tensors:
        tensor.write(array, here.main)
        most = max(most, process.memory_info().rss - before)
    here.main.sync()
    check.note(
        pinned_seconds_a_gib=seconds,
        restore_of_4_gib_seconds=time.perf_counter() - began,
        restore_of_4_gib_host_bytes=most,
    )


def contexts(check: Check) -> None:
    """The GPU is current in every call: in a new thread, and where something took it away."""
    with place(check) as here:
        tensor = here.filled(1)
        in_thread(lambda: check.expect(here.holds(tensor) == 1, "a new thread reads something else"))

        def without_context() -> None:
            check.expect(here.holds(tensor) == 1, "a new thread reads something else")
            drop_current(check, here.gpu.core)
            tensor.write(np.full(COUNT, 2, np.float32), here.main)

        try:
            in_thread(without_context)
        except BaseException as error:
            check.fail(f"once another library changed the current context: {type(error).__name__}: {error}")
        check.expect(here.holds(tensor) == 2, "what was written after the context was lost is not there")


def shared(check: Check) -> None:
    """Memory that is shown by DLPack is what is there, views too, and stays while somebody has it."""
    with place(check) as here:
        kept = _shown(check, here)
    if not check.gpu:
        return
    import torch

    torch.empty(64 << 20, dtype=torch.uint8, device="cuda").fill_(255)
    torch.cuda.synchronize()
    stale = [bool((found.cpu().numpy() != wanted).any()) for found, wanted in kept]
    check.note(stale_after_close=stale)
    check.expect(not any(stale), "frames that torch still holds changed when the lane was closed")


def _shown(check: Check, here: Place) -> list[tuple[Any, Any]]:
    """Show memory and a view of it: what torch sees, and what it has to be; nothing without a GPU."""
    tensor = here.memory.tensor((6, COUNT), "uint8")
    array = np.arange(6 * COUNT, dtype=np.uint32).astype(np.uint8).reshape(6, COUNT)
    tensor.write(array, here.main)
    here.main.sync()
    kept = []
    for view, wanted in ((tensor, array), (tensor.rows(2, 5), array[2:5])):
        shown: Any = view.shared()
        if not check.gpu:
            held = here.gpu.core.bytes_at(shown.ptr, wanted.size).reshape(wanted.shape)
            check.expect((held == wanted).all(), "what is shown is not what is there")
            continue
        from torch.utils.dlpack import from_dlpack

        found = from_dlpack(shown)
        told = str(found.device), str(found.dtype), tuple(found.shape), found.is_contiguous()
        check.expect(told == ("cuda:0", "torch.uint8", wanted.shape, True), f"torch sees {told}")
        check.expect((found.cpu().numpy() == wanted).all(), "what torch sees is not what is there")
        kept.append((found, wanted))
    return kept
