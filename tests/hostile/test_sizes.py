"""Memory and work without bound: known, and refused, before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from forcingkv.runtime import Bundle, graph_check
from tests.hostile.bundles import refused, with_graph
from tests.hostile.changes import Cases, conv, doubled, node, nodes, products, tensor
from tests.runtime.conftest import small_bundle

CASES: Cases = {
    "Expand": (
        "prompt",
        nodes(node("Expand", "one", "n"), initializers=(tensor("one", 1), tensor("n", 1 << 40))),
        "at most|constants that come to",
    ),
    "Expand of an input": (
        "prompt",
        nodes(node("Expand", "text", "n"), initializers=(tensor("n", 1 << 20, 1, 1),)),
        "operations|needs .* bytes",
    ),
    "Expand beyond all numbers": (
        "prompt",
        nodes(node("Expand", "text", "n"), initializers=(tensor("n", 2**62, 1, 1),)),
        "what Expand makes",
    ),
    "Expand to a size that is not written": (
        "prompt",
        nodes(node("Cast", "text", out="c", to=7), node("Expand", "text", "c")),
        "its sizes are not written",
    ),
    "Tile": (
        "prompt",
        nodes(node("Tile", "text", "n"), initializers=(tensor("n", 1 << 20, 1, 1),)),
        "operations|needs .* bytes",
    ),
    "40 times twice": ("prompt", doubled(40, axis=1), "operations|what Concat makes"),
    "products of a column and a row": (
        "prompt",
        nodes(
            node("Reshape", "text", "column", out="a"),
            node("Reshape", "text", "row", out="b"),
            *(node("MatMul", "a", "b", out=f"h{n}") for n in range(400_000 // 2500)),
            initializers=(tensor("column", 50, 1), tensor("row", 1, 50)),
        ),
        "needs .* bytes",
    ),
    "rows by rows": (
        "prompt",
        nodes(
            node("Gather", "text", "n", out="a", axis=2),
            node("Gather", "a", "n", out="b", axis=2),
            node("Gather", "b", "n", axis=2),
            initializers=(numpy_helper.from_array(np.zeros(100_000, np.int64), "n"),),
        ),
        "operations|needs .* bytes",
    ),
    "Resize": (
        "decode",
        nodes(
            node("Resize", "latents", "", "n", mode="nearest"),
            initializers=(tensor("n", 1, 1, 1, 1e4, 1e4, kind=np.float32),),
        ),
        "operations|needs .* bytes",
    ),
    "pads": ("decode", conv(pads=[10**9] * 4), "it pads"),
    "pads that are not said": ("decode", conv(auto_pad="SAME_UPPER"), "its pads or kernel are not said"),
    "no steps": ("decode", conv(strides=[0, 0]), "what Conv makes"),
    "a constant that is computed at load": (
        "prompt",
        nodes(
            *(node("Expand", "one", "n", out=f"h{n}") for n in range(50)),
            initializers=(tensor("one", 1), tensor("n", 1 << 18)),
        ),
        "constants that come to 104857600 bytes",
    ),
    "whole numbers divided": (
        "prompt",
        nodes(node("Cast", "text", out="c", to=7), node("Div", "c", "c")),
        "it divides whole numbers",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_takes_more_than_the_model_needs_is_refused(case: str, tmp_path: Path) -> None:
    graph, change, message = CASES[case]
    refused(with_graph(small_bundle("taehv"), tmp_path / "b", graph, change), message)


def test_more_products_than_the_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many in larger graphs take months. A second of them is allowed, more than a test wants to write."""
    monkeypatch.setattr(graph_check, "OPERATIONS_OF_A_SECOND", 0)
    bundle = small_bundle("forcing-kv")
    refused(with_graph(bundle, tmp_path / "b", "prompt", products(20)), "operations; expected at most")
    assert Bundle.open(bundle).manifest.policy.name == "forcing-kv", "its own products are not too many"
