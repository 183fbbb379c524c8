"""The graph `recache` of a stranger's bundle is held to its plan as the others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from forcingkv.runtime import Bundle
from tests.hostile.bundles import Change, refused, remade, with_graph
from tests.runtime.conftest import small_bundle


def another_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Loop"


def other_weights(model: onnx.ModelProto) -> None:
    stored = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in stored.external_data if entry.key == "location").value = "/etc/passwd"


def more_frames(model: onnx.ModelProto) -> None:
    (latents,) = [value for value in model.graph.input if value.name == "latents"]
    latents.type.tensor_type.shape.dim[2].dim_value = 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_operator, "the operator 'Loop'"),
        (other_weights, "takes weights from the file '/etc/passwd'"),
        (more_frames, "the input latents is float32"),
    ],
)
def test_a_changed_graph_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    refused(with_graph(small_bundle("longlive"), tmp_path / "b", "recache", change), message)


@pytest.mark.parametrize("field", ["activation_bytes", "weight_bytes"])
def test_a_manifest_that_says_less_is_refused(tmp_path: Path, field: str) -> None:
    needed = getattr(Bundle.open(small_bundle("longlive")).manifest.graphs["recache"], field)

    def less(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["recache"][field] = needed - 1

    refused(remade(small_bundle("longlive"), tmp_path / "b", less), f"needs {needed} bytes")


def test_records_of_another_plan_are_refused(tmp_path: Path) -> None:
    def shorter(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["recache"]["inputs"]["cosines"]["shape"][0] = 24

    refused(remade(small_bundle("longlive"), tmp_path / "b", shorter), "its input cosines of recache is")
