"""Denoising passes make no next caches, and all else is as it was without branches, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from forcingkv.export import VerificationError, export_bundle, onnx_writer
from forcingkv.export.graphs import step_graph
from forcingkv.export.onnx_writer import write_onnx
from forcingkv.export.onnxruntime_passes import branch_on_clean, make_caches_early, taken_branches
from forcingkv.prune.onnx_operators import graphs, split_prune
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from forcingkv.runtime.bundle import CLEAN
from forcingkv.runtime.kv.plan import Phase
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.tensors import read_header
from tests.conftest import random_model, small_spec
from tests.exported import made_once, shared_bundle
from tests.runtime.conftest import small_bundle

Arrays = dict[str, npt.NDArray[Any]]
POLICIES = ("forcing-kv", "dummy-forcing")
"""Every role, and layers of one group and of several; the other policies have some of these."""
ALWAYS = ["next_latents", "x0"]
SPEC = small_spec(layers=2)

TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (float[1, 2, 5, 4] x, int32[n] rows) =>
  (float[1, 2, 5, 4] y, float[1, 2, n, 4] a, float[1, 2, m, 4] b, int64[n] wide, float[1, 2, 5, 4] p) {
    p = Sin(x)
    wide = Cast <to = 7> (rows)
    q = Cos(p)
    turned = Neg(p)
    a = Gather <axis = 2> (turned, wide)
    y = Exp(q)
    b = Gather <axis = 2> (q, wide)
}"""
GROUPS = [["a", "wide", "p"], ["b"]]


@dataclass(frozen=True)
class Pair:
    """One model, exported with branches and without, as bundles were before."""

    branched: Bundle
    plain: Bundle


@pytest.fixture(scope="module", params=POLICIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    branched = Bundle.open(small_bundle(request.param))
    weights, policy = random_model(SPEC).state_dict(), branched.plan.policy

    def without_branches(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_writer, "branch_on_clean", lambda *_: None)
            export_bundle(SPEC, weights, policy, out, headmap=branched.headmap, verify=False)

    return Pair(branched, Bundle.open(made_once(without_branches, SPEC, weights, branched.headmap, policy)))


def random_inputs(bundle: Bundle, phase: Phase) -> Arrays:
    generator, shapes = np.random.default_rng(5), bundle.plan.phase_shapes(phase)
    records = bundle.manifest.graphs["step"].inputs
    return {
        name: np.arange(shapes[name][0], dtype=np.int32)
        if record.dtype == "int32"
        else generator.standard_normal(shapes.get(name, record.shape), dtype=np.float32)
        for name, record in records.items()
        if name != CLEAN
    }


def run(session: ort.InferenceSession, inputs: Arrays, clean: bool | None = None) -> Arrays:
    told = {} if clean is None else {CLEAN: np.array([clean])}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs | told), strict=True))


def loaded(content: Path | onnx.ModelProto, **options: Any) -> ort.InferenceSession:
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = 1
    for name, value in options.items():
        setattr(chosen, name, value)
    given = str(content) if isinstance(content, Path) else content.SerializeToString()
    return ort.InferenceSession(given, chosen, providers=["CPUExecutionProvider"])


def by_hand() -> ir.Model:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT)))
    branch_on_clean(model.graph, GROUPS)
    make_caches_early(model.graph)
    return model


def test_a_branch_for_each_group_where_what_it_reads_is_made() -> None:
    """The second takes `wide` of the first; an output that all passes need is copied in a branch."""
    proto = ir.to_proto(by_hand())
    onnx.checker.check_model(proto, full_check=True)
    assert [[node.op_type for node in graph.node] for graph in graphs(proto)] == [
        ["Sin", "If", "Cos", "If", "Exp"],
        ["Cast", "Neg", "Gather", "Identity"],
        ["Constant"] * 3,
        ["Gather"],
        ["Constant"],
    ]


def test_a_size_that_is_not_known_is_an_error() -> None:
    text = TEXT.replace("float[1, 2, m, 4] b", "float[1, h, m, 4] b")
    model = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(ValueError, match=r"the size of b\.made along axis 1 is not known: h"):
        branch_on_clean(model.graph, GROUPS)


@pytest.mark.parametrize("rows", [[], [3], [4, 0, 1]])
def test_by_hand(rows: list[int]) -> None:
    generator = np.random.default_rng(0)
    inputs = {
        "x": generator.standard_normal((1, 2, 5, 4), dtype=np.float32),
        "rows": np.array(rows, np.int32),
    }
    model = ir.to_proto(by_hand())
    expected, session = run(loaded(onnx.parser.parse_model(TEXT)), inputs), loaded(model)
    assert_equal(run(session, inputs, clean=True), expected)
    assert_equal(run(loaded(taken_branches(model)), inputs, clean=True), expected)
    found = run(session, inputs, clean=False)
    np.testing.assert_array_equal(found["y"], expected["y"])
    empty = {"a": (1, 2, 0, 4), "b": (1, 2, 0, 4), "p": (1, 2, 0, 4), "wide": (0,)}
    assert {name: found[name].shape for name in empty} == empty
    assert {name: array.dtype for name, array in found.items()} == {n: a.dtype for n, a in expected.items()}


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_every_pass_gives_what_it_did_to_the_bit(pair: Pair) -> None:
    sessions = [loaded(bundle.graph("step")) for bundle in (pair.branched, pair.plain)]
    for phase in pair.plain.plan.phases:
        inputs = random_inputs(pair.plain, phase)
        expected = run(sessions[1], inputs)
        assert_equal(run(sessions[0], inputs, clean=True), expected)
        found = run(sessions[0], inputs, clean=False)
        assert_equal({name: found[name] for name in ALWAYS}, {name: expected[name] for name in ALWAYS})
        assert {name for name, array in found.items() if array.size} == set(ALWAYS)


def test_a_denoising_pass_runs_no_node_of_a_branch(pair: Pair, tmp_path: Path) -> None:
    model = onnx.load(pair.branched.graph("step"), load_external_data=False)
    nodes = [node for branch in list(graphs(model))[1:] for node in branch.node]
    names = {node.name for node in nodes if node.domain != "forcingkv" and node.op_type != "Constant"}
    inputs, ran = random_inputs(pair.branched, pair.branched.plan.phases[-1]), {}
    for clean in (False, True):
        session = loaded(
            pair.branched.graph("step"), enable_profiling=True, profile_file_prefix=str(tmp_path / f"{clean}")
        )
        run(session, inputs, clean)
        events = json.loads(Path(session.end_profiling()).read_text())
        ran[clean] = {
            event["name"].removesuffix("_kernel_time") for event in events if event["cat"] == "Node"
        }
    assert len(names) >= 4 * SPEC.layers / 2
    assert names <= ran[True], "all of them, in a clean pass"
    assert not names & ran[False]
    more = len(names) + 5 * any(node.domain == "forcingkv" for node in nodes)  # its body is some dozen
    assert len(ran[True]) - len(ran[False]) >= more


def test_a_session_makes_the_same_video_and_binds_next_caches_once_a_chunk(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a bundle that was exported before there were branches."""
    assert not pair.plain.manifest.graphs["step"].skips_caches
    bound: list[tuple[bool | None, int]] = []
    bind = OnnxLane.bind

    def noted(
        self: Any, graph: str, phase: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Any:
        if "next_latents" in outputs:
            told = bool(inputs[CLEAN].fetch(None).array()[0]) if CLEAN in inputs else None
            bound.append((told, len(outputs) - 1))
        return bind(self, graph, phase, inputs, outputs)

    monkeypatch.setattr(OnnxLane, "bind", noted)
    videos, caches = [], len(pair.plain.plan.entries)
    for bundle in (pair.branched, pair.plain):
        with Session.open(bundle.path, threads=1) as session:
            videos.append(list(session.generate("b a d", seed=3, chunks=7)))
    assert set(bound) == {(False, 0), (True, caches), (None, caches)}
    for found, expected in zip(*videos, strict=True):
        np.testing.assert_array_equal(found.latents, expected.latents)
        np.testing.assert_array_equal(found.frames, expected.frames)


def test_a_pass_needs_the_memory_that_it_did(pair: Pair) -> None:
    new, old = (bundle.manifest.graphs["step"] for bundle in (pair.branched, pair.plain))
    assert new.activation_bytes == pytest.approx(old.activation_bytes, rel=0.01)
    assert new.weight_bytes == old.weight_bytes


@pytest.mark.parametrize("pair", ["forcing-kv"], indirect=True)
def test_nodes_in_branches_are_split_into_one_kernel_each(pair: Pair, tmp_path: Path) -> None:
    """As in the float32 graph that an export with kernels in its engines is verified by."""
    folder = shutil.copytree(pair.branched.path, tmp_path / "bundle")
    whole, split = folder / "step.onnx", folder / "split.onnx"
    model = onnx.load(whole, load_external_data=False)
    split_prune(model)
    onnx.save_model(model, split)
    kinds = {node.op_type for graph in graphs(model) for node in graph.node if node.domain == "forcingkv"}
    assert kinds == {function.name for function in model.functions}
    assert "SelectSegments" in kinds
    assert "DynamicPrune" not in kinds
    inputs = random_inputs(pair.branched, pair.branched.plan.phases[-1])
    assert_equal(run(loaded(split), inputs, clean=True), run(loaded(whole), inputs, clean=True))


def test_graphs_for_tensorrt_have_no_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec(layers=1)
    model = random_model(spec)
    bundle = Bundle.open(shared_bundle(spec, model.state_dict(), load_policy("window"), verify=False))
    stored, _ = read_header(bundle.path / "weights.safetensors")
    graph = step_graph(model, bundle.plan)
    assert graph.clean_outputs
    traced = ir.to_proto(onnx_writer._traced(lambda: graph)[1])  # nothing of it depends on clean outputs
    monkeypatch.setattr(onnx_writer, "_traced", lambda make: (make(), ir.from_proto(traced)))
    contents = []
    for number, made in enumerate((graph, replace(graph, clean_outputs=()))):
        path = tmp_path / f"{number}.onnx"
        written = write_onnx(lambda made=made: made, path, stored, "weights", tensorrt=True)  # type: ignore[misc]
        contents.append(path.read_bytes())
        assert len(list(graphs(written))) == 1
        assert [value.name for value in written.graph.input] == list(graph.inputs)
    assert contents[0] == contents[1]


def test_an_export_that_makes_next_caches_in_every_pass_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the input, and nothing hangs on it."""
    spec = small_spec(layers=1)

    def told_in_vain(graph: ir.Graph, groups: Any) -> None:
        told = ir.Value(name=CLEAN, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
        graph.inputs.append(told)

    monkeypatch.setattr(onnx_writer, "branch_on_clean", told_in_vain)
    with pytest.raises(VerificationError, match="graph step differs from torch by inf"):
        export_bundle(spec, random_model(spec).state_dict(), load_policy("window"), tmp_path / "b")
