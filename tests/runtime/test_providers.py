"""ONNX Runtime's providers by name: which is asked for and how, where memory lies, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, DeviceError, Session, preflight
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.backends.onnxruntime import OnnxGraph, OnnxLane
from forcingkv.runtime.backends.ort_placement import Placement, placement_of
from forcingkv.runtime.backends.ort_providers import PROVIDERS, choose_provider
from forcingkv.runtime.backends.ort_state import StateTensor
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.preflight import check_memory
from tests.runtime.fake_providers import CPU, FakeProviders
from tests.runtime.videos import OTHER, PROMPT, assert_same, open_with, video_of

Bundles = Callable[[str], Path]
CUDA = PROVIDERS["cuda"].name


def cuda_options(number: int = 0) -> dict[str, str]:
    return {"device_id": str(number), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


@pytest.mark.parametrize(
    ("options", "asked", "title"),
    [
        ({}, [(CUDA, cuda_options()), CPU], "GPU 0 (CUDA provider of ONNX Runtime)"),
        ({"device": "cuda:1"}, [(CUDA, cuda_options(1)), CPU], "GPU 1 (CUDA provider of ONNX Runtime)"),
        ({"provider": "cuda", "device": "cuda"}, [(CUDA, cuda_options()), CPU], None),
        ({"provider": "CUDAExecutionProvider"}, [(CUDA, cuda_options()), CPU], None),
        ({"provider": "cpu"}, [CPU], "the CPU"),
        ({"device": "cpu"}, [CPU], "the CPU"),
        ({"backend": "onnxruntime-cpu"}, [CPU], "the CPU"),
        ({"backend": "onnxruntime-cpu", "provider": "cpu", "device": "cpu"}, [CPU], "the CPU"),
        (
            {"provider": "tensorrt", "device": "cuda:3"},
            [("TensorrtExecutionProvider", {"device_id": "3"}), (CUDA, cuda_options(3)), CPU],
            "GPU 3 (TensorRT provider of ONNX Runtime)",
        ),
        (
            {"provider": "migraphx", "device": "gpu:2"},
            [("MIGraphXExecutionProvider", {"device_id": "2"}), CPU],
            "GPU 2 (MIGraphX provider of ONNX Runtime)",
        ),
        ({"provider": "dml"}, [("DmlExecutionProvider", {"device_id": "0"}), CPU], None),
        ({"provider": "openvino"}, [("OpenVINOExecutionProvider", {}), CPU], None),
        ({"provider": "coreml"}, [("CoreMLExecutionProvider", {}), CPU], None),
        (
            {"provider": "webgpu"},
            [("WebGpuExecutionProvider", {}), CPU],
            "the WebGPU provider of ONNX Runtime",
        ),
    ],
)
def test_a_name_or_a_device_says_what_is_asked_of_onnx_runtime(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], asked: list[Any], title: str | None
) -> None:
    FakeProviders(monkeypatch, *PROVIDERS)
    chosen = choose_provider(LaneOptions(**options))
    assert chosen.asked == asked
    assert title in (None, chosen.title)


def test_tensorrts_provider_is_not_followed_by_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeProviders(monkeypatch, "tensorrt")
    chosen = choose_provider(LaneOptions(provider="tensorrt"))
    assert chosen.asked == [("TensorrtExecutionProvider", {"device_id": "0"}), CPU]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"backend": "onnxruntime-cpu", "provider": "cuda"},
            "--provider is cuda, which contradicts the back",
        ),
        ({"backend": "onnxruntime-cpu", "device": "cuda"}, "--device is cuda, which contradicts the backend"),
        (
            {"provider": "cuda", "device": "cpu"},
            r"contradicts the provider cuda; expected cuda, cuda:1, \.\.\.",
        ),
        ({"provider": "cpu", "device": "cuda:0"}, "contradicts the provider cpu; expected cpu"),
        (
            {"provider": "migraphx", "device": "cuda:1"},
            r"contradicts the provider migraphx; expected gpu, gpu:1",
        ),
        ({"provider": "openvino", "device": "gpu"}, "expected no --device: it chooses by itself"),
        ({"device": "cpu:1"}, "--device is cpu:1; expected cpu"),
        ({"device": "mps"}, "does not say what runs the graphs; expected cpu, cuda or cuda:1"),
        ({"device": "gpu"}, "Name the provider too: --provider cpu, cuda"),
        ({"device": "cuda:x"}, "--device is 'cuda:x'; expected a word, or a word and a number"),
        ({"device": "cuda:-1"}, "a word, or a word and a number"),
        ({"provider": "nvidia"}, "--provider is 'nvidia'; expected one of cpu, cuda, tensorrt, migraphx"),
        ({"provider": "rocm"}, "no ROCm provider since 1.23: choose migraphx"),
        ({"provider": "azure"}, "--provider is 'azure'"),
    ],
)
def test_what_contradicts_itself_or_is_unknown_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    FakeProviders(monkeypatch, *PROVIDERS)
    with pytest.raises(InputError, match=told):
        choose_provider(LaneOptions(**options))


@pytest.mark.parametrize("key", [key for key in PROVIDERS if key != "cpu"])
def test_a_provider_that_is_not_there_is_refused_with_what_is_and_what_to_install(
    bundles: Bundles, key: str
) -> None:
    """By the ONNX Runtime that is installed, which was built for CPUs."""
    with pytest.raises(InputError) as found:
        Session.open(bundles("forcing-kv"), provider=key)
    told = str(found.value)
    assert f"--provider is {key}, which this ONNX Runtime (" in told
    assert "was not built with; expected one of cpu. For " in told
    assert f"{PROVIDERS[key].title}: {PROVIDERS[key].install}" in told


def test_a_device_whose_provider_is_not_there_is_refused(bundles: Bundles) -> None:
    with pytest.raises(InputError, match=r"--device is cuda, which this ONNX Runtime.*onnxruntime-gpu"):
        Session.open(bundles("forcing-kv"), backend="onnxruntime", device="cuda:0")


@pytest.mark.parametrize("name", ["forcing-kv", "taehv"])
def test_a_provider_with_memory_of_its_own_gives_the_same_video(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """ONNX Runtime copies inputs from other memory when they are bound: a pass that was bound once went on
    with the noise, the positions and the text of the first chunk, and nothing said so."""
    plain, _ = open_with(bundles(name), OnnxLane)
    fake = FakeProviders(monkeypatch, "cuda")
    asked: dict[str, Any] = {"provider": "cuda", "device": "cuda:1", "threads": 1, "preflight": False}
    with plain, Session.open(bundles(name), **asked) as session:
        assert session.runs_on == "GPU 1 (CUDA provider of ONNX Runtime)"
        assert fake.asked == [[(CUDA, cuda_options(1)), CPU]] * 3
        assert {(device, number) for device, number, _ in fake.made} == {("cuda", 1)}
        assert {type(tensor) for tensor in session._memory().state().values()} == {StateTensor}
        for seed in (7, 8):
            assert_same(video_of(session, 4, seed), video_of(plain, 4, seed))
        state = {name.partition("/")[2] for name in session._memory().state()}
        assert {"text", "latents", "cosines", "sines", "sigma"} <= fake.again
        assert not fake.again & state, "what lies on the device stays bound"
        for number, one in enumerate((session, plain)):
            video = one.generate(PROMPT, seed=3, chunks=6)
            next(video)
            video.switch(OTHER)
            next(video)
            video.save(tmp_path / str(number))
        rest = [list(one.restore(tmp_path / saved)) for one, saved in ((session, "1"), (plain, "0"))]
        assert_same(*rest)


def test_caches_are_handed_to_each_pass_where_a_provider_has_no_memory_for_python(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = open_with(bundles("forcing-kv"), OnnxLane)
    fake = FakeProviders(monkeypatch, "migraphx")
    with plain, Session.open(bundles("forcing-kv"), provider="migraphx", threads=1) as session:
        assert_same(video_of(session, 4), video_of(plain, 4))
        assert not fake.made
        bindings = [bound._binding for bound in session._memory()._passes.values()]
        assert bindings
        assert not any(binding.inputs for binding in bindings), "no pass keeps a copy of the caches"
        assert session.notes == (
            "whether the memory of GPU 0 is enough was not checked: nothing here can ask MIGraphX for it",
        )


def test_inputs_of_which_nothing_is_known_are_bound_for_each_run(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ONNX Runtime that does not say where a graph takes its inputs."""
    fake = FakeProviders(monkeypatch, "cuda")
    graph = OnnxGraph(bundles("forcing-kv") / "prompt.onnx", 1, choose_provider(LaneOptions()))
    text = StateTensor.make((1, 2), "float32", "cuda", 0, graph.view)
    assert graph._copied({"text": text}) == {}
    monkeypatch.delattr("tests.runtime.fake_providers.FakeSession.get_input_memory_infos")
    assert graph._copied({"text": text}) == {"text": text}
    assert fake.made == [("cuda", 0, 8)]


def test_only_what_a_view_of_state_has_is_copied(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeProviders(monkeypatch, "cuda")
    graph = OnnxGraph(bundles("forcing-kv") / "step.onnx", 1, choose_provider(LaneOptions()))
    whole: Any = StateTensor.make((2, 6), "float32", "cuda", 0, graph.view)
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    whole.write(values, None)
    part = whole.first((2, 2))
    np.testing.assert_array_equal(part.fetch(None).array(), [[0, 1], [2, 3]])
    part.write(-values[:, :2], None)
    part.clear(None)
    part.write(values[:, 4:], None)
    np.testing.assert_array_equal(whole.fetch(None).array().ravel(), [4, 5, 10, 11, *range(4, 12)])
    whole.clear(None)
    assert fake.moved == [48, 16, 16, 16, 16, 48, 48]
    assert whole.first((0, 3)).fetch(None).array().shape == (0, 3)
    whole.first((0, 3)).clear(None)
    assert len(fake.moved) == 7
    alone = StateTensor.make((4,), "float32", "cuda")
    with pytest.raises(DeviceError, match="reached through a loaded graph"):
        alone.first((2,)).fetch(None)  # type: ignore[arg-type]


def test_the_nodes_of_each_graph_are_counted_where_they_run(bundles: Bundles) -> None:
    """By the real ONNX Runtime, on its CPU provider."""
    with Session.open(bundles("forcing-kv"), provider="cpu") as session:
        placement = session.placement
        with session.sibling() as other:
            assert other.placement == placement
    assert list(placement) == ["prompt", "step", "decode"]
    for one in placement.values():
        assert one.asked == CPU
        assert one.nodes is not None
        assert set(one.nodes) == {CPU}
        assert one.elsewhere == {}
    assert placement["step"].nodes is not None
    assert placement["step"].nodes[CPU]["TopK"] == 2, "a layer's DynamicPrune has one"
    total = sum(placement["step"].nodes[CPU].values())
    assert str(placement["step"]) == f"{total:,} of {total:,} nodes on CPUExecutionProvider"
    with pytest.raises(RuntimeError, match="closed"):
        _ = session.placement


def test_nodes_that_a_provider_leaves_to_the_cpu_are_named(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeProviders(monkeypatch, "cuda")
    fake.on_cpu = {"TopK", "Range"}
    with Session.open(bundles("forcing-kv"), preflight=False) as session:
        step = session.placement["step"]
    assert step.nodes is not None
    assert step.elsewhere == {"TopK": 2, "Range": 1}
    taken = sum(step.nodes[CUDA].values())
    assert str(step) == f"{taken} of {taken + 3} nodes on {CUDA}, 3 on {CPU} (TopK 2, Range 1)"
    assert step.as_json() == {
        "asked": CUDA,
        "nodes": {CUDA: taken, CPU: 3},
        "elsewhere": {"TopK": 2, "Range": 1},
    }


def test_many_kinds_of_nodes_are_cut_in_the_sentence_alone() -> None:
    kinds = {f"Kind{n}": 9 - n for n in range(8)}
    placement = Placement(CUDA, {CPU: kinds})
    assert str(placement) == (
        f"0 of 44 nodes on {CUDA}, 44 on {CPU}"
        " (Kind0 9, Kind1 8, Kind2 7, Kind3 6, Kind4 5, Kind5 4, and 2 other kinds)"
    )
    assert placement.as_json() == {"asked": CUDA, "nodes": {CUDA: 0, CPU: 44}, "elsewhere": kinds}


def test_an_onnx_runtime_that_does_not_say_leaves_the_placement_unknown() -> None:
    def refuses() -> None:
        raise RuntimeError("must be set to 1 to retrieve EP graph assignment information")

    for session in (SimpleNamespace(), SimpleNamespace(get_provider_graph_assignment_info=refuses)):
        placement = placement_of(session, CUDA)
        assert placement.as_json() is None
        assert str(placement) == (
            "how many nodes CUDAExecutionProvider runs is not known: this ONNX Runtime does not say"
        )


@pytest.fixture
def full(bundles: Bundles) -> Bundle:
    return Bundle.open(bundles("full"))


def needs(bundle: Bundle, *names: str) -> int:
    parts = footprint(bundle.manifest, bundle.plan)
    return sum(size for name, size in parts.items() if not names or name in names)


def test_the_memory_of_the_gpu_that_is_meant_is_asked(full: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeProviders(monkeypatch, "cuda")
    needed, host = needs(full), needs(full, "frames", "latents", "text")
    free = {0: 0, 1: needed}
    monkeypatch.setattr(preflight, "device_free_bytes", free.__getitem__)
    monkeypatch.setattr(preflight, "available_bytes", lambda: host)
    assert check_memory(full, LaneOptions(device="cuda:1")) is None
    with pytest.raises(InputError, match=r"needs about .*0 B are available on GPU 0"):
        check_memory(full, LaneOptions(provider="cuda"))
    monkeypatch.setattr(preflight, "available_bytes", lambda: host - 1)
    with pytest.raises(InputError, match=r"\(frames [^,]*, text [^,]*, latents [^,]*\), and"):
        check_memory(full, LaneOptions(device="cuda:1"))
    free[0] = 0
    with pytest.raises(InputError, match=r"weights .* are available"):
        check_memory(full, LaneOptions(provider="cpu"))


def test_where_a_gpu_cannot_be_asked_it_is_said_and_the_host_is_checked(
    full: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What asks is no part of ONNX Runtime, which runs without."""

    def missing(device: int) -> int:
        raise InputError("this needs cuda-bindings, which is not installed")

    FakeProviders(monkeypatch, "cuda", "dml", "openvino")
    monkeypatch.setattr(preflight, "device_free_bytes", missing)
    monkeypatch.setattr(preflight, "available_bytes", lambda: needs(full) - 1)
    with Session.open(full, provider="cuda", device="cuda:0") as session, session.sibling() as sibling:
        assert session.notes == sibling.notes
        assert session.notes == (
            "whether the memory of GPU 0 is enough was not checked: this needs cuda-bindings, which is not"
            " installed",
        )
    assert "DirectML" in str(check_memory(full, LaneOptions(provider="dml")))
    with pytest.raises(InputError, match="weights"):  # in the machine's own memory
        check_memory(full, LaneOptions(provider="openvino"))
    with pytest.raises(InputError, match="weights"):
        check_memory(full, LaneOptions("onnxruntime-cpu"))
