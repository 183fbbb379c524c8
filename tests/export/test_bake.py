"""Baking: the file is the permuted checkpoint, the graphs point into it, and memory stays bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from safetensors.torch import load_file

from forcingkv.export.bake import bake_weights, baked_bytes, baked_model
from forcingkv.export.precision import Precision
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Dtype
from tests.conftest import headmap_of, random_model, small_spec
from tests.exported import shared_bundle

ROOT = Path(__file__).parents[2]
STATIC = [[0], [1, 2], [], [0, 1, 2]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_is_the_permuted_checkpoint(dtype: Dtype, tmp_path: Path) -> None:
    spec, policy = small_spec(), load_policy("forcing-kv")
    state = random_model(spec).state_dict()
    orders = head_orders(spec, policy, headmap_of(spec, STATIC))
    precision = Precision("float32", dtype)
    stored = bake_weights(state, spec, orders, tmp_path / "w.safetensors", precision)
    found, expected = load_file(tmp_path / "w.safetensors"), permute_heads(state, spec, orders)
    assert list(stored) == list(weight_shapes(spec))
    assert set(found) == set(expected)
    model = baked_model(spec, tmp_path / "w.safetensors").state_dict()
    for name, tensor in found.items():
        exact = ".norm_" in name or name.endswith("modulation")
        rounded = expected[name].to(torch.float32 if exact else getattr(torch, dtype))
        assert torch.equal(tensor, rounded.t() if rounded.dim() == 2 else rounded), name
        assert torch.equal(model[name], rounded.float()), name
    assert found["blocks.0.ffn.0.weight"].shape == (spec.dim, spec.ffn_width), "(in, out)"
    assert sum(tensor.nbytes for tensor in found.values()) == baked_bytes(spec, precision)
    moved = [name for name in state if not torch.equal(state[name], expected[name])]
    assert all(".self_attn." in name for name in moved)
    assert len(moved) == 9 * 1, "only layer 1 does not have its heads in order already"


@pytest.mark.parametrize(
    ("dtype", "static"),
    [(None, [[0], [1]]), ("bfloat16", [[0], [1]]), pytest.param(None, STATIC, marks=pytest.mark.long)],
    ids=["as it is", "bfloat16", "layers of every kind"],
)
def test_graphs_point_into_the_one_file(dtype: Dtype | None, static: list[list[int]]) -> None:
    spec = small_spec(layers=len(static))
    headmap = headmap_of(spec, static)
    weights = random_model(spec).state_dict()
    bundle = shared_bundle(spec, weights, load_policy("forcing-kv"), headmap=headmap, dtype=dtype)
    verification = Bundle.open(bundle).manifest.verification
    assert max(verification.values()) <= 1e-5, "the same rounded weights on both sides"
    stored = load_file(bundle / "weights.safetensors")
    seen: set[str] = set()
    for graph in ("prompt", "step"):
        path = bundle / f"{graph}.onnx"
        model = onnx.load(path, load_external_data=False)
        pointing = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {entry.value for t in pointing for entry in t.external_data if entry.key == "location"} == {
            "weights.safetensors"
        }
        for tensor in pointing:
            array = onnx.numpy_helper.to_array(tensor, str(bundle))
            np.testing.assert_array_equal(array.astype(np.float32), stored[tensor.name].float().numpy())
        seen |= {tensor.name for tensor in pointing}
        inline = sum(len(t.raw_data) for t in model.graph.initializer if t.name not in seen)
        assert inline < 2000, "no second copy of any weight"
        onnx.checker.check_model(str(path))
    assert seen == set(stored)
    with Session.open(bundle) as session:
        assert [c.frames.shape for c in session.generate("a b", seed=0, chunks=2)] == [(3, 8, 12, 3)] * 2


WIDE = """
base = "self-forcing"
name = "wide"
heads = 10
ffn_width = 5120
width = 96
height = 96
"""


@pytest.mark.slow
@pytest.mark.long
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """The same program as the benchmark for 14B width, at a tenth of it."""
    (tmp_path / "wide.toml").write_text(WIDE)
    command = [sys.executable, str(ROOT / "benchmarks" / "bake_memory.py"), "--no-graphs"]
    command += ["--layers", "1", "--layers", "4"]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "wide.toml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    grown = measured["rows"][1]["file_bytes"] - measured["rows"][0]["file_bytes"]
    assert grown > 140e6, "held in memory, the layers would show"
    assert measured["peak_growth"] <= 1.1
