"""What torch and onnxscript do over and over for each graph that is exported, to the same graphs in less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from onnxscript.rewriter import RewriteRule
from torch._C import DispatchKey
from torch._export import utils
from torch._ops import OperatorBase
from torch.export import _unlift, decomp_utils, exported_program
from torch.fx import GraphModule, config
from torch.fx.graph import _PyTreeCodeGen
from torch.onnx._internal.exporter import _decomp, _registration


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
