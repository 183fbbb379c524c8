"""An ONNX file, read without onnx and without trust: the messages and fields that export writes, no others.

ONNX Runtime reads the same bytes by protobuf's own parser. So that both see one graph, whatever two parsers
could take differently is refused: a field that is not known here, a second value of a field that has one,
text that is not UTF-8, numbers that do not fit their type (`protobuf.fields` refuses more). What the graph
does is looked at in `graph_check` and `graph_sizes`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.protobuf import FOUR_BYTES, LENGTH, VARINT, ProtobufError, fields, varint

MOST_BYTES = 64 << 20
"""Of a graph's file. The step graph of 40 layers has some MB: weights lie in files of their own."""
MOST_FIELDS = 1_000_000
"""Of a graph's file."""
DEEPEST = 10
"""Messages within messages: of a constant in a branch there are eight."""


class _Kind(NamedTuple):
    """What a field holds: `int`, `int32`, `float`, `text`, `bytes` or the name of a message."""

    name: str
    of: str
    many: bool = False


_SCHEMA: dict[str, dict[int, _Kind]] = {
    "Model": {
        1: _Kind("ir_version", "int"),
        2: _Kind("producer_name", "text"),
        3: _Kind("producer_version", "text"),
        7: _Kind("graph", "Graph"),
        8: _Kind("opset_import", "Opset", many=True),
        25: _Kind("functions", "Function", many=True),
    },
    "Opset": {1: _Kind("domain", "text"), 2: _Kind("version", "int")},
    "Graph": {
        1: _Kind("node", "Node", many=True),
        2: _Kind("name", "text"),
        5: _Kind("initializer", "Tensor", many=True),
        11: _Kind("input", "Value", many=True),
        12: _Kind("output", "Value", many=True),
    },
    "Node": {
        1: _Kind("input", "text", many=True),
        2: _Kind("output", "text", many=True),
        3: _Kind("name", "text"),
        4: _Kind("op_type", "text"),
        5: _Kind("attribute", "Attribute", many=True),
        6: _Kind("doc_string", "text"),
        7: _Kind("domain", "text"),
    },
    "Attribute": {
        1: _Kind("name", "text"),
        2: _Kind("f", "float"),
        3: _Kind("i", "int"),
        4: _Kind("s", "bytes"),
        5: _Kind("t", "Tensor"),
        6: _Kind("g", "Graph"),
        8: _Kind("ints", "int", many=True),
        20: _Kind("type", "int32"),
        21: _Kind("ref_attr_name", "text"),
    },
    "Tensor": {
        1: _Kind("dims", "int", many=True),
        2: _Kind("data_type", "int32"),
        8: _Kind("name", "text"),
        9: _Kind("raw_data", "bytes"),
        13: _Kind("external_data", "Entry", many=True),
        14: _Kind("data_location", "int32"),
    },
    "Entry": {1: _Kind("key", "text"), 2: _Kind("value", "text")},
    "Value": {1: _Kind("name", "text"), 2: _Kind("type", "Type")},
    "Type": {1: _Kind("tensor_type", "TensorType")},
    "TensorType": {1: _Kind("elem_type", "int32"), 2: _Kind("shape", "Shape")},
    "Shape": {1: _Kind("dim", "Dimension", many=True)},
    "Dimension": {1: _Kind("dim_value", "int"), 2: _Kind("dim_param", "text")},
    "Function": {
        1: _Kind("name", "text"),
        4: _Kind("input", "text", many=True),
        5: _Kind("output", "text", many=True),
        6: _Kind("attribute", "text", many=True),
        7: _Kind("node", "Node", many=True),
        9: _Kind("opset_import", "Opset", many=True),
        10: _Kind("domain", "text"),
    },
}
"""The part of ONNX's messages (onnx.proto) that export writes, by the numbers of their fields."""
_TYPES = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 7: "ints"}
"""Number of an attribute's type -> the field that then holds its value."""

Attribute: TypeAlias = "float | int | bytes | tuple[int, ...] | Tensor | Graph | Reference"


class Reference(NamedTuple):
    """In a function: the value that the node which calls it gives to that attribute."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """A tensor with its contents: in the graph, or at a place in another file."""

    name: str
    dims: tuple[int, ...]
    data_type: int
    raw: bytes
    external: tuple[tuple[str, str], ...] | None
    """Keys and values, where its contents lie in another file."""


@dataclass(frozen=True)
class Value:
    """An input or output of a graph."""

    name: str
    data_type: int
    shape: tuple[int | str | None, ...] | None
    """A dimension is a number, a symbol, or None where it is not said; None: not even how many there are."""


@dataclass
class Node:
    """A node. A name of an input is empty where the input is left out."""

    op_type: str
    domain: str
    input: list[str]
    output: list[str]
    attributes: dict[str, Attribute]


@dataclass
class Graph:
    """A graph, or a branch of one."""

    node: list[Node]
    initializer: list[Tensor] = field(default_factory=list)
    input: list[Value] = field(default_factory=list)
    output: list[Value] = field(default_factory=list)

    def all_nodes(self) -> Iterator[Node]:
        """The nodes, and those of branches."""
        for node in self.node:
            yield node
            for value in node.attributes.values():
                if isinstance(value, Graph):
                    yield from value.all_nodes()


@dataclass
class Function:
    """A function of a model, as the nodes of its body."""

    domain: str
    name: str
    opsets: dict[str, int]
    digest: str
    """SHA-256 of what it is: inputs, outputs, attributes and nodes, whatever order the file has them in."""


@dataclass
class Model:
    """An ONNX file."""

    ir_version: int
    opsets: dict[str, int]
    graph: Graph
    functions: list[Function]


def read_graph(content: bytes, where: str) -> Model:
    """The model that the bytes of an ONNX file hold. Raises InputError, beginning with `where`."""
    try:
        if len(content) > MOST_BYTES:
            raise ProtobufError(f"it has more than {MOST_BYTES >> 20} MB")
        if content[4:8] == b"ORTM":
            raise ProtobufError("it has the mark of ONNX Runtime's own format")
        return _model(_Reader().message("Model", content))
    except ProtobufError as error:
        raise InputError(
            f"cannot be read as an ONNX graph ({error})",
            where=where,
            expected="a graph as export writes it",
            hint="The bundle is damaged, or not to be trusted: export or copy it again.",
        ) from error


class _Reader:
    """Reads messages into mappings by field name, counting what it reads."""

    def __init__(self) -> None:
        self._left = MOST_FIELDS

    def message(self, kind: str, content: bytes, depth: int = 0) -> dict[str, Any]:
        schema, found = _SCHEMA[kind], {}  # type: dict[int, _Kind], dict[str, Any]
        if depth > DEEPEST:
            raise ProtobufError(f"more than {DEEPEST} messages lie in each other")
        for number, wire, value, _, _ in fields(content):
            self._left -= 1
            if self._left < 0:
                raise ProtobufError(f"it has more than {MOST_FIELDS} fields")
            expected = schema.get(number)
            if expected is None:
                raise ProtobufError(f"its {kind} has the field {number}, which export does not write")
            if expected.many and expected.of == "int" and wire == LENGTH:  # packed
                found.setdefault(expected.name, []).extend(_packed(value))  # type: ignore[arg-type]
                continue
            read = self._value(kind, expected, wire, value, depth)
            if expected.many:
                found.setdefault(expected.name, []).append(read)
            elif expected.name in found:
                raise ProtobufError(f"its {kind} has two values of {expected.name}")
            else:
                found[expected.name] = read
        return found

    def _value(self, kind: str, expected: _Kind, wire: int, value: Any, depth: int) -> Any:
        wanted = {"int": VARINT, "int32": VARINT, "float": FOUR_BYTES}.get(expected.of, LENGTH)
        if wire != wanted:
            raise ProtobufError(f"{expected.name} of its {kind} has the wire type {wire}")
        if expected.of == "int":
            return value - (1 << 64) if value >> 63 else value
        if expected.of == "int32":
            if value >> 31:
                raise ProtobufError(f"{expected.name} of its {kind} is {value}")
            return value
        if expected.of == "float":
            return struct.unpack("<f", value)[0]
        if expected.of == "bytes":
            return value
        if expected.of == "text":
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise ProtobufError(f"{expected.name} of its {kind} is no text") from error
        return self.message(expected.of, value, depth + 1)


def _packed(content: bytes) -> Iterator[int]:
    place = 0
    while place < len(content):
        number, place = varint(content, place)
        yield number - (1 << 64) if number >> 63 else number


def _model(data: Mapping[str, Any]) -> Model:
    if "graph" not in data:
        raise ProtobufError("it holds no graph")
    return Model(
        data.get("ir_version", 0),
        _opsets(data),
        _graph(data["graph"]),
        [_function(each) for each in data.get("functions", ())],
    )


def _opsets(data: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in data.get("opset_import", ()):
        domain = entry.get("domain", "")
        if domain in found:
            raise ProtobufError(f"the domain {domain!r} is imported twice")
        found[domain] = entry.get("version", 0)
    return found


def _graph(data: Mapping[str, Any]) -> Graph:
    return Graph(
        [_node(each) for each in data.get("node", ())],
        [_tensor(each) for each in data.get("initializer", ())],
        [_value(each) for each in data.get("input", ())],
        [_value(each) for each in data.get("output", ())],
    )


def _function(data: Mapping[str, Any]) -> Function:
    parts = [data.get(name, []) for name in ("input", "output", "attribute")]
    nodes = [_node(each) for each in data.get("node", ())]
    told = [
        (node.domain, node.op_type, node.input, node.output, sorted(node.attributes.items()))
        for node in nodes
    ]
    digest = hashlib.sha256(repr((*parts, told)).encode()).hexdigest()
    return Function(data.get("domain", ""), data.get("name", ""), _opsets(data), digest)


def _node(data: Mapping[str, Any]) -> Node:
    attributes: dict[str, Attribute] = {}
    for each in data.get("attribute", ()):
        name = each.get("name", "")
        if name in attributes:
            raise ProtobufError(f"an attribute {name} is given twice")
        attributes[name] = _attribute(each)
    names = data.get("op_type", ""), data.get("domain", "")
    return Node(*names, data.get("input", []), data.get("output", []), attributes)


def _attribute(data: Mapping[str, Any]) -> Attribute:
    name = data.get("name", "")
    kind = _TYPES.get(data.get("type", 0))
    held = set(data) - {"name", "type"}
    if kind is None:
        raise ProtobufError(f"the attribute {name} has the type {data.get('type', 0)}")
    if held == {"ref_attr_name"}:
        return Reference(data["ref_attr_name"])
    if held - {kind}:
        raise ProtobufError(f"the attribute {name} has values of other types than its own")
    if kind == "t":
        return _tensor(data.get("t", {}))
    if kind == "g":
        return _graph(data.get("g", {}))
    if kind == "ints":
        return tuple(data.get("ints", ()))
    missing: dict[str, Any] = {"f": 0.0, "i": 0, "s": b""}
    return data.get(kind, missing[kind])  # type: ignore[no-any-return]


def _tensor(data: Mapping[str, Any]) -> Tensor:
    name, location = data.get("name", ""), data.get("data_location", 0)
    entries = tuple((each.get("key", ""), each.get("value", "")) for each in data.get("external_data", ()))
    if location not in (0, 1) or bool(entries) != (location == 1) or (entries and "raw_data" in data):
        raise ProtobufError(f"it is not plain where the contents of the tensor {name!r} lie")
    external = entries if location == 1 else None
    dims = tuple(data.get("dims", ()))
    return Tensor(name, dims, data.get("data_type", 0), data.get("raw_data", b""), external)


def _value(data: Mapping[str, Any]) -> Value:
    kind = data.get("type", {}).get("tensor_type", {})
    if "shape" not in kind:
        return Value(data.get("name", ""), kind.get("elem_type", 0), None)
    shape = []
    for each in kind["shape"].get("dim", ()):
        if len(each) > 1:
            raise ProtobufError("a dimension is a number and a symbol")
        shape.append(each.get("dim_value", each.get("dim_param")))
    return Value(data.get("name", ""), kind.get("elem_type", 0), tuple(shape))
