"""Passes over graphs: ONNX Runtime computes the same before and after, and the operators are gone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.export.passes import scale_attention, use_transposed
from forcingkv.export.tensorrt_passes import (
    align_parameters,
    allow_decomposition,
    fold_modulation,
    narrow_indices,
    pair_lone_heads,
    split_slices,
)

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'
Arrays = dict[str, npt.NDArray[np.generic]]


def graph_of(text: str) -> ir.Model:
    model = onnx.parser.parse_model(HEADER + text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def run(model: ir.Model, inputs: Arrays) -> list[npt.NDArray[np.float32]]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # constants that no node uses any more are removed by the writer
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def random(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@given(
    size=st.integers(2, 9),
    bounds=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_slices_become_splits_and_gathers(size: int, bounds: list[tuple[int, int]]) -> None:
    """Whatever the bounds: negative, the whole, overlapping, the same twice."""
    bounds = [pair for pair in bounds if len(range(size)[slice(*pair)])] or [(0, 1)]
    outputs = ", ".join(
        f"float[2, {len(range(size)[slice(*pair)])}, 3] y{n}" for n, pair in enumerate(bounds)
    )
    constants = ", ".join(
        f"int64[1] s{n} = {{{a}}}, int64[1] e{n} = {{{b}}}" for n, (a, b) in enumerate(bounds)
    )
    nodes = "\n".join(f"y{n} = Slice(x, s{n}, e{n}, axis, step)" for n in range(len(bounds)))
    model = graph_of(
        f"g (float[2, {size}, 3] data) => ({outputs})"
        f" <int64[1] axis = {{1}}, int64[1] step = {{1}}, {constants}> {{ x = Neg(data)\n {nodes} }}"
    )
    inputs: Arrays = {"data": random(2, size, 3)}
    before = run(model, inputs)
    split_slices(model.graph)
    assert operators(model)["Slice"] == 0
    assert [value.name for value in model.graph.outputs] == [f"y{n}" for n in range(len(bounds))]
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_slice_of_a_slice_is_cut_from_the_right_tensor() -> None:
    model = graph_of("""g (float[2, 8, 6] x) => (float[2, 2, 6] a, float[2, 3, 6] b, float[2, 5, 6] rest)
        <int64[1] zero = {0}, int64[1] three = {3}, int64[1] eight = {8}, int64[1] last = {-2},
         int64[1] axis = {1}> {
        rest = Slice(x, three, eight, axis)
        b = Slice(x, zero, three, axis)
        a = Slice(rest, last, eight, axis)
    }""")
    inputs: Arrays = {"x": random(2, 8, 6)}
    before = run(model, inputs)
    split_slices(model.graph)
    assert operators(model) == {"Split": 1, "Gather": 1}
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_slice_of_a_length_known_later_stays() -> None:
    model = graph_of("""g (float[2, n, 6] x) => (float[2, m, 6] y)
        <int64[1] start = {-2}, int64[1] end = {99}, int64[1] axis = {1}> {
        y = Slice(x, start, end, axis)
    }""")
    split_slices(model.graph)
    assert operators(model) == {"Slice": 1}


def test_a_modulated_normalisation_is_one_operator() -> None:
    model = graph_of("""g (float[1, 7, 4] x, float[1, 1, 4] gain, float[1, 1, 4] shift) => (float[1, 7, 4] y)
        <float[4] ones = {1, 1, 1, 1}> {
        n = LayerNormalization <axis = -1, epsilon = 1e-6, stash_type = 1> (x, ones)
        m = Mul(gain, n)
        y = Add(m, shift)
    }""")
    inputs: Arrays = {"x": random(1, 7, 4), "gain": random(1, 1, 4, seed=1), "shift": random(1, 1, 4, seed=2)}
    before = run(model, inputs)
    fold_modulation(model.graph)
    assert operators(model) == {"LayerNormalization": 1}
    np.testing.assert_allclose(run(model, inputs)[0], before[0], atol=1e-6)


def test_a_normalisation_of_which_more_is_used_is_left() -> None:
    model = graph_of("""g (float[1, 7, 4] x, float[1, 1, 4] gain) => (float[1, 7, 4] y, float[1, 7, 4] n)
        <float[4] ones = {1, 1, 1, 1}> {
        n = LayerNormalization <axis = -1, epsilon = 1e-6, stash_type = 1> (x, ones)
        m = Mul(n, gain)
        y = Add(m, gain)
    }""")
    fold_modulation(model.graph)
    assert operators(model) == {"LayerNormalization": 1, "Mul": 1, "Add": 1}


def test_attention_for_tensorrt_may_be_decomposed() -> None:
    model = graph_of("""g (float[1, 2, 5, 8] q, float[1, 2, 9, 8] k) => (float[1, 2, 5, 8] y) {
        x = Attention <scale = 0.5> (q, k, k)
        y = Attention(x, k, k)
    }""")
    allow_decomposition(model.graph)
    nodes = ir.to_proto(model).graph.node
    assert [{a.name: a.i or a.f for a in node.attribute} for node in nodes] == [
        {"scale": 0.5, "TRT_decomposable": 1},
        {"TRT_decomposable": 1},
    ]


@pytest.mark.parametrize("kind", [1, 10])
def test_attention_says_its_scale(kind: int) -> None:
    """In float32 (1) as an attribute; in float16 (10) queries are scaled before they are rounded."""
    name = {1: "float", 10: "float16"}[kind]
    model = graph_of(
        f"""g (float[1, 2, 5, 8] q, float[1, 2, 9, 8] k, float[1, 2, 9, 8] v) => (float[1, 1, 5, 8] y)
        <int64[2] parts = {{1, 1}}> {{
        qc = Cast <to = {kind}> (q)   kc = Cast <to = {kind}> (k)   vc = Cast <to = {kind}> (v)
        qa, qb = Split <axis = 1> (qc, parts)
        ka, kb = Split <axis = 1> (kc, parts)
        va, vb = Split <axis = 1> (vc, parts)
        ya = Attention(qa, ka, va)
        yb = Attention(qb, kb, vb)
        sum = Add(ya, yb)
        y = Cast <to = 1> (sum)
    }}""".replace("float16[", f"{name}[")
    )
    inputs: Arrays = {
        "q": random(1, 2, 5, 8),
        "k": random(1, 2, 9, 8, seed=1),
        "v": random(1, 2, 9, 8, seed=2),
    }
    before = run(model, inputs)
    scale_attention(model.graph)
    scales = {
        round(node.attributes["scale"].as_float(), 6) for node in model.graph if node.op_type == "Attention"
    }
    assert scales == ({round(8**-0.5, 6)} if kind == 1 else {1.0})
    assert operators(model)["Mul"] == (kind == 10), "one product for the queries of both groups"
    np.testing.assert_allclose(run(model, inputs)[0], before[0], atol=1e-6 if kind == 1 else 4e-3)


def test_matrices_are_taken_as_they_are_stored() -> None:
    model = graph_of("""g (float[1, 5, 3] x, float[5, 3] z, float[4, 3] w) =>
            (float[1, 5, 4] y, float[5, 4] u) {
        t = Transpose <perm = [1, 0]> (w)
        y = MatMul(x, t)
        u = Gemm <transB = 1> (z, w)
    }""")
    w = random(4, 3)
    inputs: Arrays = {"x": random(1, 5, 3, seed=1), "z": random(5, 3, seed=2)}
    before = run(model, {**inputs, "w": w})
    use_transposed(model.graph, [model.graph.inputs[2]])
    assert operators(model) == {"MatMul": 1, "Gemm": 1}
    for old, new in zip(before, run(model, {**inputs, "w": w.T.copy()}), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-6)


def test_parameters_get_the_rank_of_what_they_meet() -> None:
    model = graph_of("""g (float[1, 5, 3] x, float[2, 3] z, float[3, 3] w, float[3] b, float[3] c) =>
            (float[1, 5, 3] y, float[2, 3] u) {
        t = MatMul(x, w)
        y = Add(t, b)
        u = Add(z, c)
    }""")
    align_parameters(model.graph.inputs[2:])
    shapes = {value.name: tuple(value.shape) for value in model.graph.inputs if value.shape is not None}
    assert (shapes["w"], shapes["b"], shapes["c"]) == ((1, 3, 3), (1, 1, 3), (3,))


def test_gather_takes_narrow_indices_as_they_are() -> None:
    model = graph_of("""g (float[2, 8, 3] x, int32[n] rows) => (float[2, n, 3] y, float[2, n, 3] z) {
        wide = Cast <to = 7> (rows)
        y = Gather <axis = 1> (x, wide)
        z = Gather <axis = 1> (x, wide)
    }""")
    inputs: Arrays = {"x": random(2, 8, 3), "rows": np.array([5, 0, 5], np.int32)}
    before = run(model, inputs)
    narrow_indices(model.graph)
    assert operators(model) == {"Gather": 2}
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(("heads", "tokens"), [(1, 6), (1, 5), (2, 6)])
def test_a_lone_head_attends_as_two(heads: int, tokens: int) -> None:
    model = graph_of(f"""g (float[1, {heads}, {tokens}, 8] q, float[1, {heads}, 9, 8] k,
            float[1, {heads}, 9, 8] v) => (float[1, {heads}, {tokens}, 8] y) {{
        y = Attention(q, k, v)
    }}""")
    inputs: Arrays = {
        "q": random(1, heads, tokens, 8),
        "k": random(1, heads, 9, 8, seed=1),
        "v": random(1, heads, 9, 8, seed=2),
    }
    before = run(model, inputs)
    scale_attention(model.graph)
    pair_lone_heads(model.graph)
    assert operators(model)["Reshape"] == (2 if (heads, tokens) == (1, 6) else 0)
    np.testing.assert_allclose(run(model, inputs)[0], before[0], atol=1e-6)
