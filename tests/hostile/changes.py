"""Changes of a graph: what can be put into one by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from forcingkv.runtime.graph_check import BODIES
from tests.hostile.bundles import Change

Cases = dict[str, tuple[str, Change, str]]
"""What is wrong -> the graph that it is in, how it gets there, and what is said of it."""
WEIGHTS = "weights.safetensors"


def tensor(name: str, *numbers: float, kind: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(numbers, kind), name)


def external(location: str, dims: tuple[int, ...] = (1,), **entries: object) -> TensorProto:
    made = TensorProto(name="hostile", dims=dims, data_type=1, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": 0, "length": 4, **entries}.items():
        made.external_data.add(key=key, value=str(value))
    return made


def nodes(*made: NodeProto, initializers: tuple[TensorProto, ...] = ()) -> Change:
    """More nodes at the end of the graph, whose results nothing reads."""

    def change(model: ModelProto) -> None:
        model.graph.initializer.extend(initializers)
        model.graph.node.extend(made)

    return change


def node(kind: str, *inputs: str, domain: str = "", out: str = "h", **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, [out], domain=domain, **attributes)


def initializer(made: TensorProto) -> Change:
    return lambda model: model.graph.initializer.append(made)


def weight(model: ModelProto) -> TensorProto:
    """The first tensor whose contents lie in the file of weights."""
    return next(each for each in model.graph.initializer if each.external_data)


def entry(key: str, value: str) -> Change:
    """Another value of an entry of external data of the first weight."""

    def change(model: ModelProto) -> None:
        first = weight(model)
        found = [each for each in first.external_data if each.key == key]
        if found:
            found[0].value = value
        else:
            first.external_data.add(key=key, value=value)

    return change


def function(*body: NodeProto, name: str = "DynamicPrune", domain: str = "forcingkv") -> FunctionProto:
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("forcingkv", 1)]
    return helper.make_function(domain, name, ["x"], ["y"], list(body), opsets)


def called(*functions: FunctionProto) -> Change:
    def change(model: ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("forcingkv", 1))
        model.functions.extend(functions)
        model.graph.node.append(node(functions[0].name, "text", domain=functions[0].domain))

    return change


def doubling(model: ModelProto) -> None:
    """35 functions, each of which calls the next one twice: 2^34 inlinings."""
    names = [*BODIES, *(f"f{n}" for n in range(35))]
    made = []
    for this, after in pairwise(names):
        pairs = (("x", "h"), ("h", "y"))
        calls = [node(after, source, domain="forcingkv", out=out) for source, out in pairs]
        made.append(function(*calls, name=this))
    called(*made, function(node("Identity", "x", out="y"), name=names[-1]))(model)


def looped(model: ModelProto) -> None:
    body = helper.make_graph(
        [node("Identity", "c", out="d"), node("Identity", "v", out="w")],
        "body",
        [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("c", 9), ("v", 1))],
        [helper.make_tensor_value_info(name, kind, []) for name, kind in (("d", 9), ("w", 1))],
    )
    nodes(node("Loop", "trips", "", "text", body=body), initializers=(tensor("trips", 2**62),))(model)


def branch(*made: NodeProto, result: str = "b") -> onnx.GraphProto:
    return helper.make_graph(list(made), "g", [], [helper.make_tensor_value_info(result, 1, None)])


def relu(source: str, result: str) -> onnx.GraphProto:
    return branch(node("Relu", source, out=result), result=result)


def branching(condition: str, then: onnx.GraphProto, otherwise: onnx.GraphProto) -> Change:
    return nodes(node("If", condition, then_branch=then, else_branch=otherwise))


def doubled(count: int, kind: str = "Concat", **attributes: Any) -> Change:
    """Each node makes twice of what the one before made."""
    chain = ["text", *(f"h{n}" for n in range(count))]
    made = [node(kind, a, a, out=b, **attributes) for a, b in pairwise(chain)]
    return nodes(*made)


def products(count: int) -> Change:
    """As many matrix products again, of the text with a matrix that is there."""

    def change(model: ModelProto) -> None:
        first = next(each for each in model.graph.node if each.op_type == "MatMul")
        model.graph.node.extend(node("MatMul", *first.input, out=f"h{n}") for n in range(count))

    return change


def attribute(made: AttributeProto) -> Change:
    return lambda model: model.graph.node[0].attribute.append(made)


def sparse(model: ModelProto) -> None:
    values = onnx.SparseTensorProto(values=external("/etc/passwd"), indices=tensor("i", 0), dims=[1])
    model.graph.sparse_initializer.append(values)


def training(model: ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(external("/etc/passwd"))


def with_changed_body(change: Callable[[FunctionProto], object]) -> Change:
    def apply(model: ModelProto) -> None:
        (body,) = [each for each in model.functions if each.name == "DynamicPrune"]
        change(body)

    return apply


def external_in_body(body: FunctionProto) -> None:
    body.node.insert(0, node("Constant", out="secret", value=external("/etc/passwd")))


def attribute_of(kind: str, name: str, value: int) -> Change:
    def change(model: ModelProto) -> None:
        waiting = [*model.graph.node]
        while waiting:
            each = waiting.pop()
            waiting += [inner for a in each.attribute for inner in a.g.node]
            if each.op_type == kind:
                next(a for a in each.attribute if a.name == name).i = value

    return change


def conv(**attributes: Any) -> Change:
    def change(model: ModelProto) -> None:
        first = next(each for each in model.graph.node if each.op_type == "Conv")
        kept = [a for a in first.attribute if a.name not in attributes]
        del first.attribute[:]
        first.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in attributes.items())])

    return change


def end(change: Callable[[Any], object], kind: str = "input") -> Change:
    return lambda model: change(getattr(model.graph, kind)[0])


def one_more_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", 1, [1]))
