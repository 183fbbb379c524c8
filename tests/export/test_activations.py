"""What ONNX Runtime needs for a graph: counted by hand, and against a process that runs one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest

from forcingkv.export import onnxruntime_passes
from forcingkv.export.activations import activation_bytes
from forcingkv.export.onnxruntime_passes import attend_in_blocks, make_caches_early
from forcingkv.models.checkpoint import random_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.graph_file import read_graph
from forcingkv.runtime.graph_memory import weight_bytes
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Decoder
from tests.conftest import mixed_map, random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.conftest import small_bundle

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
CHILD = """
import json, sys
from pathlib import Path
import numpy as np
import onnxruntime as ort

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

path, shapes = sys.argv[1], json.loads(sys.argv[2])
options = ort.SessionOptions()
options.enable_cpu_mem_arena = options.enable_mem_pattern = options.enable_mem_reuse = False
options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
bare = status("VmRSS")
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
loaded = status("VmRSS") - bare
binding, arrays = session.io_binding(), []
for names, bind in ((session.get_inputs(), binding.bind_input), (session.get_outputs(), binding.bind_output)):
    for value in names:
        named = value.type.removeprefix("tensor(").removesuffix(")")
        kind = np.float32 if named == "float" else np.dtype(named)
        array = np.empty(shapes[value.name], kind)
        array.fill(value.name == "clean")
        arrays.append(array)
        bind(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
before = status("VmRSS")
session.run_with_iobinding(binding)
print(json.dumps([loaded, status("VmHWM") - before]))
"""
KILO = 4 * 250
"""Bytes of a tensor (250) of float32."""


def model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEADER + text)


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ("a = Sin(x)  b = Cos(a)  y = Exp(b)", 2),  # a and b, then b alone
        ("a = Sin(x)  b = Cos(x)  c = Tan(x)  d = Atan(c)  e = Sum(a, b, d)  y = Exp(e)", 4),
        ("a = Sin(x)  b = Relu(a)  c = Add(b, x)  y = Exp(c)", 1),  # in place twice
        ("a = Sin(x)  b = Relu(a)  c = Cos(a)  d = Sum(b, c)  y = Exp(d)", 3),  # a is read again
        ("a = Relu(x)  y = Exp(a)", 1),  # an input is never written over
        ("a = Sin(x)  b = Identity(a)  c = Cos(b)  d = Sum(a, c)  y = Exp(d)", 3),  # b is a
        ("a = Sin(x)  b = Sin(a)  next = Cos(x)  y = Exp(b)", 2),  # what is an output is the caller's
        ("w = Sin(zeros)  a = Add(x, w)  y = Exp(a)", 1),  # w is computed at load
        ("y = Sin(x)", 0),
    ],
)
def test_by_hand(nodes: str, wanted: int) -> None:
    more = ", float[250] next" if "next" in nodes else ""
    graph = model(f"g (float[250] x) => (float[250] y{more}) <float[1] zeros = {{0}}> {{ {nodes} }}")
    found = activation_bytes(graph, [{}])
    assert found == wanted * KILO


def test_the_phase_that_needs_most_counts() -> None:
    graph = model("g (float[n] x) => (float[n] y) { a = Sin(x) y = Exp(a) }")
    assert activation_bytes(graph, [{"x": (10,)}, {"x": (30,)}, {"x": (0,)}]) == 4 * 30


def test_attention_takes_scores_or_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 heads x 5 queries x 9 keys x 8; queries are scaled and the result is read once more."""
    own = "float[1, 2, 5, 8]"
    text = (
        f"g ({own} x, float[1, 2, n, 8] k, float[1, 2, n, 8] v) => ({own} y)"
        "{ q = Sin(x)  o = Attention <scale = 0.5> (q, k, v)  y = Exp(o) }"
    )
    shapes = {"k": (1, 2, 9, 8), "v": (1, 2, 9, 8)}
    queries, keys, scores = 2 * 5 * 8 * 4, 2 * 9 * 8 * 4, 2 * 5 * 9 * 4
    graph = model(text)
    assert activation_bytes(graph, [shapes]) == 2 * queries + scores
    whole = ir.from_proto(onnx.shape_inference.infer_shapes(graph))
    monkeypatch.setattr(onnxruntime_passes, "LARGE_SCORES", 0)
    attend_in_blocks(whole.graph, {"n": 9})
    assert activation_bytes(ir.to_proto(whole), [shapes]) == 2 * queries + queries + 2 * keys


def test_shapes_that_are_not_known_are_an_error() -> None:
    graph = model("g (float[250] x) => (float[250] y) { a = NonZero(x) b = Cast <to = 1> (a) y = Sum(x) }")
    with pytest.raises(ValueError, match="the shapes of a, b are not known"):
        activation_bytes(graph, [{}])


def test_weights_count_in_the_dtype_they_are_cast_to() -> None:
    graph = model("""g (float[4] x) => (float[4] y) <bfloat16[4] w = {1, 2, 3, 4}, float[1] c = {1}> {
        a = Cast <to = 1> (w)
        b = Add(a, x)
        y = Mul(b, c)
    }""")
    for tensor in graph.graph.initializer:  # as export writes them: contents as bytes
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    assert weight_bytes(read_graph(graph.SerializeToString(), "g")) == 4 * 4 + 4


def test_next_caches_are_made_where_keys_and_values_are() -> None:
    """Also those whose own inputs are made late, by nodes that nothing else needs."""
    graph = model("""g (float[4] x, int32[n] rows) => (float[4] y, float[4] next_a, float[m] next_b) {
        a = Sin(x)
        b = Cos(a)
        y = Exp(b)
        next_a = Neg(a)
        wide = Cast <to = 7> (rows)
        next_b = Gather(b, wide)
    }""")
    whole = ir.from_proto(graph)
    make_caches_early(whole.graph)
    assert [node.outputs[0].name for node in whole.graph] == ["wide", "a", "next_a", "b", "next_b", "y"]
    onnx.checker.check_model(ir.to_proto(whole))


@pytest.mark.long
def test_keys_of_a_layer_do_not_wait_for_the_others() -> None:
    """A model of twice the layers needs no more between inputs and outputs."""
    spec = small_spec(layers=1)
    one = shared_bundle(spec, random_model(spec).state_dict(), load_policy("window"), verify=False)
    bundles = map(Bundle.open, (one, small_bundle("window")))
    needs = [bundle.manifest.graphs["step"].activation_bytes for bundle in bundles]
    assert needs[1] == pytest.approx(needs[0], rel=0.05), "keys and values of a layer are a tenth"


@pytest.mark.parametrize(
    ("dtype", "policy", "layers"),
    [pytest.param("float32", "forcing-kv", 2, marks=pytest.mark.long), ("int8", "window", 1)],
)
def test_a_pass_takes_what_is_said(dtype: str, policy: str, layers: int) -> None:
    """Resident memory of a process that runs layers of 2,304 queries and a wide feed-forward."""
    spec = replace(
        load_spec("self-forcing"),
        layers=layers,
        heads=3,
        head_dim=128,
        ffn_width=20_000,
        text_width=64,
        latent_channels=3,
        decoder=Decoder("pixels"),
        width=48,
        height=64,
        resolutions={},
    )
    bundle = Bundle.open(
        shared_bundle(
            spec,
            random_weights(spec),
            load_policy(policy),
            headmap=mixed_map(spec) if policy == "forcing-kv" else None,
            verify=False,
            dtype=dtype,
        )
    )
    record, phase = bundle.manifest.graphs["step"], bundle.plan.phases[-1]
    assert record.activation_bytes is not None
    assert record.weight_bytes is not None
    shapes = {name: list(tensor.shape) for name, tensor in (record.inputs | record.outputs).items()}
    shapes |= {name: list(shape) for name, shape in bundle.plan.phase_shapes(phase).items()}
    for entry in bundle.plan.entries:
        following = list(bundle.plan.entry_shape(entry, phase.first_chunk))
        following[2] *= entry.role.name != "sink"
        shapes[f"next.{entry.name}"] = following
        if entry.role.name == "retained":
            shapes["retained_indices"] = [
                role.kept(spec.frames_per_chunk) for role in entry.group.roles if role.chooses
            ]
    words = [sys.executable, "-c", CHILD, str(bundle.graph("step")), json.dumps(shapes)]
    # A heap keeps what it was given back; above 1 MB each block is the system's own.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    ran = subprocess.run(words, capture_output=True, check=True, env=settings)
    loaded, took = json.loads(ran.stdout)
    assert record.activation_bytes > 100e6, "large enough for what else a process takes to be small"
    assert took == pytest.approx(record.activation_bytes, rel=0.15)
    # The libraries themselves take some 12 MB.
    assert loaded == pytest.approx(record.weight_bytes, rel=0.2, abs=16e6)
