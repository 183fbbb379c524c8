"""Graphs that two readers could take differently, and ends that are not those of the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import AttributeProto, NodeProto, helper

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, graph_file
from forcingkv.runtime.graph_file import read_graph
from forcingkv.runtime.protobuf import coded, field
from tests.hostile.bundles import refused, remade, with_graph, write
from tests.hostile.changes import (
    Cases,
    attribute,
    branch,
    branching,
    end,
    node,
    nodes,
    one_more_input,
    relu,
    tensor,
)
from tests.runtime.conftest import small_bundle

CASES: Cases = {
    "a name made twice": (
        "prompt",
        nodes(node("Relu", "text", out="h"), node("Relu", "text", out="h")),
        "the name 'h'",
    ),
    "a weight that is an input too": (
        "prompt",
        lambda m: m.graph.input.append(helper.make_tensor_value_info(m.graph.initializer[0].name, 1, [1])),
        "the name",
    ),
    "a result called as an input": ("prompt", nodes(node("Relu", "text", out="text")), "the name 'text'"),
    "a result called as another in a branch": (
        "step",
        branching(
            "clean",
            relu("latents", "x0"),
            branch(node("Constant", out="c", value=tensor("c", 1)), result="c"),
        ),
        "the name 'x0'",
    ),
    "a result read before it is made": (
        "prompt",
        nodes(node("Relu", "later"), node("Relu", "text", out="later")),
        "before it is made",
    ),
    "a result that nothing makes": ("prompt", nodes(node("Relu", "nowhere")), "before it is made"),
    "a result without a name": ("prompt", nodes(node("Relu", "text", out="")), "the name ''"),
    "an attribute given twice": (
        "prompt",
        nodes(
            NodeProto(
                op_type="Cast", input=["text"], output=["h"], attribute=[helper.make_attribute("to", 1)] * 2
            )
        ),
        "is given twice",
    ),
    "an attribute of two types": (
        "prompt",
        attribute(AttributeProto(name="to", type=AttributeProto.INT, i=1, s=b"1")),
        "values of other types",
    ),
    "an attribute of no type": ("prompt", attribute(AttributeProto(name="to", i=1)), "has the type 0"),
    "a reference outside a function": (
        "prompt",
        nodes(
            NodeProto(
                op_type="Cast",
                input=["text"],
                output=["h"],
                attribute=[AttributeProto(name="to", type=2, ref_attr_name="x")],
            )
        ),
        "as a reference",
    ),
    "a domain imported twice": (
        "prompt",
        lambda m: m.opset_import.append(m.opset_import[0]),
        "is imported twice",
    ),
    "shapes of values inside": (
        "prompt",
        lambda m: m.graph.value_info.append(m.graph.input[0]),
        "its Graph has the field 13",
    ),
    "metadata": ("prompt", lambda m: m.metadata_props.add(key="k", value="v"), "its Model has the field 14"),
    "a device": (
        "prompt",
        lambda m: m.graph.node[0].device_configurations.add(),
        "its Node has the field 10",
    ),
    "another name of an input": (
        "prompt",
        end(lambda v: setattr(v, "name", "words")),
        "before it is made|the inputs",
    ),
    "another type of an input": (
        "prompt",
        end(lambda v: setattr(v.type.tensor_type, "elem_type", 11)),
        "the input text is",
    ),
    "another size of an input": (
        "prompt",
        end(lambda v: setattr(v.type.tensor_type.shape.dim[0], "dim_value", 9)),
        "the input text is",
    ),
    "an input of any size": (
        "prompt",
        end(lambda v: v.type.tensor_type.shape.dim[1].Clear()),
        "the input text is",
    ),
    "an input of any rank": (
        "prompt",
        end(lambda v: v.type.tensor_type.ClearField("shape")),
        "the input text is",
    ),
    "a sequence": (
        "prompt",
        end(lambda v: v.type.sequence_type.elem_type.tensor_type.SetInParent()),
        "its Type has the field 4",
    ),
    "one input more": ("prompt", one_more_input, "the inputs"),
    "another size of an output": (
        "decode",
        end(lambda v: setattr(v.type.tensor_type.shape.dim[1], "dim_value", 9999), "output"),
        "the output frames is",
    ),
    "one output more": ("prompt", lambda m: m.graph.output.append(m.graph.input[0]), "the outputs"),
    "an output of another size than it says": (
        "decode",
        lambda m: m.graph.node[-1].input.__setitem__(0, "latents"),
        "comes out as",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_graph_that_can_be_read_in_two_ways_is_refused(case: str, tmp_path: Path) -> None:
    graph, change, message = CASES[case]
    refused(with_graph(small_bundle("forcing-kv"), tmp_path / "b", graph, change), message)


def first(content: bytes, number: int, payload: bytes) -> bytes:
    return field(number, payload) + content


RAW: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "two graphs, which parsers make one of": (lambda c: c + field(7, b""), "two values of graph"),
    "an unknown field": (lambda c: c + field(99, b"x"), "its Model has the field 99"),
    "a field of number 0": (lambda c: c + b"\x02\x00", "a field has the number 0"),
    "a group": (lambda c: c + b"\x0b\x0c", "the wire type 3"),
    "a wire type that is none": (lambda c: c + b"\x0f", "the wire type 7"),
    "a number longer than it needs": (lambda c: b"\x08\x8a\x00" + c[2:], "more bytes than it needs"),
    "a number of eleven bytes": (
        lambda c: c + b"\x08" + b"\xff" * 10 + b"\x01",
        "more than ten bytes|than it needs",
    ),
    "a number above 64 bits": (lambda c: c + b"\x28" + b"\xff" * 9 + b"\x7f", "than it needs"),
    "cut short": (lambda c: c[:-3], "it ends within"),
    "a length beyond the end": (lambda c: c + b"\x3a\xff\xff\xff\x0f", "it ends within a field"),
    "a field of another type": (
        lambda c: c + b"\x15\0\0\0\0",
        "producer_name of its Model has the wire type 5",
    ),
    "text that is none": (lambda c: c.replace(b"Gelu", b"\xff\xfe\xff\xfe"), "is no text"),
    "empty": (lambda c: b"", "it holds no graph"),
    "a page": (lambda c: b"<!doctype html>", "cannot be read as an ONNX graph"),
    "a pickle": (lambda c: b"\x80\x04cos\nsystem\n", "cannot be read as an ONNX graph"),
    "ONNX Runtime's own format": (lambda c: b"\x20\0\0\0ORTM" + c, "ONNX Runtime's own format"),
    "one that is both": (lambda c: first(c, 2, b"\0\0ORTM" + b"\0" * 90), "ONNX Runtime's own format"),
    "a type of more than 31 bits": (
        lambda c: c + field(25, field(7, field(5, b"\xa0\x01" + coded(1 << 32)))),
        "type of its Attribute is 4294967296",
    ),
}


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_two_parsers_might_read_differently_are_refused(case: str, tmp_path: Path) -> None:
    spoil, message = RAW[case]
    content = (small_bundle("forcing-kv") / "prompt.onnx").read_bytes()
    refused(with_graph(small_bundle("forcing-kv"), tmp_path / "b", "prompt", spoil(content)), message)


def test_messages_in_each_other_and_fields_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = b""
    for _ in range(50):  # a graph in an attribute of a node of a graph ...
        deep = field(1, field(5, field(6, deep)))
    with pytest.raises(InputError, match="more than 10 messages lie in each other"):
        read_graph(field(7, deep), "g")
    monkeypatch.setattr(graph_file, "MOST_FIELDS", 100)
    with pytest.raises(InputError, match="it has more than 100 fields"):
        read_graph(field(7, field(1, b"") * 101), "g")
    monkeypatch.setattr(graph_file, "MOST_BYTES", 1 << 20)
    with pytest.raises(InputError, match="it has more than 1 MB"):
        read_graph(field(2, b"x" * (1 << 20)), "g")


def test_the_same_bundle_with_digests_made_anew_opens(tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    for name in ("forcing-kv", "taehv"):
        copy = remade(small_bundle(name), tmp_path / name)
        for graph in ("prompt", "step", "decode"):
            write(copy, f"{graph}.onnx", (small_bundle(name) / f"{graph}.onnx").read_bytes())
        assert Bundle.open(copy).plan == Bundle.open(small_bundle(name)).plan
