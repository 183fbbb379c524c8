"""The ONNX Runtime backend: which provider runs, where state lies, and errors as the runtime's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, DeviceError, MemoryShortError, Session
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.backends import onnxruntime as backend
from forcingkv.runtime.backends.onnxruntime import OnnxGraph, OnnxLane, OnnxPass, open_lane
from forcingkv.runtime.backends.ort_providers import PROVIDERS, Chosen
from forcingkv.runtime.backends.ort_state import StateTensor
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.threads import cpu_threads
from tests.runtime.lanes import OwnState
from tests.runtime.videos import BUNDLES, OTHER, PROMPT, assert_same, open_with, video_of

Bundles = Callable[[str], Path]
CPU, CUDA = PROVIDERS["cpu"].name, PROVIDERS["cuda"].name


@pytest.mark.parametrize("name", BUNDLES)
def test_state_in_onnx_runtimes_own_memory_gives_the_same_video(
    bundles: Bundles, tmp_path: Path, name: str
) -> None:
    """The way that the CUDA provider takes, on a CPU; with a switch, and a state from the other lane."""
    own, _ = open_with(bundles(name), OwnState)
    plain, _ = open_with(bundles(name), OnnxLane)
    with own, plain:
        kinds = {type(tensor) for tensor in own._memory().state().values()}
        assert kinds == {StateTensor}
        videos = []
        for session, other in ((own, plain), (plain, own)):
            assert_same(video_of(session), video_of(other))
            video = session.generate(PROMPT, seed=7, chunks=8)
            for _ in range(4):
                next(video)
            video.switch(OTHER)
            next(video)
            video.save(tmp_path / "state")
            videos.append(list(video))
            assert_same(other.restore(tmp_path / "state"), videos[-1])
        assert_same(*videos)


@pytest.mark.parametrize(("room", "kept"), [(1.9, False), (2.1, True)])
def test_large_passes_keep_their_memory_where_there_is_ample_room(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, room: float, kept: bool
) -> None:
    bundle = Bundle.open(bundles("full"))
    needed = sum(footprint(bundle.manifest, bundle.plan).values())
    arenas: list[bool] = []
    monkeypatch.setattr(backend, "LARGE_ACTIVATIONS", 0)
    monkeypatch.setattr(backend, "available_bytes", lambda: int(room * needed))
    monkeypatch.setattr(backend, "OnnxGraph", lambda *given, arena, **_: arenas.append(arena))
    open_lane(bundle, LaneOptions())
    assert arenas == [kept] * 3


def test_a_view_of_state_is_its_start(bundles: Bundles) -> None:
    graph = OnnxGraph(bundles("forcing-kv") / "step.onnx", 1)
    whole: Any = StateTensor.make((2, 6), "float32", "cpu", 0, graph.view)
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    whole.write(values, None)
    part = whole.first((1, 4))
    np.testing.assert_array_equal(part.fetch(None).array(), values.reshape(-1)[:4][None])
    part.clear(None)
    np.testing.assert_array_equal(whole.fetch(None).array().reshape(-1), [0, 0, 0, 0, *range(4, 12)])
    assert whole.first((3, 0)).fetch(None).array().shape == (3, 0)
    assert (whole.nbytes, part.nbytes) == (48, 16)


def test_the_cuda_provider_is_taken_where_it_is_installed(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(backend.ort, "get_available_providers", lambda: ["Tensorrt", CUDA, CPU])
    monkeypatch.setattr(
        backend, "OnnxGraph", lambda *given, arena, **_: loaded.append(given) or SimpleNamespace(view=None)
    )
    lane = open_lane(Bundle.open(bundles("forcing-kv")), LaneOptions(threads=3))
    assert [(path.name, threads, chosen.provider.name) for path, threads, chosen in loaded] == [
        (f"{graph}.onnx", 3, CUDA) for graph in ("prompt", "step", "decode")
    ]
    made: list[Any] = []
    monkeypatch.setattr(StateTensor, "make", lambda *given: made.append(given))
    lane.tensor((1, 2), "float32", state=True)
    lane.tensor((1, 2), "float32")
    assert made == [((1, 2), "float32", "cuda", 0, None)]


def test_a_provider_that_onnx_runtime_drops_is_an_error(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the CPU and says so in its log: hours later one would wonder."""
    started = ort.InferenceSession

    def without(path: str, options: Any, providers: list[Any], **_: Any) -> Any:
        assert [providers[0][0], providers[1]] == [CUDA, CPU]
        return started(path, options, providers=[CPU])

    monkeypatch.setattr(backend.ort, "InferenceSession", without)
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider, but could not start it for step\.onnx"):
        OnnxGraph(bundles("forcing-kv") / "step.onnx", 1, Chosen("cuda"))


@pytest.fixture
def broken_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu on a machine without a GPU that works: the provider is listed, and does not start."""
    monkeypatch.setattr(backend.ort, "get_available_providers", lambda: [CUDA, CPU])


@pytest.mark.usefixtures("broken_cuda")
def test_where_cuda_does_not_start_the_cpu_can_be_chosen(
    bundles: Bundles, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceError, match="choose --backend onnxruntime-cpu to run on the CPU"):
        Session.open(bundles("forcing-kv"))
    assert capfd.readouterr() == ("", ""), "standard output may be a video"
    with Session.open(bundles("forcing-kv"), backend="onnxruntime-cpu", threads=1) as session:
        assert session.runs_on == "the CPU, 1 thread"
        chosen = [chunk.frames.tobytes() for chunk in session.generate(PROMPT, seed=7, chunks=2)]
        with session.sibling() as other:
            assert other.runs_on == "the CPU, 1 thread"
    with pytest.raises(RuntimeError, match="closed"):
        _ = session.runs_on
    plain, _ = open_with(bundles("forcing-kv"), OnnxLane)
    with plain:
        assert chosen == [chunk.frames.tobytes() for chunk in plain.generate(PROMPT, seed=7, chunks=2)]


def test_a_provider_that_raises_is_an_error_with_the_way_round(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own way out would print, and take the CPU."""

    class Failing:
        def __init__(self, *_: Any, enable_fallback: int = 1, **__: Any) -> None:
            assert not enable_fallback
            raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient")

    monkeypatch.setattr(backend.ort, "InferenceSession", Failing)
    with pytest.raises(
        DeviceError, match=r"driver version is insufficient\): choose --backend onnxruntime-cpu"
    ):
        OnnxGraph(bundles("forcing-kv") / "step.onnx", 1, Chosen("cuda"))
    with pytest.raises(DeviceError, match=r"driver version is insufficient\)$"):
        OnnxGraph(bundles("forcing-kv") / "step.onnx", 1, Chosen("cpu"))


def test_graphs_have_the_threads_of_this_process_unless_asked_for_others(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of the process are counted: a graph has a pool of one less, since the caller works too."""
    path = bundles("forcing-kv") / "step.onnx"
    before = psutil.Process().num_threads()
    for named, asked, more in (("1", None, 0), ("3", None, None), ("3", 1, 0), ("1", 4, 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", named)
        expected = cpu_threads().number - 1 if more is None else more
        graph = OnnxGraph(path, asked)
        assert psutil.Process().num_threads() - before == expected
        del graph


def test_a_graph_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "step.onnx").write_bytes(b"no graph")
    with pytest.raises(DeviceError, match=r"failed in loading step\.onnx"):
        OnnxGraph(tmp_path / "step.onnx")


def test_a_pass_that_fails_says_so(bundles: Bundles) -> None:
    graph = OnnxGraph(bundles("forcing-kv") / "prompt.onnx", 1)
    with pytest.raises(DeviceError, match="failed in a pass"):
        graph.run({"text": np.zeros((1, 2, 3), np.float32)}, {})


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (MemoryError("bad allocation"), MemoryShortError),
        (
            RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer of size 1"),
            MemoryShortError,
        ),
        (RuntimeError("Non-zero status: std::bad_alloc"), MemoryShortError),
        (RuntimeError("CUDA failure 2: out of memory"), MemoryShortError),
        (RuntimeError("CUDA failure 700: an illegal memory access"), DeviceError),
    ],
)
def test_what_onnx_runtime_raises_is_told_apart(raised: Exception, kind: type[Exception]) -> None:
    class Session:
        def run_with_iobinding(self, *_: object) -> None:
            raise raised

    with pytest.raises(kind) as found:
        OnnxPass(Session(), None, ({}, {})).run()
    assert str(raised) in str(found.value)
    assert found.value.__cause__ is raised


def test_memory_that_is_not_there_is_told() -> None:
    lane = OnnxLane({})
    with pytest.raises(MemoryShortError, match=r"no memory for a tensor of float32 \(1099511627776, 1024\)"):
        lane.tensor((2**40, 1024), "float32")
    with pytest.raises(MemoryShortError, match="no memory on cpu for a tensor of float32"):
        StateTensor.make((2**40, 1024), "float32", "cpu")


def test_graphs_for_tensorrt_are_refused(bundles: Bundles) -> None:
    bundle = Bundle.open(bundles("forcing-kv"))
    half = Bundle(bundle.path, replace(bundle.manifest, compute="bfloat16"), bundle.headmap)
    with pytest.raises(InputError, match=r"compute in bfloat16.*--backend tensorrt"):
        open_lane(half, LaneOptions())


@pytest.mark.parametrize("version", ["1.9.0", "1.24.0", "1.23.2+cu12", "0.9"])
def test_versions_that_let_a_bundle_read_the_users_files_are_refused(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(backend.ort, "__version__", version)
    with pytest.raises(InputError, match=r"expected 1\.24\.1 or newer.*pip install 'onnxruntime>=1\.24\.1'"):
        Session.open(bundles("forcing-kv"))
    for good in ("1.24.1", "1.25.0.dev1", "2.0"):
        monkeypatch.setattr(backend.ort, "__version__", good)
        Session.open(bundles("forcing-kv")).close()


def test_a_closed_lane_says_so(bundles: Bundles) -> None:
    lane = open_lane(Bundle.open(bundles("forcing-kv")), LaneOptions())
    lane.close()
    lane.close()
    with pytest.raises(DeviceError, match="the lane is closed"):
        lane.bind("prompt", 0, {}, {})
    with pytest.raises(DeviceError, match="the lane is closed"):
        lane.sibling()
