"""Operators, branches and functions that export does not write."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import ModelProto, helper

from forcingkv.prune.onnx_operators import prune_functions
from forcingkv.runtime.graph_check import BODIES
from forcingkv.runtime.graph_file import read_graph
from tests.hostile.bundles import refused, with_graph
from tests.hostile.changes import (
    Cases,
    attribute_of,
    branch,
    branching,
    called,
    doubling,
    function,
    looped,
    node,
    nodes,
    relu,
    with_changed_body,
)
from tests.runtime.conftest import small_bundle

OPERATORS: Cases = {
    **{
        f"{domain or 'onnx'} {kind}": (
            "prompt",
            nodes(node(kind, "text", domain=domain)),
            f"operator '{kind}'",
        )
        for domain, kind in [
            *(("", kind) for kind in ("Scan", "Range", "ConstantOfShape", "Pad", "NonZero", "RandomNormal")),
            *(
                ("", kind)
                for kind in ("SequenceMap", "Optional", "StringNormalizer", "Einsum", "TopK", "Mod")
            ),
            *(("com.microsoft", kind) for kind in ("EPContext", "BeamSearch", "SampleOp", "Attention")),
            *(
                ("ai.onnx.contrib", "PyOp"),
                ("ai.onnx.ml", "TreeEnsemble"),
                ("evil", "Add"),
                ("ai.onnx", "Add"),
            ),
            *(("ai.onnx.preview.training", "Gradient"), ("com.ms.internal.nhwc", "Conv")),
        ]
    },
    "a loop of 2^62": ("prompt", looped, "the operator 'Loop'"),
    "an attribute that is not written": (
        "prompt",
        nodes(node("MatMul", "text", "text", path="/etc/passwd")),
        "the attribute 'path' of MatMul",
    ),
    "a branch by another condition": (
        "step",
        branching("sigma", relu("x0", "b"), relu("x0", "c")),
        "an If on",
    ),
    "a branch in a graph that is not told": (
        "prompt",
        branching("text", relu("text", "b"), relu("text", "c")),
        "an If on",
    ),
    "a branch in a branch": (
        "step",
        branching(
            "clean",
            branch(node("If", "clean", out="b", then_branch=branch(), else_branch=branch())),
            branch(),
        ),
        "an If in a branch",
    ),
    "a branch that gives what it did not make": (
        "step",
        branching("clean", branch(), branch()),
        "does not make",
    ),
    "an If without a branch": ("step", nodes(node("If", "clean")), "an If without two plain branches"),
    "operators of another version": (
        "prompt",
        lambda m: setattr(m.opset_import[0], "version", 22),
        "operators of '' version 22",
    ),
    "operators of another domain": (
        "prompt",
        lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1)),
        "operators of 'ai.onnx.contrib'",
    ),
    "an older format": ("prompt", lambda m: setattr(m, "ir_version", 3), "its version is 3"),
    "a format to come": ("prompt", lambda m: setattr(m, "ir_version", 99), "its version is 99"),
}

FUNCTIONS: Cases = {
    "35 that double": ("prompt", doubling, "the function 'DynamicPrune'"),
    "one that calls itself": (
        "prompt",
        called(function(node("DynamicPrune", "x", domain="forcingkv", out="y"))),
        "the function 'DynamicPrune'",
    ),
    "one of another name": ("prompt", called(function(name="Mine")), "the function 'Mine'"),
    "one that stands for an operator": (
        "prompt",
        called(function(name="Relu", domain="")),
        "the function 'Relu'",
    ),
    "one given twice": ("step", lambda m: m.functions.append(m.functions[0]), "the function 'DynamicPrune'"),
    "a body with one node more": (
        "step",
        with_changed_body(lambda f: f.node.append(node("Identity", "keys"))),
        "another body",
    ),
    "a body with another attribute": (
        "step",
        with_changed_body(lambda f: setattr(f.node[-1], "op_type", "Flatten")),
        "another body",
    ),
    "a body of another version": (
        "step",
        with_changed_body(lambda f: setattr(f.opset_import[0], "version", 21)),
        "the function 'DynamicPrune'",
    ),
    "an operator without its body": ("step", lambda m: m.functions.pop(), "without its body"),
    "an overload": (
        "step",
        with_changed_body(lambda f: setattr(f, "overload", "x")),
        "its Function has the field 13",
    ),
    "segments that are not the plan's": (
        "step",
        attribute_of("DynamicPrune", "segments", 0),
        "segments of DynamicPrune is 0",
    ),
    "more kept than the plan keeps": (
        "step",
        attribute_of("DynamicPrune", "kept", 2**40),
        "kept of DynamicPrune",
    ),
}

CASES = {f"operator: {name}": case for name, case in OPERATORS.items()}
CASES |= {f"function: {name}": case for name, case in FUNCTIONS.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_export_does_not_write_is_refused(case: str, tmp_path: Path) -> None:
    graph, change, message = CASES[case]
    refused(with_graph(small_bundle("forcing-kv"), tmp_path / "b", graph, change), message)


def test_the_bodies_are_those_that_export_writes() -> None:
    model = ModelProto()
    model.graph.name = "g"
    model.functions.extend(prune_functions())
    assert {f.name: f.digest for f in read_graph(model.SerializeToString(), "g").functions} == BODIES
