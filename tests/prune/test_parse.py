"""TensorRT-RTX takes the bodies of the DynamicPrune operators, where no plugin is registered."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from forcingkv.prune.onnx_operators import DOMAIN, OPSET, PLUGIN_NAMESPACE, functions_for, split_prune

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

HEADS, WIDTH, FRAME, SEGMENTS, KEPT = 3, 16, 12, 6, 5
KV = ["transition_keys", "transition_values", "new_keys", "new_values"]

# In a process of its own, as the first logger stays the process's, and a fault of the parser may abort.
CHILD = """
import json, sys
import tensorrt_rtx as trt

heads, width, frame = map(int, sys.argv[2:])
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    sys.exit(parser.get_error(0).desc())
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
for tokens in (0, frame):
    profile = builder.create_optimization_profile()
    for name in ("transition_keys", "transition_values"):
        profile.set_shape(name, *[(1, heads, tokens, width)] * 3)
    config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
shapes = [list(network.get_output(i).shape) for i in range(network.num_outputs)]
print(json.dumps({"layers": network.num_layers, "bytes": engine.nbytes, "shapes": shapes}))
"""


def model(frame: int) -> onnx.ModelProto:
    """A scoring and a following node in bfloat16, the transition frame's length left open."""
    uneven = frame % SEGMENTS != 0
    split = {"frame_tokens": frame, "segments": SEGMENTS} if uneven else {"segment_tokens": frame // SEGMENTS}
    nodes = [
        helper.make_node(
            "UnevenPrune" if uneven else "DynamicPrune",
            KV,
            ["keys", "values", "indices"],
            "score",
            domain=DOMAIN,
            kept=KEPT,
            frame_tokens=frame,
            segments=SEGMENTS,
            plugin_namespace=PLUGIN_NAMESPACE,
        ),
        helper.make_node(
            "UnevenPruneFollow" if uneven else "DynamicPruneFollow",
            [*KV, "indices"],
            ["keys2", "values2"],
            "follow",
            domain=DOMAIN,
            **split,
            plugin_namespace=PLUGIN_NAMESPACE,
        ),
    ]
    tokens: dict[str, str | int] = {"transition": "cached", "new": 3 * frame}
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.BFLOAT16, [1, HEADS, tokens[name.split("_")[0]], WIDTH]
        )
        for name in KV
    ]
    retained = [1, HEADS, KEPT * (frame // SEGMENTS), WIDTH]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.BFLOAT16, retained)
        for name in ("keys", "values", "keys2", "values2")
    ]
    outputs.append(helper.make_tensor_value_info("indices", TensorProto.INT64, [KEPT]))
    made = helper.make_model(
        helper.make_graph(nodes, "prune", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    made.functions.extend(functions_for(made))
    return made


@pytest.mark.parametrize("frame", [FRAME, FRAME + 1], ids=["even", "uneven"])
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "one kernel a node"])
def test_a_network_is_built_with_no_transition_frame_and_with_one(
    tmp_path: Path, parts: bool, frame: int
) -> None:
    made = model(frame)
    if parts:
        split_prune(made)
    onnx.checker.check_model(made)
    path = tmp_path / "prune.onnx"
    onnx.save_model(made, path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(HEADS), str(WIDTH), str(frame)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    retained = [1, HEADS, KEPT * (frame // SEGMENTS), WIDTH]
    assert report["shapes"] == [retained] * 4 + [[KEPT]]
    assert report["bytes"] > 0
    # Shape arithmetic is what makes a network large: with Slices in the place of Gathers there are about 190.
    # Bodies for uneven segments compute where each begins. Engines have the plugin in their place.
    assert report["layers"] < (250 if frame % SEGMENTS else 120)
