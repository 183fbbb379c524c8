"""What torch and onnxscript do over and over for each graph that is exported, to the same graphs in less.

Only numbers in names differ: of nodes, and of symbols of sizes that nothing else depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

import pytest
import torch
from onnxscript.rewriter import RewriteRule
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._export import utils
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._ops import OperatorBase
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.export import ExportedProgram, _trace, _unlift, decomp_utils, exported_program
from torch.export.graph_signature import OutputSpec, TensorArgument
from torch.fx import GraphModule, Interpreter, Node, config
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.runtime_assert import insert_deferred_runtime_asserts
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration
from torch.onnx._internal.fx.passes.type_promotion import (
    _TypePromotionInterpreter,
    get_type_promotion_rule,
)

DECOMPOSED, RUN_NODE = _fx_passes.decompose_with_registry, _TypePromotionInterpreter.run_node
"""As torch has them."""


@contextmanager
def tables_are_kept() -> Iterator[None]:
    """torch keeps its tables of translations and decompositions, and notes no lines of source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", _translations())
        patch.setattr(_decomp, "create_onnx_friendly_decomposition_table", _decompositions())
        composite = cache(utils._collect_all_valid_cia_ops)  # "should never be modified", says torch
        for module in (utils, decomp_utils, exported_program):
            patch.setattr(module, "_collect_all_valid_cia_ops", composite)
        # Bundles do not keep the lines of source that torch notes for each node.
        patch.setattr(config, "do_not_emit_stack_traces", True)
        # Nobody calls the modules that are made of graphs on the way, nor checks that their inputs fit.
        patch.setattr(GraphModule, "recompile", _when_called(GraphModule.recompile))
        patch.setattr(_unlift, "_ok_to_generate_guards_fn", lambda: False)
        patch.setattr(OperatorBase, "py_impl", _without_hints(OperatorBase.py_impl))
        patch.setattr(_fx_passes, "decompose_with_registry", decomposed)
        promoted = _run_where_types_change(RUN_NODE)
        patch.setattr(_TypePromotionInterpreter, "run_node", promoted)
        patch.setattr(RewriteRule, "try_rewrite", _at_nodes_of_its_operator(RewriteRule.try_rewrite))
        yield


def _translations() -> Callable[[object, int], _registration.ONNXRegistry]:
    """`ONNXRegistry.from_torchlib`, which parses 600 functions."""
    registry = _registration.ONNXRegistry
    read = cache(registry.from_torchlib)

    def copied(_: object, opset_version: int) -> _registration.ONNXRegistry:
        found, known = registry(), read(opset_version)
        found._opset_version = known.opset_version
        found.functions = {target: list(functions) for target, functions in known.functions.items()}
        return found

    return copied


def _decompositions() -> Callable[[set[Any]], dict[Any, Any]]:
    """`create_onnx_friendly_decomposition_table`, by the operators that have a translation."""
    made = cache(_decomp.create_onnx_friendly_decomposition_table)

    def copied(translated: set[Any]) -> dict[Any, Any]:
        return dict(made(frozenset(translated)))  # type: ignore[arg-type]

    return copied


def decomposed(program: ExportedProgram, registry: _registration.ONNXRegistry) -> ExportedProgram:
    """`_fx_passes.decompose_with_registry`, which runs a graph twice, and checks what comes of it.

    The first run finds out which outputs are views of inputs, and which inputs are written to: none here.
    """
    table = _decomp.create_onnx_friendly_decomposition_table(
        set(_decomp.get_onnx_implemented_overloads(registry))
    )
    composite, others = exported_program._split_decomp_table_to_cia_and_python_decomp(dict(table))
    before = _of(program.graph_module, "placeholder")
    examples, graph = [node.meta["val"] for node in before], Interpreter(program.graph_module)

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        with FunctionalTensorMode(pre_dispatch=False, export=True):
            with disable_proxy_modes_tracing():  # or nodes for their sizes come first
                given = [to_fun(tensor) for tensor in tensors]
            outputs = graph.run(*given)
        return [from_fun(output) for output in outputs]

    with (
        unset_fake_temporarily(),
        _trace._ignore_backend_decomps(),
        examples[0].fake_mode,
        exported_program._override_composite_implicit_decomp(composite),
        torch.no_grad(),
        enable_python_dispatcher(),
    ):
        module = make_fx(run, decomposition_table=others)(*examples)
    module.graph.eliminate_dead_code()
    # Sizes that vary come first.
    insert_deferred_runtime_asserts(module, examples[0].fake_mode.shape_env, "the graph", export=True)
    for old, new in zip(before, _of(module, "placeholder"), strict=True):
        new.name = new.target = old.name
        new.meta["val"] = old.meta["val"]
    (output,), signature = _of(module, "output"), copy(program.graph_signature)
    named = zip(signature.output_specs, output.args[0], strict=True)  # type: ignore[arg-type]
    signature.output_specs = [
        OutputSpec(spec.kind, TensorArgument(name=node.name), spec.target)  # type: ignore[union-attr]
        for spec, node in named
    ]
    made = copy(program)
    made._graph_module, made._graph_signature = module, signature
    return made


def _run_where_types_change(run_node: Callable[..., Any]) -> Callable[[Any, Node], Any]:
    """`_TypePromotionInterpreter.run_node`, which runs every node to find the type that it has already."""

    def run(interpreter: Any, node: Node) -> Any:
        if node.op != "call_function" or interpreter.__dict__.get("changed"):
            return run_node(interpreter, node)
        before = _type_of(node)
        with interpreter._set_current_node(node):
            if rule := get_type_promotion_rule(node, interpreter.type_promotion_table):
                interpreter._maybe_promote_node(node, rule)
        if _type_of(node) != before:
            interpreter.changed = True  # and all that follows may have another type
        elif "val" in node.meta:  # assertions have none
            return node.meta["val"]
        return Interpreter.run_node(interpreter, node)

    return run


def _type_of(node: Node) -> object:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else type(value)


def _of(module: GraphModule, kind: str) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == kind]


def _at_nodes_of_its_operator(try_rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """`RewriteRule.try_rewrite`, which sets up a match before it looks at the node's operator."""
    ends: dict[RewriteRule, str | None] = {}

    def filtered(rule: RewriteRule, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        if rule not in ends:
            (_, operator, _) = rule._target_pattern.output_nodes[0].op_identifier() or (None, None, None)
            ends[rule] = operator
        if ends[rule] not in (None, node.op_type):
            return None
        return try_rewrite(rule, model, graph, node, **options)

    return filtered


def _without_hints(py_impl: Callable[..., Any]) -> Callable[..., Any]:
    """`OperatorBase.py_impl`, which makes a function with type hints for each of ten thousand kernels."""

    def registered(operator: OperatorBase, key: Any) -> Any:
        if not isinstance(key, DispatchKey) or key == DispatchKey.Python or key in operator.py_kernels:
            return py_impl(operator, key)

        def register(kernel):  # type: ignore[no-untyped-def]
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return register

    return registered


def _when_called(recompile: Callable[..., Any]) -> Callable[[GraphModule], None]:
    """`GraphModule.recompile`, which makes a Python function of a graph, put off until that is called."""

    def later(module: GraphModule) -> None:
        if isinstance(module._graph._codegen, _PyTreeCodeGen):
            info = module._graph._codegen.pytree_info
            module._in_spec, module._out_spec = info.in_spec, info.out_spec

        def forward(module: GraphModule, *args: Any, **options: Any) -> Any:
            recompile(module)
            return module(*args, **options)

        type(module).forward = forward  # type: ignore[method-assign]

    return later
