"""Loading engines: the right one, its plugin first, what is refused. TensorRT and the GPU are stood in."""

from __future__ import annotations

from dataclasses import replace
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import record_file
from forcingkv.runtime.backends import tensorrt_engines as backend
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.engines import EngineRecord

ENGINE = EngineRecord(
    graph="step",
    flavour="tensorrt-rtx",
    version="1.7.1",
    sm=89,
    file="engines/step.engine",
    layers=100,
    plugin_layers=2,
    needs_plugin=True,
    phases=3,
    weight_bytes=1,
    activation_bytes=2,
    scratch_bytes=1,
    seconds=1.0,
    peak_bytes=1,
)


class Fakes:
    """Records what is called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.calls: list[Any] = []
        self.loads, self.sm = True, 89
        monkeypatch.setattr(backend, "choose", lambda name: self.calls.append(("choose", name)))
        monkeypatch.setattr(backend, "device_sm", lambda device: self.sm)
        monkeypatch.setattr(backend, "why_no_gpu", lambda device: "as the test wants it")
        monkeypatch.setattr(backend, "_runtimes", [])
        monkeypatch.setattr(backend, "make_log", lambda hear: hear)
        monkeypatch.setattr(backend, "KernelLauncher", lambda *given: ("launcher", *given))
        monkeypatch.setattr(backend, "register_plugins", self.register)
        monkeypatch.setattr(backend, "trt", SimpleNamespace(Runtime=self.runtime, __version__="1.7.1"))
        (folder / "engines").mkdir()
        (folder / "engines" / "step.engine").write_bytes(b"an engine")
        files = {ENGINE.file: record_file(folder / ENGINE.file)}
        self.manifest = SimpleNamespace(
            engines=[ENGINE], kernels=("kernels",), files=files, engine_graphs=["step"]
        )
        self.bundle = Bundle(folder, self.manifest, None)  # type: ignore[arg-type]

    def register(self, launcher: Any) -> Any:
        self.calls.append(("register", launcher))
        return launcher

    def runtime(self, hear: Any) -> Any:
        def deserialize(content: mmap) -> object:
            self.calls.append(("load", bytes(content)))
            if not self.loads:
                hear("ERROR", "the plan is of another day")
                hear("INFO", "not of interest")
            return "engine" if self.loads else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    return Fakes(monkeypatch, tmp_path)


def test_the_plugin_is_registered_with_its_kernels_before_the_engine_is_loaded(fakes: Fakes) -> None:
    launcher = ("launcher", fakes.bundle.path, ("kernels",), 89, fakes.bundle.content)
    assert backend.load_kernels(fakes.bundle, "tensorrt-rtx") == launcher
    assert fakes.calls == [("choose", "tensorrt-rtx"), ("register", launcher)]
    fakes.calls.clear()
    assert backend.load_engine(fakes.bundle, "step", "tensorrt-rtx") == "engine"
    assert fakes.calls == [("choose", "tensorrt-rtx"), ("register", None), ("load", b"an engine")]


def test_without_a_plugin_there_are_no_kernels(fakes: Fakes) -> None:
    fakes.manifest.engines = [replace(ENGINE, needs_plugin=False)]
    assert backend.load_kernels(fakes.bundle, "tensorrt-rtx") is None


def test_an_engine_that_was_tuned_on_another_gpu_is_loaded_and_told_of(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.manifest.engines = [replace(ENGINE, device="NVIDIA H100", multiprocessors=132)]
    monkeypatch.setattr(backend, "device_model", lambda number: ("NVIDIA H200", 132))
    with pytest.warns(RuntimeWarning, match="step was tuned on NVIDIA H100 .* this GPU is NVIDIA H200"):
        assert backend.load_engine(fakes.bundle, "step", "tensorrt-rtx") == "engine"
    monkeypatch.setattr(backend, "device_model", lambda number: ("NVIDIA H100", 132))
    assert backend.load_engine(fakes.bundle, "step", "tensorrt-rtx") == "engine"


def test_the_runtime_goes_before_the_plugins(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the process what was registered last is done first."""
    order: list[str] = []
    monkeypatch.setattr(backend, "register_plugins", lambda launcher: order.append("plugins"))
    monkeypatch.setattr(backend.atexit, "register", lambda done: order.append(done.__qualname__))
    for _ in range(2):
        backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")
    assert order == ["plugins", "list.clear", "plugins"]


def test_an_engine_that_needs_no_plugin_gets_none(fakes: Fakes) -> None:
    fakes.manifest.engines = [replace(ENGINE, needs_plugin=False)]
    backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")
    assert [call[0] for call in fakes.calls] == ["choose", "load"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": "1.6.0"}, "expected one made by tensorrt-rtx 1.7.1 for sm_89"),
        ({"sm": 120}, "expected one made by tensorrt-rtx 1.7.1 for sm_89"),
        ({"flavour": "tensorrt"}, "expected one made by tensorrt-rtx 1.7.1 for sm_89"),
        ({"graph": "decode"}, "has no engine of the graph step"),
    ],
)
def test_an_engine_for_something_else_is_refused_before_it_is_loaded(
    fakes: Fakes, changed: dict[str, Any], words: str
) -> None:
    fakes.manifest.engines = [replace(ENGINE, **changed)]
    with pytest.raises(InputError, match=words):
        backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")
    assert [call[0] for call in fakes.calls] == ["choose"]


def test_a_file_that_tensorrt_does_not_take(fakes: Fakes) -> None:
    fakes.loads = False
    with pytest.raises(InputError, match=r"step\.engine cannot be loaded .* 'the plan is of another day'"):
        backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")


def test_without_a_gpu_the_way_out_is_named(fakes: Fakes) -> None:
    fakes.sm = None  # type: ignore[assignment]
    with pytest.raises(
        InputError, match=r"needs a GPU .* no GPU was found \(as the test wants it\).* --target onnx"
    ):
        backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")


def test_an_engine_that_was_changed_since_the_bundle_was_opened_is_not_loaded(fakes: Fakes) -> None:
    (fakes.bundle.path / ENGINE.file).write_bytes(b"another!!")
    with pytest.raises(InputError, match=r"step\.engine is not what it was when the bundle was opened"):
        backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")
    assert "load" not in [call[0] for call in fakes.calls]


def test_an_engine_is_mapped_and_not_read_into_memory(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of a large model is 28 GB."""
    given: list[Any] = []
    monkeypatch.setattr(fakes, "loads", True)
    backend._runtimes.append(
        SimpleNamespace(deserialize_cuda_engine=lambda c: given.append(type(c)) or "engine")
    )
    assert backend.load_engine(fakes.bundle, "step", "tensorrt-rtx") == "engine"
    assert given == [mmap]


@pytest.mark.parametrize(("content", "words"), [(b"", "cannot be read"), (b"changed!", "is not what it was")])
def test_an_engine_that_is_empty_or_changes_while_it_is_loaded_is_refused(
    fakes: Fakes, content: bytes, words: str
) -> None:
    """TensorRT reads pages of the file after they were checked."""
    path = fakes.bundle.path / ENGINE.file
    if content:
        backend._runtimes.append(
            SimpleNamespace(
                deserialize_cuda_engine=lambda _: path.write_bytes(content + b"more") and "engine"
            )
        )
    else:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=rf"step\.engine {words}"):
        backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")


def test_an_engine_in_the_cache_of_a_hub_is_loaded_and_no_other_link(fakes: Fakes, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--bundle"
    engines, blobs = repository / "snapshots" / "0abc" / "engines", repository / "blobs"
    engines.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "5ha").write_bytes(b"an engine of the hub")
    (engines / "step.engine").symlink_to("../../../blobs/5ha")
    fakes.bundle.path = engines.parent
    fakes.manifest.files[ENGINE.file] = record_file(blobs / "5ha")
    backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")
    assert fakes.calls[-1] == ("load", b"an engine of the hub")
    (engines / "step.engine").unlink()
    (engines / "step.engine").symlink_to(tmp_path / "engines" / "step.engine")
    with pytest.raises(
        InputError, match=r"'engines/step.engine', which is not inside the folder: it is a link"
    ):
        backend.load_engine(fakes.bundle, "step", "tensorrt-rtx")
