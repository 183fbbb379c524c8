"""Attention over blocks: the same numbers as the standard operator, and no scores in memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from forcingkv.export import export_bundle, onnxruntime_passes
from forcingkv.export.graphs import step_graph
from forcingkv.export.onnx_writer import write_onnx
from forcingkv.export.onnxruntime_passes import LARGE_SCORES, attend_in_blocks
from forcingkv.runtime import Bundle
from forcingkv.runtime.bundle import CLEAN
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.tensors import read_header
from tests.conftest import headmap_of, random_model, small_spec
from tests.exported import made_once
from tests.runtime.conftest import small_bundle

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'
Arrays = dict[str, npt.NDArray[np.generic]]

CHILD = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime as ort

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

options = ort.SessionOptions()
options.enable_cpu_mem_arena = False
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = {value.name: np.ones(value.shape, np.float32) for value in session.get_inputs()}
before = status("VmRSS")
session.run(None, inputs)
print(status("VmHWM") - before)
"""


def attention(queries: int, keys: str, heads: int = 2, width: int = 8) -> ir.Model:
    """One attention over a cache of `keys` tokens and the current ones."""
    own, held = f"float[1, {heads}, {queries}, {width}]", f"float[1, {heads}, {keys}, {width}]"
    model = onnx.parser.parse_model(
        f"{HEADER} g ({own} q, {held} kc, {own} kn, {held} vc, {own} vn) => ({own} y) {{\n"
        "k = Concat <axis = 2> (kc, kn)   v = Concat <axis = 2> (vc, vn)\n"
        "y = Attention <scale = 0.25> (q, k, v)\n}"
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def run(model: onnx.ModelProto | Path, inputs: Arrays) -> list[npt.NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("cached", [0, 1, 130])
@pytest.mark.parametrize(("queries", "heads", "width"), [(5, 1, 4), (70, 3, 12)])
def test_it_computes_what_the_standard_operator_does(
    cached: int, queries: int, heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One length for all of a cache, known only when the graph runs."""
    model = attention(queries, "n", heads, width)
    generator = np.random.default_rng(0)
    inputs: Arrays = {
        name: generator.standard_normal((1, heads, tokens, width), dtype=np.float32)
        for name, tokens in {"q": queries, "kc": cached, "kn": queries, "vc": cached, "vn": queries}.items()
    }
    before = run(ir.to_proto(model), inputs)
    monkeypatch.setattr(onnxruntime_passes, "LARGE_SCORES", 0)
    attend_in_blocks(model.graph, {"n": 130})
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    assert operators(proto.graph) == {"Concat": 2, "Reshape": 4, "MultiHeadAttention": 1}
    np.testing.assert_allclose(run(proto, inputs)[0], before[0], atol=1e-6)


def test_small_scores_stay_with_the_standard_operator() -> None:
    """What counts is the largest length: 2 heads x 64 queries x (n + 64) keys in float32."""
    largest = LARGE_SCORES // (4 * 2 * 64) - 64
    for length, wanted in ((largest - 1, "Attention"), (largest, "MultiHeadAttention")):
        model = attention(64, "n")
        attend_in_blocks(model.graph, {"n": length})
        found = operators(ir.to_proto(model).graph)
        assert found[wanted] == 1, length
        assert ("com.microsoft" in model.opset_imports) == (wanted != "Attention")


def test_a_length_that_is_not_given_is_an_error() -> None:
    with pytest.raises(ValueError, match="the length of kc is not known: n"):
        attend_in_blocks(attention(5, "n").graph, {})


def test_bundles_with_and_without_agree_in_every_phase() -> None:
    spec, policy = small_spec(layers=2), load_policy("forcing-kv")
    weights, headmap = random_model(spec).state_dict(), headmap_of(spec, [[0], [1]])

    def in_blocks(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnxruntime_passes, "LARGE_SCORES", 0)
            export_bundle(spec, weights, policy, out, headmap=headmap)

    blocks = Bundle.open(made_once(in_blocks, spec, weights, policy, headmap))
    assert max(blocks.manifest.verification.values()) <= 1e-5, "to torch"
    standard = small_bundle("forcing-kv")
    bundles = {"standard": standard / "step.onnx", "blocks": blocks.graph("step")}
    plan = blocks.plan
    counts = {
        name: operators(onnx.load(path, load_external_data=False).graph) for name, path in bundles.items()
    }
    nodes = sum(len(groups) + 1 for groups in plan.layers)  # a group each, and the prompt
    assert (counts["standard"]["Attention"], counts["standard"]["MultiHeadAttention"]) == (nodes, 0)
    assert (counts["blocks"]["Attention"], counts["blocks"]["MultiHeadAttention"]) == (0, nodes)
    generator = np.random.default_rng(1)
    records = blocks.manifest.graphs["step"].inputs
    for phase in plan.phases:
        shapes = plan.phase_shapes(phase)
        inputs: Arrays = {
            name: np.arange(shapes[name][0], dtype=np.int32)
            if record.dtype == "int32"
            else np.array([True])
            if name == CLEAN
            else generator.standard_normal(shapes.get(name, record.shape), dtype=np.float32)
            for name, record in records.items()
        }
        found = [run(path, inputs) for path in bundles.values()]
        for expected, seen in zip(*found, strict=True):
            np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_graphs_for_tensorrt_have_the_standard_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec(layers=2)
    headmap = headmap_of(spec, [[0], [1]])
    plan = build_plan(spec, spec.geometry(None), load_policy("forcing-kv"), headmap)
    stored, _ = read_header(small_bundle("forcing-kv") / "weights.safetensors")
    monkeypatch.setattr(onnxruntime_passes, "LARGE_SCORES", 0)
    model = write_onnx(
        lambda: step_graph(random_model(spec), plan), tmp_path / "step.onnx", stored, "weights", tensorrt=True
    )
    assert operators(model.graph)["MultiHeadAttention"] == 0
    assert operators(model.graph)["Attention"] == 5
    assert [entry.domain for entry in model.opset_import if entry.domain == "com.microsoft"] == []
    assert model.graph.node[-1].output[0] == "next_latents", "nodes stand in the order they were traced in"


def test_scores_are_never_held(tmp_path: Path) -> None:
    """4 heads x 1,536 queries x 6,144 keys: scores of 151 MB, and keys and values of 12.6 MB."""
    model = attention(1536, "4608", heads=4, width=64)
    peaks = {}
    for name in ("standard", "blocks"):
        if name == "blocks":
            attend_in_blocks(model.graph, {})
        onnx.save_model(ir.to_proto(model), tmp_path / f"{name}.onnx")
        words = [sys.executable, "-c", CHILD, str(tmp_path / f"{name}.onnx")]
        peaks[name] = int(subprocess.run(words, capture_output=True, check=True).stdout)
    assert peaks["standard"] > 150e6
    assert peaks["blocks"] < 50e6
