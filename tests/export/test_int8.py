"""int8 for linear layers: exact products, rounding, what is asked for, what is baked, bundles."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from forcingkv.export import bundle_parts, export_bundle, int8
from forcingkv.export.bake import baked_bytes, baked_model
from forcingkv.export.codes import INT8, dequantize
from forcingkv.export.fp8 import CalibrationTexts
from forcingkv.export.graphs import step_graph
from forcingkv.export.int8 import MOST_INPUTS, quantize_linears, rounded_inputs, without_rounding
from forcingkv.export.precision import Precision, Target, precision_of
from forcingkv.export.verify import quantized_differences
from forcingkv.headmaps import InputError
from forcingkv.models.baked_names import scale_name
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.graph_file import Node
from forcingkv.runtime.graph_rules import RULES
from forcingkv.runtime.graph_tensors import NUMBERS, Known, SizeError
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, random_model, small_spec
from tests.export.test_fp8 import LAYERS, with_constants
from tests.export.test_fp8_bundles import INPUTS
from tests.exported import shared_bundle

PRECISION = Precision("float32", "float32", "int8")
Floats = npt.NDArray[np.float32]


def small(layers: int = 1) -> tuple[ModelSpec, dict[str, Tensor]]:
    spec = small_spec(layers=layers)
    return spec, random_model(spec).state_dict()


def int8_bundle() -> Path:
    spec, weights = small()
    return shared_bundle(spec, weights, load_policy("window"), dtype="int8")


# Products.


def products(x: Floats, weights: Mapping[str, tuple[npt.NDArray[np.int8], Floats]]) -> dict[str, Floats]:
    """What ONNX Runtime makes of tokens (1, tokens, in) times each weight: codes (in, out), scales (out,)."""
    return run(quantized(x.shape, {name: codes.shape for name, (codes, _) in weights.items()}), weights, x)


def quantized(tokens: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A graph of linear layers that take one input, in int8."""
    given = ", ".join(f"float[{r}, {c}] {n}_weight, float[{c}] {n}_bias" for n, (r, c) in shapes.items())
    made = ", ".join(f"float[1, {tokens[1]}, {columns}] y{n}" for n, (_, columns) in shapes.items())
    nodes = " ".join(f"p{n} = MatMul(x, {n}_weight) y{n} = Add(p{n}, {n}_bias)" for n in shapes)
    text = f'<ir_version: 10, opset_import: ["" : 23]> g (float[{", ".join(map(str, tokens))}] x, {given})'
    proto = onnx.parser.parse_model(f"{text} => ({made}) {{ {nodes} }}")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    inputs = {value.name: value for value in model.graph.inputs}
    added = quantize_linears(model.graph, {name: inputs[f"{name}_weight"] for name in shapes})
    assert [value.name for value in added] == [f"{name}_weight_scale" for name in shapes]
    found = ir.to_proto(model)
    onnx.checker.check_model(found, full_check=True)
    del found.graph.value_info[:]  # as in bundles
    return found


def run(
    proto: onnx.ModelProto, weights: Mapping[str, tuple[npt.NDArray[np.int8], Floats]], x: Floats
) -> dict[str, Floats]:
    """The outputs of such a graph, with biases of 0, 0.5, 1, ..."""
    given: dict[str, npt.NDArray[Any]] = {}
    for name, (codes, scales) in weights.items():
        given |= {f"{name}_weight": codes, f"{name}_weight_scale": scales}
        given[f"{name}_bias"] = np.arange(len(scales), dtype=np.float32) / 2
    session = ort.InferenceSession(with_constants(proto, given).SerializeToString())
    return dict(zip([value.name for value in proto.graph.output], session.run(None, {"x": x}), strict=True))


TOKENS, WIDTH, COLUMNS = 37, 2050, 35
SIGNS = np.random.default_rng(0).choice([-1, 1], (2, TOKENS, WIDTH))
PAIRS = np.where(np.arange(WIDTH) // 2 % 2, -1, 1)[:, None]
EXTREMES = {
    "all of one sign": (np.ones((TOKENS, WIDTH)), np.ones((WIDTH, COLUMNS))),
    "of two signs": (-np.ones((TOKENS, WIDTH)), np.ones((WIDTH, COLUMNS))),
    "weights negative": (np.ones((TOKENS, WIDTH)), -np.ones((WIDTH, COLUMNS))),
    "in pairs": (np.ones((TOKENS, WIDTH)), np.tile(PAIRS, (1, COLUMNS))),
    "at random": (SIGNS[0], SIGNS[1].T[:, :COLUMNS]),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_sums_are_exact_whatever_the_processor(case: str) -> None:
    """All codes at their ends: processors that add pairs of products in 16 bits would saturate first here.

    Tokens of whole numbers up to 127 have the scale 1, so their codes are known.
    """
    x, codes = 127 * EXTREMES[case][0].astype(np.int64), 64 * EXTREMES[case][1].astype(np.int64)
    scales = (2.0 ** np.arange(COLUMNS) / 2**9).astype(np.float32)
    found = products(x[None].astype(np.float32), {"a": (codes.astype(np.int8), scales)})["ya"]
    exact = x @ codes
    assert np.abs(exact).max() < 1 << 24, "float32 holds each of them"
    biases = np.arange(COLUMNS, dtype=np.float32) / 2
    np.testing.assert_array_equal(found[0], exact.astype(np.float32) * scales + biases)


def test_no_sum_of_two_products_leaves_16_bits() -> None:
    assert 2 * 255 * int(INT8.largest) < 1 << 15
    assert int8.ZERO + int8.LARGEST <= 255
    assert int8.ZERO - int8.LARGEST >= 0
    with pytest.raises(ValueError, match=f"a adds up more than {MOST_INPUTS} products"):
        quantized((1, 1, MOST_INPUTS + 1), {"a": (MOST_INPUTS + 1, 1)})


def test_a_graph_computes_what_torch_does() -> None:
    """Tokens of all sizes, of zeros too; the input is rounded once for both layers."""
    torch.manual_seed(0)
    x = torch.randn(1, 9, 24) * 10.0 ** torch.arange(-4, 5).reshape(1, 9, 1)
    x[0, 3] = 0
    model = torch.nn.ModuleDict({name: torch.nn.Linear(24, 16) for name in "ab"})
    weights = {}
    for name, layer in model.items():
        scales = INT8.weight_scales(layer.weight.detach())
        codes = INT8.quantize(layer.weight.detach(), scales.unsqueeze(1))
        weights[name] = codes.t().contiguous().numpy(), scales.numpy()
        layer.weight = torch.nn.Parameter(dequantize(codes, scales.unsqueeze(1)))
        layer.bias = torch.nn.Parameter(torch.arange(16) / 2)
    found = products(x.numpy(), weights)
    with torch.no_grad():
        plain = {name: layer(x).numpy() for name, layer in model.items()}
        with rounded_inputs(model, model):
            rounded = {name: layer(x).numpy() for name, layer in model.items()}
    proto = quantized((1, 9, 24), {"a": (24, 16), "b": (24, 16)})
    counts = Counter(node.op_type for node in proto.graph.node)
    assert (counts["QuantizeLinear"], counts["MatMulInteger"], counts["MatMul"]) == (1, 2, 0)
    assert (counts["Unsqueeze"], counts["Add"]) == (2, 3), "no bias of rank 1 is left to be put into a Gelu"
    without_rounding(proto)
    onnx.checker.check_model(proto, full_check=True)
    exact, sizes = run(proto, weights, x.numpy()), x.abs().amax(-1, keepdim=True).numpy() + 1
    for name in weights:
        assert (np.abs(found[f"y{name}"] - rounded[name]) <= 1e-6 * sizes).all()
        assert (np.abs(exact[f"y{name}"] - plain[name]) <= 1e-6 * sizes).all()
        assert 1e-3 < (np.abs(rounded[name] - plain[name]) / sizes).max() < 0.05, "rounding shows"
        np.testing.assert_array_equal(found[f"y{name}"][0, 3], np.arange(16) / 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_with_numbers_that_are_not_finite_stays_so(value: float) -> None:
    """Its codes would pass for numbers; other tokens are as they were."""
    x = np.random.default_rng(1).standard_normal((1, 5, 64), dtype=np.float32)
    weight = np.full((64, 3), 7, np.int8), np.ones(3, np.float32)
    before = products(x, {"a": weight})["ya"]
    x[0, 2, 11] = value
    after = products(x, {"a": weight})["ya"]
    assert not np.isfinite(after[0, 2]).any()
    np.testing.assert_array_equal(np.delete(after, 2, 1), np.delete(before, 2, 1))
    assert not int8.round_input(torch.from_numpy(x))[0, 2].isfinite().any()


def test_weights_that_are_not_finite_stay_so() -> None:
    weight = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [1.0, -3.0], [0.0, 0.0]])
    scales = INT8.weight_scales(weight)
    restored = dequantize(INT8.quantize(weight, scales.unsqueeze(1)), scales.unsqueeze(1))
    assert not restored[:2].isfinite().all(1).any()
    torch.testing.assert_close(restored[2:], weight[2:], rtol=0.05, atol=0)
    assert scales[3] == 1, "a channel of zeros"


# What is asked for.


def test_what_int8_stands_for(run: Callable[..., Ran], tmp_path: Path) -> None:
    assert precision_of("int8", "onnx", rest="float32") == PRECISION
    assert precision_of("int8", "onnx") == Precision("float32", "bfloat16", "int8")
    quantized = [name for name in weight_shapes(small_spec()) if PRECISION.quantizes(name)]
    assert {name.split(".", 2)[2].removesuffix(".weight") for name in quantized} == LAYERS
    assert PRECISION.stored_as("blocks.0.ffn.0.weight") == "int8"
    assert PRECISION.stored_as("blocks.0.ffn.0.bias") == "float32"
    targets: dict[Target, str] = {"tensorrt": "fp8", "tensorrt-rtx": "fp8", "torch": "float32"}
    for target, other in targets.items():
        expected = f"--dtype int8 --target {target} is what ONNX .*; expected --target onnx, or .*{other}"
        with pytest.raises(InputError, match=expected):
            precision_of("int8", target)
    spec, weights = small()
    texts = CalibrationTexts("random", (), ())
    with pytest.raises(InputError, match="calibration is for fp8 only"):
        export_bundle(spec, weights, load_policy("full"), tmp_path / "b", dtype="int8", calibration=texts)
    words = ("export", "--model", "demo", "--policy", "full", "--dtype", "int8", "--out", tmp_path / "b")
    done = run(*words, "--calibration", tmp_path / "prompts.txt")
    assert (done.code, "--calibration is for fp8 only" in done.err) == (2, True)
    assert not (tmp_path / "b").exists()


# Bundles.


def test_a_bundle_holds_codes_and_is_verified(run: Callable[..., Ran]) -> None:
    path, (spec, weights) = int8_bundle(), small()
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    assert set(manifest.verification) == {"prompt", "step", "step.int8", "decode"}
    assert manifest.verification["step.int8"] <= bundle_parts.ROUNDED_TOLERANCE
    assert max(v for name, v in manifest.verification.items() if name != "step.int8") <= 1e-5
    assert (manifest.compute, manifest.calibration, manifest.linear) == ("float32", None, "int8")
    assert manifest.multiplies_in == "int8"
    assert "graphs      compute in float32, linear layers of the blocks in int8" in run("inspect", path).out
    assert not list(path.glob("*exact*")), "what only verification needs is gone"
    file, quantized = load_file(path / "weights.safetensors"), set(filter(PRECISION.quantizes, weights))
    assert {name.split(".", 2)[2].removesuffix(".weight") for name in quantized} == LAYERS
    assert set(file) == set(weights) | set(map(scale_name, quantized))
    assert sum(tensor.nbytes for tensor in file.values()) == baked_bytes(spec, PRECISION)
    for name in quantized:
        codes, scales = file[name].t(), file[scale_name(name)].unsqueeze(1)
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
        assert codes.abs().amax(1).eq(64).all(), "each channel is used whole"
    model = baked_model(spec, path / "weights.safetensors").state_dict()
    for name in quantized:
        half = file[scale_name(name)].unsqueeze(1) / 2  # of the distance between two codes
        assert ((codes_error(model, path, name)) <= half * 1.001).all()
    # In memory a weight takes what it takes in the file; what is cast, what it is cast to.
    used = {t.name: t for t in onnx.load(path / "step.onnx", load_external_data=False).graph.initializer}
    assert all(used[name].data_type == onnx.TensorProto.INT8 for name in quantized)
    others = sum(onnx.numpy_helper.to_array(t).nbytes for t in used.values() if not t.external_data)
    pointing = sum(file[name].nbytes for name, tensor in used.items() if tensor.external_data)
    assert manifest.graphs["step"].weight_bytes == pointing + others
    nodes = Counter(n.op_type for n in onnx.load(path / "step.onnx", load_external_data=False).graph.node)
    assert (nodes["QuantizeLinear"], nodes["MatMulInteger"]) == (len(INPUTS), len(LAYERS))


def codes_error(model: Mapping[str, Tensor], path: Path, name: str) -> Tensor:
    """What rounding a weight changed: heads stay in their order under a policy that treats all alike."""
    return (model[name] - small()[1][name]).abs()


def test_a_session_makes_what_torch_makes() -> None:
    """Over the first chunk, at most half as far apart as int8 moves it: see `quantized_differences`."""
    path, prompt = int8_bundle(), "b a d"
    bundle = Bundle.open(path)
    spec, plan = bundle.plan.spec, bundle.plan
    model = baked_model(spec, path / "weights.safetensors")
    layers = [name.removesuffix(".weight") for name in weight_shapes(spec) if PRECISION.quantizes(name)]
    text, noise = torch.from_numpy(encode_words(spec, prompt)), seeded_noise(plan, 11)
    plain = next(generate(model, plan, text, noise, 1)).latents
    with rounded_inputs(model, layers):
        rounding = next(generate(model, plan, text, noise, 1)).latents
    with Session.open(path) as session:
        found = torch.from_numpy(next(session.generate(prompt, seed=11, chunks=1)).latents)
    assert (found - rounding).norm() <= (rounding - plain).norm() / 2


def test_a_graph_that_rounds_otherwise_is_found_out(tmp_path: Path) -> None:
    """Its inputs saturate, at a tenth of their largest; an export with such a difference fails, as in FP8."""
    bundle = Bundle.open(int8_bundle())
    spec, path = bundle.plan.spec, tmp_path / "step.onnx"
    shutil.copy(bundle.path / "weights.safetensors", tmp_path)
    written = onnx.load(bundle.graph("step"), load_external_data=False)
    (largest,) = (tensor for tensor in written.graph.initializer if tensor.name == "int8.largest")
    largest.CopyFrom(onnx.numpy_helper.from_array(np.array(1270, np.float32), largest.name))
    onnx.save_model(written, path)
    model = baked_model(spec, tmp_path / "weights.safetensors")
    layers = [name.removesuffix(".weight") for name in weight_shapes(spec) if PRECISION.quantizes(name)]
    rounded = partial(rounded_inputs, model, layers)
    found = quantized_differences(
        step_graph(model, bundle.plan), path, bundle.plan, without_rounding, rounded
    )
    assert found[0] <= 1e-5, "without the rounding it is the same graph"
    assert found[1] > bundle_parts.ROUNDED_TOLERANCE


OTHERS = [("int8", "int8"), ("uint8", "uint8"), ("int8", "uint8"), ("uint8", "int32")]


@pytest.mark.parametrize("kinds", OTHERS)
def test_products_of_other_numbers_are_refused(kinds: tuple[str, str]) -> None:
    node = Node("MatMulInteger", "", ["x", "w"], ["y"], {})
    shapes = (1, 5, 8), (8, 3)
    with pytest.raises(SizeError, match="its two types are not uint8 and int8"):
        RULES["", "MatMulInteger"](node, [Known(NUMBERS[k], s) for k, s in zip(kinds, shapes, strict=True)])
    taken = [Known(NUMBERS["uint8"], shapes[0]), Known(NUMBERS["int8"], shapes[1])]
    (made,) = RULES["", "MatMulInteger"](node, taken)
    assert made == Known(NUMBERS["int32"], (1, 5, 3))
