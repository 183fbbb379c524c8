"""Contexts of TensorRT: which pass runs in which, what is set anew, what is captured, what is compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forcingkv.prune import launchers
from forcingkv.runtime import DeviceError, GoingOnWarning, MemoryShortError, Session
from forcingkv.runtime.backends import Lane
from forcingkv.runtime.backends.tensorrt_cache import FOLDER
from tests.runtime.engine_world import World
from tests.runtime.fake_streams import FakeCudaError
from tests.runtime.videos import assert_same, video_of

Bundles = Callable[[str], Path]
CHUNKS = 7


@pytest.fixture
def world(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(bundles("forcing-kv"), monkeypatch)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's caches lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "forcingkv" / FOLDER


def opened(world: World, **options: Any) -> Session:
    return Session.open(world.bundle, backend="tensorrt-rtx", preflight=False, **options)


def decoding(lane: Lane) -> tuple[Callable[[float], None], Callable[[], int]]:
    """Runs the decoder on latents of one value, and the mean of the frames that came out."""
    latents, frames = lane.tensor((1, 3, 3, 8, 12), "float32"), lane.tensor((3, 8, 12, 3), "uint8")
    bound = lane.bind("decode", 0, {"latents": latents}, {"frames": frames})

    def run(value: float) -> None:
        latents.write(np.full(latents.shape, value, np.float32), lane.side)
        bound.run()

    return run, lambda: int(frames.fetch(lane.side).array().mean())


def test_each_captured_pass_has_a_context_of_its_own_on_the_same_memory(world: World) -> None:
    """The fakes refuse a context that runs another pass after its graph was captured (GPU.md, B1)."""
    world.reset()
    with opened(world, cuda_graphs=True) as session:
        before = world.cuda.live["context"]
        assert before == len(session.plan.phases) + 2, (
            "one of each kind when it opens, the others when needed"
        )
        for _ in range(2):
            video_of(session, CHUNKS)
        maker = session._maker
        assert maker is not None
        assert maker.decoder._whole is not None
        passes = len(maker._passes) + len(maker.decoder._whole._passes) + 1
        assert world.cuda.live["context"] == passes
        assert len(world.tensorrt.users) == 2, "all on the activation memory of their stream"
    assert world.left == {}


def test_a_pass_sets_the_addresses_that_changed_since_the_last(world: World) -> None:
    lane = world.lane()
    one, two = decoding(lane), decoding(lane)
    placed = "IExecutionContext.set_tensor_address"
    counts = []
    for run, mean in (one, one, two, two, one):
        before = world.cuda.calls.count(placed)
        run(1.0)
        assert mean() == 255
        counts.append(world.cuda.calls.count(placed) - before)
    assert counts == [2, 0, 2, 0, 2]
    lane.close()


def test_an_address_that_was_refused_is_set_again(world: World) -> None:
    lane = world.lane()
    run, mean = decoding(lane)
    world.tensorrt.refuse_at = world.tensorrt.refusable
    with pytest.raises(DeviceError, match="could not place latents of decode"):
        run(1.0)
    run(-1.0)
    assert mean() == 0
    lane.close()


REFUSALS = {
    "asked": "TensorRT says that it must not be",
    "refused": "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
}


@pytest.mark.parametrize("how", REFUSALS)
def test_what_cannot_be_captured_runs_without_and_says_so_once(world: World, how: str) -> None:
    world.tensorrt.compiles = True
    world.tensorrt.capturable = how != "asked"
    world.tensorrt.uncapturable = FakeCudaError(REFUSALS["refused"]) if how == "refused" else None
    lane = world.lane(cuda_graphs=True)
    passes = [decoding(lane), decoding(lane)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for value, shown in ((1.0, 255), (-1.0, 0), (0.0, 128), (1.0, 255)):
            for run, mean in passes:
                run(value)
                assert mean() == shown, "each of the runs is made, and once"
    assert [str(one.message) for one in told if REFUSALS[how] in str(one.message)] != []
    assert [one.category for one in told] == [GoingOnWarning]
    assert "Graph.launch" not in world.cuda.calls
    asked = world.cuda.calls.count("IExecutionContext.is_stream_capturable")
    assert asked == len(passes), "each remembers it"
    lane.close()
    if world.tensorrt.uncapturable is not None:
        world.tensorrt.uncapturable.__traceback__ = None  # which holds what it came through
    assert world.left == {}


def test_a_capture_without_memory_ends_the_video_as_before(world: World) -> None:
    world.tensorrt.uncapturable = FakeCudaError("CUDA_ERROR_OUT_OF_MEMORY")
    lane = world.lane(cuda_graphs=True)
    run, _ = decoding(lane)
    run(1.0)
    with pytest.raises(MemoryShortError, match="could not run decode in phase 0"):
        run(1.0)
    lane.close()


def test_a_session_runs_every_phase_when_it_opens_and_begins_as_if_it_had_not(world: World) -> None:
    expected: list[Any] = []
    for warm in (False, True):
        world.reset()
        with opened(world, warm=warm) as session:
            ran = {(graph, phase) for graph, phase, *_ in world.tensorrt.executed}
            everything = {
                ("prompt", 0),
                ("decode", 0),
                *(("step", n) for n in range(len(session.plan.phases))),
            }
            assert ran == (everything if warm else set())
            assert not warm or not any(stream.busy for stream in world.cuda.streams.values())
            expected.append(video_of(session, CHUNKS))
        assert world.left == {}
    assert_same(*expected)


def test_what_was_compiled_serves_all_contexts_and_the_next_process(world: World, caches: Path) -> None:
    world.tensorrt.compiles = True
    with opened(world, cuda_graphs=True) as session:
        kinds = len(session.plan.phases) + 2
        assert sum(world.tensorrt.compiled.values()) == kinds, "before the first video"
        assert len(world.tensorrt.caches) == 3, "one for each graph"
        files = sorted(caches.iterdir())
        assert len(files) == 3, "written when all is warm: a process that is killed leaves it"
        for file, graph in zip(files, ("decode", "prompt", "step"), strict=True):
            assert file.name == f"{session.bundle.digest[:24]}-{graph}-tensorrt-rtx-1.7.1-sm89.bin"
        with session.sibling(preflight=False) as sibling:
            video_of(sibling, CHUNKS)
        video_of(session, CHUNKS)
    assert sum(world.tensorrt.compiled.values()) == kinds, "and no more after"
    world.reset()
    world.tensorrt.compiles = True
    with opened(world) as session:
        video_of(session, 2)
    assert sum(world.tensorrt.compiled.values()) == 0
    assert "IRuntimeCache.deserialize" in world.cuda.calls


def test_what_is_compiled_later_is_written_when_the_session_closes(world: World, caches: Path) -> None:
    world.tensorrt.compiles = True
    with opened(world, warm=False) as session:
        video_of(session, 1)
        assert not caches.exists()
    contents = [file.read_bytes().split(b"\n", 3)[3] for file in sorted(caches.iterdir())]
    assert contents == [b"decode 0", b"prompt 0", b"step 0"]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut short": (lambda data: data[:-3], "is damaged"),
    "a bit": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged"),
    "another file": (lambda data: b"PK\x03\x04 not this", "is not of this engine"),
    "empty": (lambda data: b"", "is not of this engine"),
    "of another engine": (lambda data: data.replace(b" step ", b" decode "), "is not of this engine"),
    "not text": (lambda data: b"\xff\n" * 9, "is not of this engine"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_cache_that_is_damaged_or_of_something_else_is_told_and_left_out(
    world: World, caches: Path, name: str
) -> None:
    world.tensorrt.compiles = True
    opened(world).close()
    (file,) = caches.glob("*-step-*")
    damage, words = DAMAGE[name]
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    world.reset()
    world.tensorrt.compiles = True
    with pytest.warns(GoingOnWarning, match=rf"compiles again: .*-step-.* {words}"):
        opened(world).close()
    assert {graph for graph, _ in world.tensorrt.compiled} == {"step"}, "the others are whole"
    assert file.read_bytes() == whole, "and made anew"


def test_a_cache_that_tensorrt_does_not_take_is_told(world: World, caches: Path) -> None:
    world.tensorrt.compiles = True
    opened(world).close()
    world.reset()
    world.tensorrt.compiles, world.tensorrt.blob_works = True, False
    with pytest.warns(
        GoingOnWarning, match=r"is not for this GPU and driver, or this version, says TensorRT"
    ):
        opened(world).close()


def test_a_cache_that_cannot_be_written_or_read_is_told_and_costs_nothing_else(
    world: World, caches: Path
) -> None:
    world.tensorrt.compiles = True
    caches.parent.mkdir(parents=True)
    caches.write_text("a file where the folder is to be")
    with (
        pytest.warns(GoingOnWarning, match=r"compiles again: .*tensorrt-rtx") as told,
        opened(world) as session,
    ):
        assert len(video_of(session, 2)) == 2
    assert len(told) == 3, "once for each graph"


class Kernels(SimpleNamespace):
    """A launcher, as far as it is told from others."""

    def __init__(self, digest: bytes, width: int = 12) -> None:
        super().__init__(dtype="float32", width=width, uneven=False, digest=digest)


def test_equal_kernels_are_shared_and_others_of_the_kind_are_not_mixed_up() -> None:
    launchers.forget()
    one, same, other, wide = (Kernels(digest) for digest in (b"1", b"1", b"2", b"1"))
    wide.width = 64
    assert launchers.shared(one) is one  # type: ignore[arg-type]
    assert launchers.shared(same) is one  # type: ignore[arg-type]
    assert launchers.shared(other) is other  # type: ignore[arg-type]
    assert launchers.shared(wide) is wide  # type: ignore[arg-type]
    kind: launchers.Kind = ("float32", 12, False)
    assert launchers.launcher_of(kind) is other, "the newest"
    with launchers.launching(one):  # type: ignore[arg-type]
        assert launchers.launcher_of(kind) is one, "whose turn it is"
        assert launchers.launcher_of(("float32", 64, False)) is wide, "which are for other keys"
        with launchers.launching(None):
            assert launchers.launcher_of(kind) is other
        assert launchers.launcher_of(kind) is one
    assert launchers.launcher_of(kind) is other
    launchers.forget()
    assert launchers.launcher_of(kind) is None


def test_a_session_runs_with_its_own_kernels_whatever_was_opened_since(world: World) -> None:
    """And keeps them: a CUDA graph holds their addresses, and nobody else may (GPU.md, B2)."""
    mine, later = Kernels(b"1"), Kernels(b"2")
    world.tensorrt.launcher = mine  # type: ignore[assignment]
    with opened(world) as session:
        world.tensorrt.launcher = later  # type: ignore[assignment]
        with opened(world) as other, session.sibling(preflight=False) as sibling:
            world.tensorrt.launcher = None
            for one, expected in ((session, mine), (other, later), (sibling, mine)):
                world.tensorrt.launched.clear()
                video_of(one, 2)
                assert {id(used) for used in world.tensorrt.launched} == {id(expected)}
        lane = session._memory().lane
        assert lane._loaded.launcher is mine  # type: ignore[attr-defined]
    assert lane._loaded.launcher is None, "given back with the lane"  # type: ignore[attr-defined]
