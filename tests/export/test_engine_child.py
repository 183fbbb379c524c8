"""The program that builds an engine, with TensorRT stood in: what it asks for, and what it does not take."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forcingkv.export import engine_builder, engine_child
from forcingkv.export.engine_builder import CHILD, EngineTarget, build_engine
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import to_data
from forcingkv.prune import launcher, plugin
from forcingkv.runtime import engines
from forcingkv.runtime.flavour import FLAVOURS
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import mixed_map, small_spec
from tests.prune.test_launcher import SIZES, P, launched, write_bundle  # noqa: F401

Flags = Enum("Flags", "TF32 REQUIRE_USER_ALLOCATION")
ENTERPRISE, RTX = FLAVOURS["tensorrt"], FLAVOURS["tensorrt-rtx"]


class TensorRT:
    """As much of TensorRT as the child touches before a build."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, user_allocation: bool = True) -> None:
        self.flags = {Flags.TF32}
        self.places: list[int] = []
        self.shapes: dict[str, Any] = {}
        self.refuses: Exception | bool | None = None
        known = {flag.name: flag for flag in Flags if user_allocation or flag is Flags.TF32}
        self.BuilderFlag = SimpleNamespace(**known)
        self.ComputeCapability = SimpleNamespace(SM89="8.9")
        self.IStreamWriter = type("IStreamWriter", (), {"__init__": lambda self: None})
        monkeypatch.setattr(engine_child, "trt", self)

    def create_builder_config(self) -> Any:
        self.config = SimpleNamespace(
            clear_flag=self.flags.discard,
            set_flag=self.flags.add,
            set_compute_capability=lambda sm, place: setattr(self, "sm", (sm, place)),
            add_optimization_profile=lambda profile: self.places.pop(0),
        )
        return self.config

    def create_optimization_profile(self) -> Any:
        def set_shape(name: str, *shapes: Any) -> Any:
            if isinstance(self.refuses, Exception):
                raise self.refuses
            self.shapes[name] = shapes
            return self.refuses

        return SimpleNamespace(set_shape=set_shape)


def test_engines_allocate_nothing_while_they_run_and_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = TensorRT(monkeypatch)
    config = engine_child.configure(tensorrt, RTX, 89)  # type: ignore[arg-type]
    assert tensorrt.flags == {Flags.REQUIRE_USER_ALLOCATION}
    assert (config.num_compute_capabilities, tensorrt.sm) == (1, ("8.9", 0))  # type: ignore[attr-defined]
    tensorrt = TensorRT(monkeypatch, user_allocation=False)
    engine_child.configure(tensorrt, ENTERPRISE, 90)  # type: ignore[arg-type]
    assert tensorrt.flags == set()
    assert not hasattr(tensorrt, "sm"), "it builds for the GPU that is there"


def test_a_profile_has_the_number_that_contexts_choose_it_by(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = TensorRT(monkeypatch)
    config = tensorrt.create_builder_config()

    def add(number: int, least: int = 7) -> None:
        shapes = {"keys": [[1, least], [1, 6], [1, 7]]} if least < 7 else {"keys": [[1, 7]] * 3}
        engine_child.add_profile(tensorrt, config, number, shapes)  # type: ignore[arg-type]

    tensorrt.places = [0, 1]
    add(0)
    assert tensorrt.shapes == {"keys": ([1, 7],) * 3}
    add(1, least=2)
    assert tensorrt.shapes == {"keys": ([1, 2], [1, 6], [1, 7])}
    tensorrt.places = [-1]
    with pytest.raises(RuntimeError, match="profile 2: TensorRT does not take it"):
        add(2)
    tensorrt.places = [1]
    with pytest.raises(RuntimeError, match="profile 2: TensorRT gives it the number 1"):
        add(2)
    for refusal, words in ((ValueError("no such input"), ": no such input"), (False, "$")):
        tensorrt.refuses = refusal  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match=rf"profile 0: TensorRT does not take keys of \[1, 7\]{words}"):
            add(0)
        with pytest.raises(RuntimeError, match=rf"take keys of \[1, 2\] to \[1, 7\]{words}"):
            add(0, least=2)


class Layer:
    """A layer of a network, as its base class."""

    def __init__(self, kind: str = "ATTENTION_INPUT") -> None:
        self.type, self.attention = SimpleNamespace(name=kind), SimpleNamespace(decomposable=True)


@pytest.mark.parametrize(
    ("makes", "asked", "decomposes"),
    [([True], [False], False), ([False, True], [False, True], True), ([False, False], [False, True], None)],
)
def test_fused_attention_is_asked_for_first(
    makes: list[bool], asked: list[bool], decomposes: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_child, "trt", SimpleNamespace(IAttentionInputLayer=Layer))
    layers, seen = [Layer(), Layer("CAST"), Layer()], []

    def make() -> bool:
        seen.append([layer.attention.decomposable for layer in layers])
        return makes[len(seen) - 1]

    build: Callable[[], bool] = lambda: engine_child.build_fused(layers, make, lambda: None)  # type: ignore[arg-type]  # noqa: E731
    if decomposes is None:
        with pytest.raises(RuntimeError, match="the builder made no engine"):
            build()
    else:
        assert build() is decomposes
    assert seen == [[allowed, True, allowed] for allowed in asked]


def test_a_graph_without_attention_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="the builder made no engine"):
        engine_child.build_fused([Layer("CAST")], lambda: bool(tried.append(1)), lambda: None)  # type: ignore[list-item,func-returns-value]
    assert tried == [1]


def test_an_engine_is_written_as_it_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensorrt = TensorRT(monkeypatch)
    taken: list[int] = []

    def build(network: str, config: str, writer: Any) -> bool:
        assert (network, config) == ("network", "config")
        taken.extend(writer.write(memoryview(piece)) for piece in (b"an ", b"engine"))
        return taken[-1] > 0

    tensorrt.build_serialized_network_to_stream = build  # type: ignore[attr-defined]
    write = engine_child.write_engine
    assert write(tensorrt, "network", "config", tmp_path / "e")  # type: ignore[arg-type]
    assert ((tmp_path / "e").read_bytes(), taken) == (b"an engine", [3, 6])
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            write(tensorrt, "network", "config", Path("/dev/full"))  # type: ignore[arg-type]


# A builder with a GPU may run the plugin.


def test_the_builder_of_a_gpu_is_given_the_kernels_that_the_plugin_launches(
    tmp_path: Path,
    launched: list[tuple[Any, ...]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []
    device = lambda number: SimpleNamespace(set_current=lambda: chosen.append(number))  # noqa: E731
    monkeypatch.setattr(sys.modules["cuda.core"], "Device", device, raising=False)
    given: list[Any] = []
    monkeypatch.setattr(plugin, "register_plugins", given.append)
    records = to_data(write_bundle(tmp_path, (90,)))
    request = {"plugins": "python", "sm": 90, "kernels": {"folder": str(tmp_path), "records": records}}
    check = engine_child._plugins(request)
    assert check is plugin.raise_plugin_error
    (made,) = given
    assert isinstance(made, launcher.KernelLauncher)
    made.collect(P, SIZES, 9)
    assert launched[0][2] == (b"compact_segments for 90", "compact_segments_symbol")
    assert chosen == [0]
    engine_child._plugins({"plugins": "python", "sm": 89})
    assert given[1] is None, "a builder without a GPU runs nothing"


@pytest.mark.parametrize(
    ("flavour", "aot", "graph", "gives"),
    [
        ("tensorrt", False, "step", True),
        ("tensorrt", True, "step", False),
        ("tensorrt", False, "prompt", False),
        ("tensorrt-rtx", False, "step", False),
    ],
)
def test_kernels_are_handed_on_where_the_builder_may_run_them(
    flavour: Any, aot: bool, graph: str, gives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec(heads=4)
    plan = build_plan(spec, spec.geometry(), load_policy("forcing-kv"), mixed_map(spec))
    asked: list[dict[str, Any]] = []

    def run_child(graph: Path, flavour: object, **request: Any) -> dict[str, Any]:
        asked.append(request)
        sizes = ("weight_bytes", "activation_bytes", "scratch_bytes", "peak_bytes", "layers", "plugin_layers")
        more = {"seconds": 1.0, "version": "11", "decomposed": False}
        return dict.fromkeys(sizes, 1) | more | {"device": "NVIDIA H200", "multiprocessors": 132}

    monkeypatch.setattr(engine_builder, "run_child", run_child)
    kernels = write_bundle(tmp_path, (90,))
    target = EngineTarget(FLAVOURS[flavour], (90,), aot)
    file = tmp_path / f"{graph}.onnx"
    record = build_engine(file, graph, plan, target, 90, tmp_path / "e", kernels=kernels)
    expected = {"folder": str(tmp_path), "records": to_data(kernels)} if gives else None
    assert asked[0].get("kernels") == expected
    assert (record.device, record.multiprocessors) == ("NVIDIA H200", 132)


def test_the_gpu_that_an_engine_is_tuned_on_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "device_model", lambda: ("NVIDIA H200", 132))
    assert engine_child.built_on(ENTERPRISE) == {"device": "NVIDIA H200", "multiprocessors": 132}
    assert engine_child.built_on(RTX) == {}, "built for any GPU of its kind, without one"
    monkeypatch.setattr(engines, "device_model", lambda: None)
    assert engine_child.built_on(ENTERPRISE) == {}


# The process.


BLOCKED = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxruntime", "transformers"):
            raise ImportError("the child imported " + name)

sys.meta_path.insert(0, Blocked())
child = runpy.run_path(sys.argv[1], run_name="child")
child["_plugins"]({"plugins": None})
import forcingkv.prune.plugin, forcingkv.prune.quick_plugin
import forcingkv.runtime.engines
assert not [name for name in sys.modules if name.startswith("forcingkv.export")]
print("done")
"""


def test_the_child_imports_no_torch() -> None:
    """Its own imports, and those of both kinds of plugins: with compiled ones Triton is among them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-c", BLOCKED, str(CHILD)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_libraries_are_found_by_names_without_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both flavours. Two versions of a library get one link: that which programs are linked with."""
    libraries, links = tmp_path / "tensorrt_libs", tmp_path / "links"
    libraries.mkdir()
    links.mkdir()
    for name in ("libnvinfer.so.11.4.0", "libnvinfer.so.11", "libnvonnxparser.so.11", "notes.txt"):
        (libraries / name).write_text(name, encoding="ascii")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    environment = engine_builder._environment(ENTERPRISE, links)
    assert {link.name: link.read_text(encoding="ascii") for link in links.iterdir()} == {
        "libnvinfer.so": "libnvinfer.so.11",
        "libnvonnxparser.so": "libnvonnxparser.so.11",
    }
    assert environment["LD_LIBRARY_PATH"] == f"{links}{os.pathsep}/elsewhere"
    monkeypatch.setattr(engine_builder, "find_spec", lambda name: None)
    unchanged = engine_builder._environment(ENTERPRISE, links)
    assert unchanged["LD_LIBRARY_PATH"] == "/elsewhere", "installed by other means than pip"


# What GPUs there are kernels and dtypes for.


@pytest.mark.parametrize(
    ("sms", "compiled"),
    [((89,), (89,)), ((121, 120), (120,)), ((90, 80), (80, 90)), ((87, 103), (86, 100)), ((), ())],
)
def test_kernels_are_compiled_for_the_gpus_that_are_asked_for(
    sms: tuple[int, ...], compiled: tuple[int, ...]
) -> None:
    assert launcher.kernel_sms(sms) == compiled


@pytest.mark.parametrize("sm", [75, 110])
def test_gpus_that_run_no_kernel_are_refused_before_anything_is_made(sm: int) -> None:
    spec = small_spec(heads=4)
    target = EngineTarget(RTX, (89, sm))
    pruned = build_plan(spec, spec.geometry(), load_policy("forcing-kv"), mixed_map(spec))
    with pytest.raises(
        InputError, match=rf"^sm_{sm} has no kernels that choose segments.* sm_80, .*such as window"
    ):
        engine_builder.check_plugin(pruned, target)
    engine_builder.check_plugin(build_plan(spec, spec.geometry(), load_policy("window")), target)


def test_a_gpu_without_bfloat16_is_refused() -> None:
    with pytest.raises(InputError, match=r"^sm_75 does not know bfloat16.*expected --dtype float16"):
        engine_builder.check_dtype(EngineTarget(RTX, (89, 75)), "bfloat16")
    engine_builder.check_dtype(EngineTarget(RTX, (89, 75)), "float16")
    engine_builder.check_dtype(EngineTarget(RTX, (80, 89)), "bfloat16")
