"""Weights outside the one file that the manifest names: wherever a graph can say it, it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, numpy_helper

from tests.hostile.bundles import refused, with_graph
from tests.hostile.changes import (
    WEIGHTS,
    Cases,
    attribute,
    branch,
    branching,
    entry,
    external,
    external_in_body,
    initializer,
    node,
    nodes,
    sparse,
    training,
    weight,
    with_changed_body,
)
from tests.runtime.conftest import small_bundle

CASES: Cases = {
    **{
        f"weights in {place!r}": ("prompt", entry("location", place), "takes weights from the file")
        for place in (
            *(
                "/etc/passwd",
                "../secret",
                "../../../etc/passwd",
                "a/../../secret",
                "..\\secret",
                "C:\\secret",
            ),
            *("*/_ORT_MEM_ADDR_/*", "manifest.json", "headmap.json", "extra.bin", "decoder.safetensors"),
            *("/dev/zero", "/proc/self/environ", "file:///etc/passwd", "", "./weights.safetensors"),
            *("weights.safetensors\0.bin", "WEIGHTS.safetensors", "weights.safetensors/"),
        )
    },
    "weights of a graph that has none": ("decode", initializer(external("/etc/passwd")), "expected no file"),
    "a constant node": ("prompt", nodes(node("Constant", value=external(WEIGHTS))), "expected no file"),
    "an attribute of another operator": (
        "prompt",
        nodes(node("Cast", "text", to=external("x"))),
        "as a tensor",
    ),
    "in a branch": (
        "step",
        branching("clean", branch(node("Constant", out="b", value=external("x"))), branch()),
        "takes weights from the file 'x'",
    ),
    "an initializer of a branch": (
        "step",
        lambda m: (
            next(n for n in m.graph.node if n.op_type == "If")
            .attribute[0]
            .g.initializer.append(external("/etc/passwd"))
        ),
        "an If without two plain branches",
    ),
    "in the body of a function": (
        "step",
        with_changed_body(external_in_body),
        "another body of the function",
    ),
    "a list of tensors": (
        "prompt",
        attribute(AttributeProto(name="l", type=AttributeProto.TENSORS, tensors=[external("/etc/passwd")])),
        "its Attribute has the field 10",
    ),
    "a sparse initializer": ("prompt", sparse, "its Graph has the field 15"),
    "a sparse attribute": (
        "prompt",
        attribute(AttributeProto(name="s", type=11, sparse_tensor=onnx.SparseTensorProto())),
        "its Attribute has the field 22",
    ),
    "training": ("prompt", training, "its Model has the field 20"),
    **{
        f"{key} {value!r}": ("prompt", entry(key, value), message)
        for key, value, message in [
            ("offset", "-4", "the place"),
            ("offset", " 12", "the place"),
            ("offset", "0x10", "the place"),
            ("offset", "1_0", "the place"),
            ("offset", "\u0661\u0662", "the place"),
            ("offset", "007", "the place"),
            ("offset", "1.0", "the place"),
            ("offset", str(10**30), "the place|within the"),
            ("offset", str(2**63), "within the"),
            ("offset", "465000", "within the"),
            ("length", "8", "bytes from"),
            ("length", str(2**40), "bytes from"),
            ("length", "-1", "the place"),
            ("checksum", "0", "the place"),
            ("basepath", "/etc", "the place"),
        ]
    },
    "two locations": (
        "prompt",
        lambda m: weight(m).external_data.add(key="location", value="/etc/passwd"),
        "takes weights from the file|the place",
    ),
    "no length": ("prompt", lambda m: weight(m).external_data.pop(), "the place"),
    "contents in two places": (
        "prompt",
        lambda m: setattr(weight(m), "raw_data", b"1234"),
        "it is not plain where",
    ),
    "a place without the mark of one": (
        "prompt",
        lambda m: setattr(weight(m), "data_location", 0),
        "it is not plain where",
    ),
    "contents as numbers": (
        "prompt",
        initializer(TensorProto(name="n", dims=[1], data_type=1, float_data=[1.0])),
        "its Tensor has the field 4",
    ),
    "a negative size": (
        "prompt",
        initializer(TensorProto(name="n", dims=[-1, -1], data_type=1, raw_data=b"1234")),
        "of the shape",
    ),
    "text": ("prompt", initializer(TensorProto(name="n", dims=[1], data_type=8)), "of the type 8"),
    "too few bytes": ("prompt", initializer(TensorProto(name="n", dims=[9], data_type=1)), "with 0 bytes"),
    "large contents": (
        "prompt",
        initializer(numpy_helper.from_array(np.zeros(2_000_000, np.float32), "n")),
        "at most 4194304",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_that_lie_elsewhere_are_refused(case: str, tmp_path: Path) -> None:
    graph, change, message = CASES[case]
    refused(with_graph(small_bundle("forcing-kv"), tmp_path / "b", graph, change), message)
