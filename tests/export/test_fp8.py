"""FP8 for linear layers: rounding, what is asked for, what is baked, and the pass over a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from forcingkv.export import engine_builder, export_bundle
from forcingkv.export.bake import bake_weights, baked_bytes, baked_model
from forcingkv.export.fp8 import (
    HEADROOM,
    LARGEST,
    CalibrationTexts,
    dequantize,
    input_scale,
    quantize,
    quantize_linears,
    rounded_inputs,
    weight_scales,
    without_rounding,
)
from forcingkv.export.precision import Precision, precision_of
from forcingkv.headmaps import HeadMap, InputError
from forcingkv.models.baked_names import scale_name
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, headmap_of, random_model, small_spec

FP8 = Precision("float32", "bfloat16", "fp8")
STATIC = [[0], [1, 2], [], [0, 1, 2]]
LAYERS = {
    *(f"self_attn.{part}" for part in "qkvo"),
    *(f"cross_attn.{part}" for part in "qo"),
    *("ffn.0", "ffn.2"),
}


def small() -> tuple[ModelSpec, dict[str, Tensor], HeadMap]:
    spec = small_spec()
    return spec, random_model(spec).state_dict(), headmap_of(spec, STATIC)


def prompts(spec: ModelSpec, *texts: str) -> CalibrationTexts:
    return CalibrationTexts("prompts", texts, tuple(encode_words(spec, text) for text in texts))


# Rounding.


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40),
    st.integers(-30, 30),
)
@settings(max_examples=300, deadline=None)
def test_a_weight_is_within_a_16th_or_a_28th_of_its_channels_largest(row: list[float], power: int) -> None:
    """Half a unit in the last place of three bits; below the normal numbers, of the smallest."""
    weight = torch.tensor([row], dtype=torch.float32) * 2.0**power
    # Smaller ones have scales below the normal numbers of float32, where those have fewer bits.
    assume(not 0 < float(weight.abs().max()) < 448 * torch.finfo(torch.float32).tiny)
    scales = weight_scales(weight)
    codes = quantize(weight, scales.unsqueeze(1))
    error = (dequantize(codes, scales.unsqueeze(1)) - weight).abs().double()
    bound = torch.maximum(weight.abs().double() / 16, scales.double().unsqueeze(1) / 1024)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error <= weight.abs().amax().double() / 28 * 1.005 + scales.double() / 1024).all()
    assert not codes.float().isnan().any()


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_codes_are_those_of_ml_dtypes(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    expected = np.clip(array, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    found = quantize(torch.from_numpy(array), torch.tensor(1.0)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(found, expected.view(np.uint8))


def test_the_edges_of_rounding() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-42, -1e-42], [3.0, -1.5]])
    scales = weight_scales(weight)
    assert scales.dtype == torch.bfloat16
    assert scales[0] == 1, "a channel of zeros"
    restored = dequantize(quantize(weight, scales.unsqueeze(1)), scales.unsqueeze(1))
    assert restored.isfinite().all()
    assert (restored[0] == 0).all()
    torch.testing.assert_close(restored[2], weight[2], rtol=0.01, atol=0)
    odd = quantize(torch.tensor([1e9, -1e9, torch.inf, torch.nan]), torch.tensor(0.5)).float()
    assert odd[:3].tolist() == [LARGEST, -LARGEST, LARGEST]
    assert odd[3].isnan()
    assert input_scale(0.0) == 1
    assert input_scale(448.0) == HEADROOM


# What is asked for.


def test_what_fp8_stands_for() -> None:
    assert precision_of("fp8", "onnx") == FP8
    precision = precision_of("fp8", "tensorrt-rtx", (89, 120))
    assert precision == Precision("bfloat16", "bfloat16", "fp8")
    names = [name for name in weight_shapes(small_spec()) if precision.quantizes(name)]
    assert names == [name for name in names if name.startswith("blocks.")]
    assert {name.split(".", 2)[2].removesuffix(".weight") for name in names} == LAYERS
    assert precision.stored_as("blocks.0.ffn.0.weight") == "fp8"
    assert precision.stored_as("blocks.0.ffn.0.bias") == "bfloat16"
    assert precision.stored_as("blocks.0.cross_attn.k.weight") == "bfloat16"
    assert precision.stored_as("blocks.0.self_attn.norm_q.weight") == "float32"
    assert not precision_of("bfloat16", "onnx").quantizes("blocks.0.ffn.0.weight")


def test_gpus_without_fp8_are_refused(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"sm_80, sm_86 cannot .* from sm_89 on.*bfloat16 is the default"):
        precision_of("fp8", "tensorrt-rtx", (80, 86, 89))
    monkeypatch.setattr(engine_builder, "require", lambda name: None)
    done = run(
        "export",
        "--model",
        "demo",
        "--policy",
        "full",
        "--dtype",
        "fp8",
        "--out",
        "unused",
        "--target",
        "tensorrt-rtx",
        "--sm",
        86,
    )
    assert done.code == 2
    assert "--dtype fp8: sm_86 cannot multiply in FP8" in done.err


def test_fp8_goes_with_texts(run: Callable[..., Ran], tmp_path: Path) -> None:
    spec, weights, _ = small()
    with pytest.raises(InputError, match=r"^dtype fp8 needs texts to calibrate it with"):
        export_bundle(spec, weights, load_policy("full"), tmp_path / "b", dtype="fp8")
    with pytest.raises(InputError, match="calibration is for fp8 only; expected dtype fp8"):
        export_bundle(spec, weights, load_policy("full"), tmp_path / "b", calibration=prompts(spec, "a"))
    words = ("export", "--model", "demo", "--policy", "full", "--out", tmp_path / "b")
    done = run(*words, "--calibration", tmp_path / "prompts.txt")
    assert (done.code, "--calibration is for fp8 only" in done.err) == (2, True)
    assert run(*words, "--dtype", "fp16").code == 2
    (tmp_path / "prompts.txt").write_text("a 3 moving sideways\n")
    done = run(*words, "--dtype", "fp8", "--calibration", tmp_path / "prompts.txt")
    assert (done.code, "'sideways'" in done.err) == (2, True)
    assert not (tmp_path / "b").exists()


# Baking.


class Counted(Mapping[str, Tensor]):
    """Weights that count how often each is read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, Counter[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_the_file_holds_codes_and_scales(tmp_path: Path) -> None:
    spec, state, headmap = small()
    state["blocks.1.ffn.0.weight"][3] = 0
    orders = head_orders(spec, load_policy("forcing-kv"), headmap)
    weights, path = Counted(state), tmp_path / "w.safetensors"
    stored = bake_weights(weights, spec, orders, path, FP8)
    assert set(weights.reads.values()) == {1}, "each tensor is read once"
    scales = {scale_name(name): name for name in state if FP8.quantizes(name)}
    assert set(stored) == set(state) | set(scales)
    assert len(stored) == len(state) + len(scales), "no name is another's"
    found, expected = load_file(path), permute_heads(state, spec, orders)
    for scale, name in scales.items():
        assert found[name].dtype == torch.float8_e4m3fn
        assert found[scale].dtype == torch.bfloat16
        assert found[scale].shape == expected[name].shape[:1]
        codes = quantize(expected[name], found[scale].unsqueeze(1))
        assert torch.equal(found[name].view(torch.uint8), codes.t().view(torch.uint8)), name
        assert codes.float().abs().amax(1).eq(LARGEST).sum() >= len(codes) - 1, "each channel is used whole"
    assert {t.dtype for name, t in found.items() if name not in scales.values() and "norm_" not in name} == {
        torch.bfloat16,
        torch.float32,
    }
    assert sum(tensor.nbytes for tensor in found.values()) == baked_bytes(spec, FP8)
    model = baked_model(spec, path).state_dict()
    for name, tensor in model.items():
        relative, absolute = (1 / 14, 2e-3) if FP8.quantizes(name) else (1 / 128, 0)
        torch.testing.assert_close(tensor, expected[name], rtol=relative, atol=absolute)


# The graph.

LINEARS = """<ir_version: 10, opset_import: ["" : 23]>
g (float[1, 5, 24] x, float[1, 5, 16] z, float[24, 16] a_weight, float[24, 16] b_weight,
   float[16, 8] c_weight, float[16, 8] d_weight)
   => (float[1, 5, 16] ya, float[1, 5, 16] yb, float[1, 5, 8] yc, float[1, 5, 8] yd) {
    n = Neg(x)
    ya = MatMul(n, a_weight)
    yb = MatMul(n, b_weight)
    yc = MatMul(z, c_weight)
    yd = MatMul(z, d_weight)
}"""
SCALES = {"a": 0.02, "b": 0.02, "c": 0.5}
"""Of the inputs; d is not quantized."""


def linears(text: str = LINEARS) -> tuple[ir.Model, dict[str, ir.Value]]:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True))
    inputs = {value.name: value for value in model.graph.inputs}
    return model, {layer: inputs[f"{layer}_weight"] for layer in SCALES}


def test_inputs_are_rounded_once_for_all_that_take_them() -> None:
    model, weights = linears()
    added = quantize_linears(model.graph, weights, SCALES, tensorrt=False)
    assert [value.name for value in added] == ["a_weight_scale", "b_weight_scale", "c_weight_scale"]
    counts = Counter(node.op_type for node in model.graph)
    assert counts == {
        "Neg": 1,
        "MatMul": 4,
        "QuantizeLinear": 2,
        "DequantizeLinear": 2,
        "Cast": 3,
        "Mul": 3,
    }
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    found = computed(proto, rounding=True)
    without_rounding(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in proto.graph.node}
    exact = computed(proto, rounding=False)
    for name in ("ya", "yb", "yc"):
        assert np.abs(found[name] - exact[name]).max() > 1e-3, "rounding shows"
    np.testing.assert_array_equal(found["yd"], exact["yd"])


def computed(proto: onnx.ModelProto, *, rounding: bool) -> dict[str, npt.NDArray[np.float32]]:
    """What ONNX Runtime makes of `LINEARS` in FP8; asserts that torch makes the same."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(1, 5, 24), "z": 300 * torch.randn(1, 5, 16)}  # some of z saturates
    weights = {"a": torch.randn(16, 24), "b": torch.randn(16, 24), "c": torch.randn(8, 16)}
    taken = {"a": -inputs["x"], "b": -inputs["x"], "c": inputs["z"]}
    expected = {}
    given = {"d_weight": np.ones((16, 8), np.float32)} | {n: t.numpy() for n, t in inputs.items()}
    for layer, weight in weights.items():
        scales = weight_scales(weight)
        codes = quantize(weight, scales.unsqueeze(1))
        given[f"{layer}_weight"] = (
            codes.t().contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        )
        given[f"{layer}_weight_scale"] = scales.float().numpy()
        module = torch.nn.ModuleDict({layer: torch.nn.Linear(1, 1, bias=False)})
        module[layer].weight = torch.nn.Parameter(dequantize(codes, scales.unsqueeze(1)))
        with torch.no_grad(), rounded_inputs(module, {layer: SCALES[layer]} if rounding else {}):
            expected[f"y{layer}"] = module[layer](taken[layer]).numpy()
    constants = {name: given.pop(name) for name in list(given) if "weight" in name}
    session = ort.InferenceSession(with_constants(proto, constants).SerializeToString())
    found = dict(zip([output.name for output in proto.graph.output], session.run(None, given), strict=True))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-4)
    return found


def with_constants(
    proto: onnx.ModelProto, constants: Mapping[str, npt.NDArray[np.generic]]
) -> onnx.ModelProto:
    """The graph with some of its inputs known, as a bundle's graphs know their weights."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    kept = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    return model


@pytest.mark.parametrize("rank", [2, 3])
def test_for_tensorrt_both_sides_are_dequantized_in_the_dtype_of_the_graph(rank: int) -> None:
    text = LINEARS.replace("float[", "bfloat16[")
    for shape in ("24, 16", "16, 8"):
        text = text.replace(f"[{shape}]", f"[1, {shape}]") if rank == 3 else text
    model, weights = linears(text)
    added = quantize_linears(model.graph, weights, SCALES, tensorrt=True)
    assert {value.dtype for value in added} == {ir.DataType.BFLOAT16}
    assert {value.dtype for value in weights.values()} == {ir.DataType.FLOAT8E4M3FN}
    counts = Counter(node.op_type for node in model.graph)
    assert counts == {"Neg": 1, "MatMul": 4, "QuantizeLinear": 2, "DequantizeLinear": 5}
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] in weights.values():
            assert node.attributes["axis"].as_int() == rank - 1
    proto = ir.to_proto(model)
    assert {t.data_type for t in proto.graph.initializer} == {onnx.TensorProto.BFLOAT16}
    onnx.checker.check_model(proto, full_check=True)


def test_what_the_pass_does_not_take() -> None:
    model, weights = linears()
    with pytest.raises(ValueError, match="b and another layer have one input and two scales"):
        quantize_linears(model.graph, weights, SCALES | {"b": 0.03}, tensorrt=False)
    model, weights = linears(LINEARS.replace("d_weight)\n}", "d_weight)\n u = Neg(c_weight)\n}"))
    with pytest.raises(ValueError, match="the weight of c is more than the right side of MatMul"):
        quantize_linears(model.graph, weights, SCALES, tensorrt=False)
