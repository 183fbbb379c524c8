"""The program that builds one engine, in a process of its own (see `engine_builder`).

It imports neither torch nor the rest of `export`, and of forcingkv only what a request needs: what it holds
in memory is TensorRT and the network. The request is JSON on standard input, the report JSON on standard
output, TensorRT's log standard error.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from forcingkv.headmaps.reading import parse_json
from forcingkv.runtime.flavour import Flavour, choose, make_log, trt
from forcingkv.runtime.memory import bound_memory, peak_bytes

MEMORY = {
    "activation_bytes": "Total Activation Memory",
    "weight_bytes": "Total Weights Memory",
    "scratch_bytes": "Max Scratch Memory",
}
"""What the builder reports of memory, in its log only."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse the graph, build the engine, write it, and report.

    The request: `graph`, the ONNX file; `flavour`; `plugins`, python or compiled, or None; `kernels` for
    plugins that the builder runs, see `_plugins`; `memory_limit` in bytes. With `engine`, the file to write,
    an engine is built for the GPU `sm`, with `profiles`: for each the shapes of every input that
    varies (`Profile.shapes`).

    The report says by `decomposed` whether there is attention without a fused kernel.
    """
    started = time.perf_counter()
    flavour = choose(request["flavour"])
    figures = dict.fromkeys(MEMORY, 0)
    log = make_log(partial(_hear, figures))
    check = _plugins(request)
    builder = trt.Builder(log)
    network = parse(builder, log, request["graph"])
    check()
    layers = [network.get_layer(n) for n in range(network.num_layers)]
    plugin_layers = sum(layer.type.name == "PLUGIN_V3" for layer in layers)
    report: dict[str, Any] = {"layers": len(layers), "plugin_layers": plugin_layers}
    if "engine" in request:
        config = configure(builder, flavour, request["sm"])
        for number, shapes in enumerate(request["profiles"]):
            add_profile(builder, config, number, shapes)
        report["decomposed"] = build_fused(
            layers, lambda: write_engine(builder, network, config, Path(request["engine"])), check
        )
        report |= figures | built_on(flavour)
    seconds = time.perf_counter() - started
    return report | {"version": trt.__version__, "seconds": seconds, "peak_bytes": peak_bytes()}


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Report by their places which of the graphs `probes` get no engine for the GPU `sm`."""
    flavour, log = choose(request["flavour"]), make_log(partial(_hear, {}))
    builder, refused = trt.Builder(log), []
    for place, graph in enumerate(request["probes"]):
        network = parse(builder, log, graph)
        if builder.build_serialized_network(network, configure(builder, flavour, request["sm"])) is None:
            refused.append(place)
    return {"refused": refused}


def parse(builder: trt.Builder, log: trt.ILogger, graph: str) -> trt.INetworkDefinition:
    """The network of an ONNX file. Raises RuntimeError with the parser's words."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(graph):
        faults = [str(parser.get_error(n).desc()) for n in range(parser.num_errors)]
        raise RuntimeError("the parser refused the graph: " + "; ".join(faults))
    return network


def configure(builder: trt.Builder, flavour: Flavour, sm: int) -> trt.IBuilderConfig:
    """What engines are built with."""
    config = builder.create_builder_config()
    # Off where it is on by default: what is float32 in a graph is so because its precision is needed.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Of TensorRT-RTX: without it an engine may allocate while it runs, and no CUDA graph can be captured.
    allocates = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if allocates is not None:
        config.set_flag(allocates)
    if flavour.sms:
        # For a GPU that is not here; only TensorRT-RTX can.
        capability = getattr(trt.ComputeCapability, f"SM{sm}")  # type: ignore[attr-defined]
        config.num_compute_capabilities = 1  # type: ignore[attr-defined]
        config.set_compute_capability(capability, 0)  # type: ignore[attr-defined]
    return config


def add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, number: int, shapes: Mapping[str, Sequence[Any]]
) -> None:
    """Add the profile of that number, by which contexts choose it; its `shapes` as in `Profile`.

    Raises RuntimeError where TensorRT does not take it.
    """
    profile = builder.create_optimization_profile()
    for name, three in shapes.items():
        what = f"profile {number}: TensorRT does not take {name} of {' to '.join(map(str, _ends(three)))}"
        try:
            taken: Any = profile.set_shape(name, *three)  # type: ignore[func-returns-value]
        except ValueError as error:
            raise RuntimeError(f"{what}: {error}") from error
        if taken is False:  # the bindings raise, and C++ says so
            raise RuntimeError(what)
    place = config.add_optimization_profile(profile)
    if place != number:
        raise RuntimeError(
            f"profile {number}: TensorRT "
            + ("does not take it" if place < 0 else f"gives it the number {place}")
        )


def _ends(shapes: Sequence[Any]) -> Sequence[Any]:
    """The least and the most of them, or the one shape that all are."""
    return shapes[:1] if shapes[0] == shapes[-1] else (shapes[0], shapes[-1])


def build_fused(layers: Sequence[trt.ILayer], make: Callable[[], bool], check: Callable[[], None]) -> bool:
    """Make an engine whose attention is all fused; if that fails, one that decomposes some of it.

    Returns whether it decomposes any. Raises RuntimeError if both fail.
    """
    attention = [_attention(layer) for layer in layers if layer.type.name == "ATTENTION_INPUT"]
    for node in attention:
        node.decomposable = False
    made = make()
    check()
    if made:
        return False
    for node in attention:
        node.decomposable = True
    made = bool(attention) and make()
    check()
    if not made:
        raise RuntimeError("the builder made no engine")
    return True


def _attention(layer: trt.ILayer) -> Any:
    """The attention that a layer is the beginning of. The network gives layers as their base class."""
    layer.__class__ = trt.IAttentionInputLayer  # type: ignore[attr-defined]
    return layer.attention  # type: ignore[attr-defined]


def write_engine(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, path: Path
) -> bool:
    """Build an engine and write it as it comes: it may be larger than memory. False where none is made.

    Raises OSError where it cannot be written.
    """
    with path.open("wb") as file:
        writer = _writer_class()(file)
        made = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error:
        raise writer.error
    return bool(made)


def _writer_class() -> Any:
    class Writer(trt.IStreamWriter):
        """Writes what TensorRT gives it to a file, and keeps the error: TensorRT only sees too few bytes."""

        def __init__(self, file: BinaryIO) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = file
            self.error: OSError | None = None

        def write(self, data: Any, size: int = 0) -> int:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer


def _plugins(request: dict[str, Any]) -> Callable[[], None]:
    """Register the plugins: ours, or those whose kernels are compiled into the engine.

    A builder that has a GPU may run ours, on inputs of its own making, to time them: `kernels` are then the
    bundle's `folder` and its `records`. Without such they are only asked for shapes.

    Returns a check that raises what a callback raised: TensorRT goes on after most of them.
    """
    if request["plugins"] == "compiled":
        from forcingkv.prune.quick_plugin import register_quick_plugins

        register_quick_plugins(request["sm"])
    if request["plugins"] != "python":
        return lambda: None
    from forcingkv.prune.plugin import raise_plugin_error, register_plugins

    launcher, given = None, request.get("kernels")
    if given:
        from forcingkv.headmaps.fields import from_data
        from forcingkv.prune.launcher import KernelLauncher
        from forcingkv.runtime.engines import KernelRecord, cuda_core

        cuda_core().Device(0).set_current()
        records = [from_data(KernelRecord, record, "the request") for record in given["records"]]
        launcher = KernelLauncher(Path(given["folder"]), records, request["sm"])
    register_plugins(launcher)
    return raise_plugin_error


def built_on(flavour: Flavour) -> dict[str, Any]:
    """The GPU that an engine was tuned on, for its record; nothing for one built without a GPU."""
    if flavour.sms:
        return {}
    from forcingkv.runtime.engines import device_model

    found = device_model()
    return {} if found is None else {"device": found[0], "multiprocessors": found[1]}


def _hear(figures: dict[str, int], severity: str, message: str) -> None:
    """Write TensorRT's messages to standard error, and keep the figures that are nowhere else."""
    for name, words in MEMORY.items():
        found = re.search(rf"{words}: (\d+) bytes", message)
        if found:
            figures[name] = max(figures.get(name, 0), int(found[1]))
    if severity != "VERBOSE":
        print(
            f"[{severity[0] if severity != 'INTERNAL_ERROR' else 'E'}] {message}", file=sys.stderr, flush=True
        )


def main() -> int:
    """Build what standard input asks for."""
    request = parse_json(sys.stdin.read(), "the request")
    bound_memory(request["memory_limit"])
    try:
        report = probe(request) if "probes" in request else build(request)
    except OSError as error:  # the engine cannot be written: the parent says so in its own words
        report = {"errno": error.errno, "strerror": error.strerror}
    except (RuntimeError, MemoryError, ValueError) as error:
        print(f"[E] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    json.dump(report, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
