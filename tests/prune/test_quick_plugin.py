"""Plugins compiled into engines: what TensorRT is told of them, and the PTX it is given.

The flavour tensorrt is not here. What it is told goes to an imitation of its plugin framework, and to the
Python source of that framework where it is installed (`pip install --no-deps tensorrt-cu13-bindings`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch

from forcingkv.headmaps.errors import InputError
from forcingkv.prune import kernel_compiler, onnx_operators, quick_plugin
from forcingkv.prune.launcher import SMS, KernelLauncher, LaunchSizes
from forcingkv.prune.quick_plugin import QUICK_PLUGINS, QuickPlugin, kernel_text, register_quick_plugins
from forcingkv.prune.reference import prune_score
from forcingkv.runtime import flavour
from forcingkv.runtime.engines import KernelName
from forcingkv.runtime.kv.segments import Split
from tests.prune.quick_framework import DataType, Framework, Imitated, Real, TensorRT
from tests.prune.test_plugin import model

BATCH, HEADS, WIDTH, FRAME, SEGMENTS, KEPT = 1, 2, 16, 12, 6, 6
NEW, SIZE = 3 * FRAME, FRAME // SEGMENTS
SM = 90
SIZES = {"frame_tokens": FRAME, "segment_tokens": SIZE, "kept": KEPT, "segments": SEGMENTS}
EVEN, UNEVEN = QUICK_PLUGINS[:3], (QUICK_PLUGINS[0], *QUICK_PLUGINS[3:])


@pytest.fixture(params=["imitated", "real"])
def framework(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Framework:
    """tensorrt.plugin, with the plugins registered."""
    tensorrt, imitated = TensorRT(), Imitated(SIZES)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", imitated)
    monkeypatch.setattr(flavour, "_chosen", [(flavour.FLAVOURS["tensorrt"], tensorrt)])
    monkeypatch.setattr(quick_plugin, "_sm", [])
    if request.param == "real" and not Real.install(monkeypatch):
        pytest.skip("tensorrt.plugin is not installed (pip install --no-deps tensorrt-cu13-bindings)")
    register_quick_plugins(SM)
    return Real(tensorrt, SIZES) if request.param == "real" else imitated


def nodes(transition: int) -> dict[str, list[Any]]:
    """Inputs of the nodes, each a shape and a type."""
    kv = [((BATCH, HEADS, tokens, WIDTH), DataType.BF16) for tokens in (transition, NEW)]
    cosines = [((transition + 2 * FRAME,), DataType.FLOAT)]
    follow = [kv[0], kv[0], kv[1], kv[1], ((KEPT,), DataType.INT64)]
    return {
        "TokenCosines": kv,
        **dict.fromkeys(("SelectSegments", "SelectUnevenSegments"), cosines),
        **dict.fromkeys(("DynamicPruneFollow", "UnevenPruneFollow"), follow),
    }


@pytest.mark.parametrize("transition", [0, FRAME])
def test_shapes_and_types(framework: Framework, transition: int) -> None:
    found = {p.name: framework.shapes(p, nodes(transition)[p.name]) for p in QUICK_PLUGINS}
    assert found == {
        "TokenCosines": [((transition + 2 * FRAME,), DataType.FLOAT)],
        **{name: [((KEPT,), DataType.INT64)] for name in ("SelectSegments", "SelectUnevenSegments")},
        **{
            name: [((BATCH, HEADS, FRAME, WIDTH), DataType.BF16)] * 2
            for name in ("DynamicPruneFollow", "UnevenPruneFollow")
        },
    }


@pytest.mark.parametrize(
    ("plugins", "uneven"), [(EVEN, None), (UNEVEN, Split(FRAME, SEGMENTS))], ids=["even", "uneven"]
)
@pytest.mark.parametrize("transition", [0, FRAME])
def test_what_is_launched_is_what_the_runtime_launches(
    framework: Framework,
    transition: int,
    plugins: tuple[QuickPlugin, ...],
    uneven: Split | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = []

    def note(self: Any, name: str, grid: Any, pointers: Any, sizes: Any, stream: int) -> None:
        launched.append((name, list(grid), list(sizes)))

    monkeypatch.setattr(KernelLauncher, "_launch", note)
    launcher = KernelLauncher.__new__(KernelLauncher)
    sizes = LaunchSizes(BATCH, HEADS, transition, NEW, SIZE, KEPT, FRAME, uneven)
    launcher.score(0, 0, 0, 0, sizes, 0)
    launcher.collect([0] * 7, sizes, 0)

    kernels = [framework.kernel(plugin, nodes(transition)[plugin.name]) for plugin in plugins]
    assert [(kernel.symbol, kernel.grid, kernel.numbers) for kernel in kernels] == launched
    for plugin, kernel in zip(plugins, kernels, strict=True):
        ptx, made = kernel_text(plugin.kernel, len(plugin.outputs), "bfloat16", WIDTH, SM)
        assert (kernel.ptx, kernel.threads, kernel.shared_bytes) == (ptx, 32 * made.num_warps, made.shared)


ORDER: dict[KernelName, list[int]] = {
    "token_cosines": [0, 1, 3, 4, 5, 6, 2],
    "select_segments": [0, 2, 3, 4, 1],
    "compact_segments": [0, 1, 2, 3, 4, 7, 8, 9, 10, 5, 6],
    "select_uneven_segments": [0, 2, 3, 4, 5, 1],
    "compact_uneven_segments": [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 5, 6],
}
"""Places in Triton's signature (pointers, then sizes) of: inputs, sizes, outputs."""


@pytest.mark.parametrize("plugin", QUICK_PLUGINS, ids=lambda plugin: plugin.name)
@pytest.mark.parametrize("sm", SMS)
def test_kernels_take_inputs_sizes_outputs_and_nothing_else(plugin: QuickPlugin, sm: int) -> None:
    ptx, made = kernel_text(plugin.kernel, len(plugin.outputs), "bfloat16", WIDTH, sm)
    entry = re.search(rf"\.entry {made.name}\(\n(.*?)\n\)", ptx, re.DOTALL)
    assert entry is not None
    taken = re.findall(r"\.param (\.u\d+).* \w+_(\d+)", entry[1])
    assert [int(place) for _, place in taken] == ORDER[plugin.kernel]
    sizes = len(ORDER[plugin.kernel]) - len(plugin.inputs) - len(plugin.outputs)
    assert [kind for kind, _ in taken] == [
        *[".u64"] * len(plugin.inputs),
        *[".u32"] * sizes,
        *[".u64"] * len(plugin.outputs),
    ]
    assert f".target sm_{sm}\n" in ptx
    assert "/" not in "".join(re.findall(r'\.file.*"(.*)"', ptx))
    cubin, _, spilled = kernel_compiler.assemble(ptx, sm)
    assert cubin
    assert spilled == 0


def test_a_kernel_that_reads_more_than_it_is_passed_is_refused() -> None:
    ptx = "\n".join([".visible .entry k(", "\t.param .u64 a,", "\t.param .u64 b", ")", "{ ld [b]; }"])
    assert quick_plugin._arranged(ptx, [1]).splitlines()[1:3] == ["\t.param .u64 b", ")"]
    assert quick_plugin._arranged(ptx, [1, 0]).splitlines()[1:3] == ["\t.param .u64 b,", "\t.param .u64 a"]
    with pytest.raises(RuntimeError, match="the kernel reads b, which TensorRT does not pass"):
        quick_plugin._arranged(ptx, [0])


def test_the_plugins_are_the_operators_that_export_writes() -> None:
    functions = {f.name: f for f in onnx_operators.prune_functions()}
    for plugin in QUICK_PLUGINS:
        function = functions[plugin.name]
        assert tuple(function.input) == plugin.inputs
        assert tuple(function.output) == plugin.outputs
        assert set(function.attribute) == {*plugin.sizes, "plugin_namespace"}


def test_more_candidates_than_the_kernel_takes_are_refused(framework: Framework) -> None:
    select = QUICK_PLUGINS[1]
    assert framework.kernel(select, [((64 * SIZE,), DataType.FLOAT)]).numbers == [SIZE, 64, KEPT]
    with pytest.raises(InputError, match="has 65 segments to choose"):
        framework.kernel(select, [((65 * SIZE,), DataType.FLOAT)])
    uneven = UNEVEN[1]
    assert framework.kernel(uneven, [((10 * FRAME,), DataType.FLOAT)]).numbers == [FRAME, SEGMENTS, 60, KEPT]
    with pytest.raises(InputError, match="has 66 segments to choose"):
        framework.kernel(uneven, [((11 * FRAME,), DataType.FLOAT)])


def test_registering_again_only_names_another_gpu(framework: Framework) -> None:
    register_quick_plugins(120)
    kernel = framework.kernel(QUICK_PLUGINS[2], nodes(FRAME)["DynamicPruneFollow"])
    assert ".target sm_120\n" in kernel.ptx


def test_registering_needs_a_tensorrt_that_has_such_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "_chosen", [])
    with pytest.raises(InputError, match=r"without TensorRT has no plugins .* expected tensorrt 10\.15"):
        register_quick_plugins(SM)
    monkeypatch.setattr(flavour, "_chosen", [(flavour.FLAVOURS["tensorrt-rtx"], ModuleType("tensorrt_rtx"))])
    with pytest.raises(InputError, match="tensorrt-rtx has no plugins"):
        register_quick_plugins(SM)


def test_two_plugins_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = TensorRT()
    tensorrt.creators["DynamicPruneFollow", "1", "forcingkv"] = object()
    monkeypatch.setattr(flavour, "_chosen", [(flavour.FLAVOURS["tensorrt"], tensorrt)])
    monkeypatch.setattr(quick_plugin, "_sm", [])
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", Imitated(SIZES))
    with pytest.raises(RuntimeError, match="another plugin DynamicPruneFollow is registered"):
        register_quick_plugins(SM)


def build_on_gpu(folder: str, sm: int) -> None:
    """Build the engine of folder/model.onnx; in a process of its own."""
    from forcingkv.runtime.flavour import choose, trt

    choose("tensorrt")
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    register_quick_plugins(sm)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.WARNING))
    assert parser.parse(Path(folder, "model.onnx").read_bytes())
    config = builder.create_builder_config()
    for tokens in (0, FRAME):
        profile = builder.create_optimization_profile()
        shape = trt.Dims([BATCH, HEADS, tokens, WIDTH])
        for name in ("transition_keys", "transition_values"):
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    Path(folder, "model.engine").write_bytes(memoryview(engine))


def run_on_gpu(folder: str) -> None:
    """Run the engine on folder/inputs.pt, in a process that knows nothing of the plugins."""
    import tensorrt as trt

    inputs = {name: tensor.cuda() for name, tensor in torch.load(Path(folder, "inputs.pt")).items()}
    stream = torch.cuda.Stream()
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(Path(folder, "model.engine").read_bytes())
    context = engine.create_execution_context()
    profile = 1 if inputs["transition_keys"].shape[2] else 0
    assert context.set_optimization_profile_async(profile, stream.cuda_stream)
    kinds = {trt.DataType.BF16: torch.bfloat16, trt.DataType.INT64: torch.int64}
    for name, tensor in inputs.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
    every, spare = dict(inputs), torch.empty(256, device="cuda")
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if name not in every:
            shape, kind = context.get_tensor_shape(name)[:], kinds[engine.get_tensor_dtype(name)]
            every[name] = torch.empty(shape, dtype=kind, device="cuda")
        # An empty tensor has no address, and TensorRT wants one.
        assert context.set_tensor_address(name, every[name].data_ptr() or spare.data_ptr())
    torch.cuda.synchronize()
    assert context.execute_async_v3(stream.cuda_stream)
    torch.cuda.synchronize()
    outputs = {name: tensor.cpu() for name, tensor in every.items() if name not in inputs}
    torch.save(outputs, Path(folder, "outputs.pt"))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("tensorrt_libs") is None,
    reason="needs a GPU and the flavour tensorrt",
)
@pytest.mark.parametrize("transition", [0, FRAME])
def test_an_engine_runs_the_kernels_where_no_plugin_is_known(transition: int, tmp_path: Path) -> None:
    split = onnx.load_from_string(model())
    onnx_operators.split_prune(split)
    onnx.save(split, tmp_path / "model.onnx")
    generator = torch.Generator().manual_seed(0)
    lengths = {"transition": transition, "new": NEW}
    inputs = {
        f"{when}_{kind}": torch.randn((BATCH, HEADS, lengths[when], WIDTH), generator=generator).bfloat16()
        for when in lengths
        for kind in ("keys", "values")
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    major, minor = torch.cuda.get_device_capability()
    for call in (f"build_on_gpu({str(tmp_path)!r}, {10 * major + minor})", f"run_on_gpu({str(tmp_path)!r})"):
        code = f"from {__name__} import build_on_gpu, run_on_gpu; {call}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    exact = {name: tensor.float() for name, tensor in inputs.items()}
    tensors = [exact[f"{when}_{kind}"] for when in lengths for kind in ("keys", "values")]
    *retained, indices = prune_score(*tensors, FRAME, SEGMENTS, KEPT)
    assert outputs["indices"].tolist() == indices.tolist()
    for names in (("keys", "values"), ("keys2", "values2")):
        for name, wanted in zip(names, retained, strict=True):
            assert torch.equal(outputs[name].float(), wanted)
