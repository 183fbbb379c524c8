"""Errors and logs belong to the session, and the thread, that caused them."""

from __future__ import annotations

import _thread
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forcingkv.prune import plugin
from forcingkv.runtime import DeviceError, MemoryShortError, NotFiniteError, Session
from forcingkv.runtime.flavour import Told
from forcingkv.runtime.positions import chunk_noise
from tests.runtime.engine_world import World
from tests.runtime.videos import PROMPT, assert_same, python, video_of

Bundles = Callable[[str], Path]


def elsewhere(doing: Callable[[], Any]) -> Any:
    """What it gives in another thread, which has ended."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(doing).result()


def test_what_is_told_goes_to_the_thread_that_asked() -> None:
    told: Told[str] = Told()
    told.add("mine")
    elsewhere(lambda: told.add("yours"))
    assert elsewhere(told.take) == []
    assert told.take() == ["mine"]
    assert told.take() == []


def test_what_a_foreign_thread_told_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Told[str] = Told()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "enumerate", list)  # as a thread of TensorRT's own is no thread of Python's
        told.add("from within")
    told.add("mine")
    assert told.take() == ["mine"]
    assert elsewhere(told.take) == ["from within"]
    assert told.take() == []


def test_a_thread_of_tensorrts_is_foreign_whatever_was_asked_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`threading.current_thread()` makes a thread of `threading`'s of any thread, as logging does."""
    told: Told[str] = Told()
    foreign: list[threading.Thread] = []

    def works(_: object = None) -> None:
        foreign.append(threading.current_thread())
        told.add("from within")

    started = threading.Event()
    _thread.start_new_thread(lambda: (works(), started.set()), ())
    assert started.wait(10)
    assert isinstance(foreign[0], threading._DummyThread)  # type: ignore[attr-defined]
    assert elsewhere(told.take) == ["from within"]


def test_a_thread_that_asked_once_is_told_its_own() -> None:
    """A host program may run sessions in threads that Python did not start."""
    told: Told[str] = Told()
    found: list[list[str]] = []
    asked, done = threading.Event(), threading.Event()

    def works() -> None:
        told.take()
        told.add("mine")
        asked.set()
        done.wait(10)
        found.append(told.take())
        asked.set()

    _thread.start_new_thread(works, ())
    assert asked.wait(10)
    asked.clear()
    assert told.take() == []
    done.set()
    assert asked.wait(10)
    assert found == [["mine"]]


def test_a_refusal_names_only_what_tensorrt_said_in_this_thread(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in one thread does not make another's failure one of memory."""
    world = World(bundles("forcing-kv"), monkeypatch)
    with (
        Session.open(world.bundle, backend="tensorrt-rtx", preflight=False) as one,
        one.sibling(preflight=False) as other,
    ):
        expected = video_of(one, 2)

        def fails(session: Session, says: str, kind: type[Exception]) -> str:
            video = session.generate(PROMPT, seed=7, chunks=2)
            world.tensorrt.says = says
            world.tensorrt.refuse_at = world.tensorrt.refusable + 3
            with pytest.raises(kind) as raised:
                list(video)
            return str(raised.value)

        first = elsewhere(lambda: fails(one, "out of memory, of one", MemoryShortError))
        second = fails(other, "of other", DeviceError)
        assert "out of memory, of one" in first
        assert "of one" not in second
        assert "of other" in second
        assert_same(video_of(one, 2), expected)
        assert_same(video_of(other, 2), expected)


def test_words_of_an_earlier_call_are_not_given_as_the_reason(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forcingkv.runtime.backends import tensorrt_engines as backend

    world = World(bundles("forcing-kv"), monkeypatch)
    with Session.open(world.bundle, backend="tensorrt-rtx", preflight=False) as session:
        video = session.generate(PROMPT, seed=7)
        next(video)
        backend._hear("ERROR", "out of memory, but it went on")
        world.tensorrt.refuse_at = world.tensorrt.refusable + 5
        with pytest.raises(DeviceError) as raised:
            next(video)
        assert "as the test wants it" in str(raised.value)
        assert "it went on" not in str(raised.value)


def test_what_a_plugin_raised_is_raised_in_the_thread_that_ran_it() -> None:
    elsewhere(lambda: plugin._errors.add(RuntimeError("of another session")))
    plugin.raise_plugin_error()
    plugin._errors.add(RuntimeError("of this one"))
    elsewhere(plugin.raise_plugin_error)
    with pytest.raises(RuntimeError, match="of this one"):
        plugin.raise_plugin_error()
    plugin.raise_plugin_error()


HEARD = """
import json, threading
from forcingkv.runtime.backends import tensorrt_engines as backend
from forcingkv.runtime.flavour import choose, make_log, trt

choose("tensorrt-rtx")
runtime, barrier, found = trt.Runtime(make_log(backend._hear)), threading.Barrier(2), {}

def work(name, content):
    barrier.wait()
    for _ in range(20):
        if content:
            runtime.deserialize_cuda_engine(content)
    found[name] = backend.last_words()

threads = [threading.Thread(target=work, args=given) for given in (("bad", b"no engine"), ("good", b""))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({"here": backend.last_words(), **found}))
"""


def test_tensorrt_itself_reports_in_the_thread_that_asked() -> None:
    pytest.importorskip("tensorrt_rtx")
    found = json.loads(python(HEARD).splitlines()[-1])
    assert found["bad"].count("Error Code") >= 20
    assert found["good"] == found["here"] == ""


def test_a_video_that_fails_in_one_thread_leaves_its_siblings_alone(bundles: Bundles) -> None:
    """Errors of ONNX Runtime and NaN, while a sibling on the same graphs makes its video."""
    with Session.open(bundles("forcing-kv"), threads=1) as one, one.sibling() as other:
        expected = video_of(other)

        def noise(chunk: int, step: int, shape: tuple[int, ...]) -> Any:
            made = chunk_noise(1, chunk, step, shape)
            return made * float("nan") if (chunk, step) == (2, 0) else made

        def fail() -> list[Exception | None]:
            raised: list[Exception | None] = []
            for _ in range(4):
                try:
                    list(one.generate(PROMPT, seed=1, noise=noise))
                    raised.append(None)
                except NotFiniteError as error:
                    raised.append(error)
            return raised

        with ThreadPoolExecutor(1) as pool:
            failing = pool.submit(fail)
            videos = [video_of(other) for _ in range(4)]
            assert [error and error.chunk for error in failing.result()] == [2] * 4  # type: ignore[attr-defined]
        for video in videos:
            assert_same(video, expected)
