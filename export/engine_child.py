"""The program that builds one engine, in a process of its own (see `engine_builder`).

It imports neither torch nor the rest of `export`: what it holds in memory is TensorRT and the network. The
request is JSON on standard input, the report JSON on standard output, TensorRT's log standard error.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forcingkv.headmaps.reading import parse_json
from forcingkv.runtime.flavour import FLAVOURS, choose, make_log, trt
from forcingkv.runtime.memory import bound_memory, peak_bytes

MEMORY = {
    "activation_bytes": "Total Activation Memory",
    "weight_bytes": "Total Weights Memory",
    "scratch_bytes": "Max Scratch Memory",
}
"""What the builder reports of memory, in its log only."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse the graph, build the engine, write it, and report.

    The request: `graph`, the ONNX file; `flavour`; `plugins`, python or compiled, or None; `memory_limit` in
    bytes. With `engine`, the file to write, an engine is built for the GPU `sm`, with a profile for each of
    `phases`, which are shapes of inputs.
    """
    started = time.perf_counter()
    choose(request["flavour"])
    figures = dict.fromkeys(MEMORY, 0)
    log = make_log(partial(_hear, figures))
    check = _plugins(request)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["graph"]):
        faults = [str(parser.get_error(n).desc()) for n in range(parser.num_errors)]
        raise RuntimeError("the parser refused the graph: " + "; ".join(faults))
    check()
    layers = [network.get_layer(n) for n in range(network.num_layers)]
    plugin_layers = sum(layer.type.name == "PLUGIN_V3" for layer in layers)
    report: dict[str, Any] = {"layers": len(layers), "plugin_layers": plugin_layers}
    if "engine" in request:
        config = builder.create_builder_config()
        if FLAVOURS[request["flavour"]].sms:
            # For a GPU that is not here; only TensorRT-RTX can.
            capability = getattr(trt.ComputeCapability, f"SM{request['sm']}")  # type: ignore[attr-defined]
            config.num_compute_capabilities = 1  # type: ignore[attr-defined]
            config.set_compute_capability(capability, 0)  # type: ignore[attr-defined]
        for shapes in request["phases"]:
            profile = builder.create_optimization_profile()
            for name, shape in shapes.items():
                profile.set_shape(name, shape, shape, shape)
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        check()
        if engine is None:
            raise RuntimeError("the builder made no engine")
        Path(request["engine"]).write_bytes(memoryview(engine))
        report |= figures
    seconds = time.perf_counter() - started
    return report | {"version": trt.__version__, "seconds": seconds, "peak_bytes": peak_bytes()}


def _plugins(request: dict[str, Any]) -> Callable[[], None]:
    """Register the plugins: ours, or those whose kernels are compiled into the engine.

    Returns a check that raises what a callback raised: TensorRT goes on after most of them.
    """
    if request["plugins"] == "compiled":
        from forcingkv.prune.quick_plugin import register_quick_plugins

        register_quick_plugins(request["sm"])
    if request["plugins"] != "python":
        return lambda: None
    from forcingkv.prune.plugin import raise_plugin_error, register_plugins

    register_plugins(None)
    return raise_plugin_error


def _hear(figures: dict[str, int], severity: str, message: str) -> None:
    """Write TensorRT's messages to standard error, and keep the figures that are nowhere else."""
    for name, words in MEMORY.items():
        found = re.search(rf"{words}: (\d+) bytes", message)
        if found:
            figures[name] = max(figures[name], int(found[1]))
    if severity != "VERBOSE":
        print(
            f"[{severity[0] if severity != 'INTERNAL_ERROR' else 'E'}] {message}", file=sys.stderr, flush=True
        )


def main() -> int:
    """Build what standard input asks for."""
    request = parse_json(sys.stdin.read(), "the request")
    bound_memory(request["memory_limit"])
    try:
        report = build(request)
    except OSError as error:  # the engine cannot be written: the parent says so in its own words
        report = {"errno": error.errno, "strerror": error.strerror}
    except (RuntimeError, MemoryError, ValueError) as error:
        print(f"[E] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    json.dump(report, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
