"""What a bundle is made of, written one after another: weights, graphs, engines and their records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import onnx
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from forcingkv.export import fp8, int8
from forcingkv.export.activations import activation_bytes
from forcingkv.export.bake import Planned, bake_weights, baked_model, store_tensors
from forcingkv.export.engine_builder import (
    EngineTarget,
    build_engine,
)
from forcingkv.export.fp8 import CalibrationTexts, calibrate
from forcingkv.export.graphs import (
    Graph,
    decode_graph,
    decode_strip_graph,
    empty,
    encode_graph,
    prompt_graph,
    recache_graph,
    step_graph,
)
from forcingkv.export.live_memory import streaming_bytes
from forcingkv.export.onnx_writer import value_records, write_onnx
from forcingkv.export.precision import Precision, torch_dtype
from forcingkv.export.verify import graph_difference, quantized_differences
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import StripShapes, strip_shapes
from forcingkv.models.encoders import StreamingEncoder
from forcingkv.models.streaming import StreamingModule
from forcingkv.models.wan import WanModel
from forcingkv.prune.launcher import KERNELS, UNEVEN_KERNELS, kernel_sms
from forcingkv.runtime.bundle import (
    GRAPHS,
    CalibrationRecord,
    GraphRecord,
    as_records,
    tensor_records,
)
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.engines import EngineRecord, KernelRecord
from forcingkv.runtime.graph_check import check_graph, shapes_of
from forcingkv.runtime.graph_file import read_graph
from forcingkv.runtime.graph_memory import weight_bytes
from forcingkv.runtime.graph_records import (
    DECODING_GRAPHS,
    STRIP,
    UNFOLDED,
    DecoderSizes,
    Layout,
    encode_layouts,
)
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype
from forcingkv.runtime.tensors import StoredTensor

WEIGHTS, DECODER, ENCODER = "weights.safetensors", "decoder.safetensors", "encoder.safetensors"
"""Files that the graphs point into."""
TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and torch, in float32, that an export passes with."""

ROUNDED_TOLERANCE = 2.0
"""Largest difference of x0 that an export in FP8 or int8 passes with; 1 is what rounding inputs changes."""

M = TypeVar("M", bound=StreamingModule)


class VerificationError(Exception):
    """The exported graphs do not compute what the model computes."""


@dataclass
class PartsWriter:
    """Writes weights, graphs and engines into the folder of a bundle that is being made."""

    folder: Path
    plan: CachePlan
    decoder: StreamingDecoder | None
    precision: Precision
    target: EngineTarget | None
    verify: bool
    graphs: bool
    """Whether graphs are traced."""
    progress: Callable[[str], None]
    encoder: StreamingEncoder | None = None
    """Of frames that are given."""
    strips: Strips | None = None
    """In which frames are decoded; None: as a whole."""
    records: dict[str, GraphRecord] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    engines: list[EngineRecord] = field(default_factory=list)
    kernels: list[KernelRecord] = field(default_factory=list)
    calibration: CalibrationRecord | None = None
    scales: dict[str, float] = field(default_factory=dict)
    stored: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    """For each file of weights where each tensor lies in it."""

    @cached_property
    def model(self) -> WanModel:
        """The baked model, in float32."""
        return baked_model(self.plan.spec, self.folder / WEIGHTS)

    @cached_property
    def linears(self) -> list[str]:
        """The linear layers in FP8 or int8."""
        return self.precision.linears(weight_shapes(self.plan.spec))

    @cached_property
    def shapes(self) -> StripShapes | None:
        """The shapes of the decoder in strips."""
        if self.strips is None:
            return None
        assert self.decoder is not None
        geometry = self.plan.geometry
        return strip_shapes(self.decoder, self.strips, geometry.latent_height, geometry.latent_width)

    @cached_property
    def torch_bytes(self) -> dict[str, int]:
        """What torch holds while it decodes and encodes, by graph."""
        return streaming_bytes(self.plan.geometry, self.decoder, self.encoder, self.strips)

    def write_weights(self, weights: Mapping[str, Tensor], orders: Sequence[Sequence[int]]) -> None:
        """Write the baked weights and those of the decoder and the encoder."""
        spec, path = self.plan.spec, self.folder / WEIGHTS
        self.stored[WEIGHTS] = bake_weights(weights, spec, orders, path, self.precision, self.progress)
        for module, file in ((self.decoder, DECODER), (self.encoder, ENCODER)):
            if module is None:
                continue
            # Decoders are small, and bfloat16 shows in pixels: on a CPU they stay as they are.
            # torch computes in what it likes best, and the file is small: it gets what there is.
            state, compute = module.state_dict(), self.precision.compute if self.graphs else "float32"
            planned: Planned = {name: (compute, tuple(tensor.shape)) for name, tensor in state.items()}
            self.stored[file] = store_tensors(planned, state.__getitem__, self.folder / file)

    @property
    def engine_names(self) -> list[str]:
        """The graphs that engines are built of."""
        more = {STRIP: self.strips is not None, "encode": self.encoder is not None}
        return [*GRAPHS, *(name for name, there in more.items() if there)]

    def calibrate(self, texts: CalibrationTexts) -> None:
        """Find the scales of the inputs of linear layers in FP8."""
        self.scales, self.calibration = calibrate(self.model, self.plan, self.precision, texts, self.progress)
        if not self.verify:
            del self.model  # nothing needs its memory any more

    def describe(self, name: str) -> None:
        """Record what goes in and out where there is no graph."""
        file = self._weights_of(name)
        # `prompt` and `step` are of one model, and the parts of a decoder of one: each is loaded once.
        stored = self.stored.get(file or "", {}) if name not in ("prompt", STRIP) else {}
        held = sum(tensor.bytes for tensor in stored.values())
        compute = self.precision.compute
        if name == "encode":
            assert self.encoder is not None
            record = encoder_record(self.plan, self.encoder, compute, file, held)
        else:
            sizes = decoder_sizes(self.plan, self.decoder, compute, self.strips)
            record = record_without_graph(name, self.plan, sizes, compute, file, held)
        self.records[name] = replace(record, torch_bytes=self.torch_bytes.get(name))

    def write_graph(self, name: str) -> None:
        """Trace, write and verify a graph."""
        self.progress(f"tracing {name}")
        path, precision = self.folder / f"{name}.onnx", self.precision
        traced = self._trace(name, path, precision)
        record = GraphRecord(
            file=path.name,
            weights=self._weights_of(name),
            inputs=value_records(traced.graph.input),
            outputs=value_records(traced.graph.output),
            torch_bytes=self.torch_bytes.get(name),
        )
        if precision.compute == "float32":  # ONNX Runtime runs the graph
            folded = name not in UNFOLDED
            activations = activation_bytes(traced, shapes_of(name, self.plan), folded=folded)
            weights = weight_bytes(read_graph(path.read_bytes(), str(path)), folded=folded)
            record = replace(record, weight_bytes=weights, activation_bytes=activations)
        self._check(name, path, record)
        self.records[name] = record
        if self.verify:
            self.progress(f"verifying {name}")
            if precision.compute == "float32":
                self._compare(name, path)
            else:
                # ONNX Runtime has no kernels for less on a CPU: the same graph is compared in float32.
                in_float32 = self.folder / f"{name}.float32.onnx"
                self._trace(name, in_float32, replace(precision, compute="float32"))
                self._compare(name, in_float32)
                in_float32.unlink()

    def _check(self, name: str, path: Path, record: GraphRecord) -> None:
        """Raise InputError for a graph that the runtime would refuse: nobody could open the bundle."""
        file = self.folder / record.weights if record.weights else None
        check_graph(
            path.read_bytes(),
            str(path),
            name,
            record,
            self.plan,
            runs=self.precision.compute == "float32",
            weights=file.stat().st_size if file else None,
        )

    def write_engines(self, target: EngineTarget) -> None:
        """Compile the plugin's kernels, and build an engine of every graph for every GPU."""
        if self.plan.choice and not target.aot:
            from forcingkv.prune.kernel_compiler import compile_kernels  # needs Triton, which only this does

            self.progress("compiling kernels")
            head_dim = self.plan.spec.head_dim
            kernels = KERNELS if self.plan.choice.split.is_even else UNEVEN_KERNELS
            compute = self.precision.compute
            sms = kernel_sms(target.sms)
            self.kernels = compile_kernels(self.folder, compute, head_dim, sms, kernels)
        folder = self.folder / "engines"
        folder.mkdir()
        for sm in target.sms:
            for name in self.engine_names:
                self.progress(f"building the engine of {name} for sm_{sm}")
                file = folder / f"{name}-{target.flavour.name}-sm{sm}.engine"
                graph = self.folder / f"{name}.onnx"
                built = build_engine(graph, name, self.plan, target, sm, file, kernels=self.kernels)
                self.engines.append(built)

    def _trace(self, name: str, path: Path, precision: Precision) -> onnx.ModelProto:
        file = self._weights_of(name)
        return write_onnx(
            lambda: self._graph(name, precision),
            path,
            self.stored[file] if file else {},
            file or WEIGHTS,
            tensorrt=precision.compute != "float32",
            single_kernels=self.target is not None and self.target.aot,
            input_scales=self.scales,
            int8_layers=self.linears if precision.linear == "int8" else (),
            folded=name not in UNFOLDED,
        )

    def _weights_of(self, name: str) -> str | None:
        """The file that a graph's weights lie in."""
        file = DECODER if name in DECODING_GRAPHS else {"encode": ENCODER}.get(name, WEIGHTS)
        return file if file in self.stored else None

    def _compare(self, name: str, path: Path) -> None:
        """Compare a graph for ONNX Runtime with torch."""
        graph = self._graph(name)
        if name == "step" and (linear := self.precision.linear):
            exactly = {"fp8": fp8.without_rounding, "int8": int8.without_rounding}[linear]
            rounded = {
                "fp8": partial(fp8.rounded_inputs, self.model, self.scales),
                "int8": partial(int8.rounded_inputs, self.model, self.linears),
            }[linear]
            exact, share = quantized_differences(graph, path, self.plan, exactly, rounded)
            found = {name: (exact, TOLERANCE), f"step.{linear}": (share, ROUNDED_TOLERANCE)}
        else:
            found = {name: (graph_difference(graph, path, self.plan), TOLERANCE)}
        for key, (difference, limit) in found.items():
            if difference > limit:
                raise VerificationError(
                    f"graph {key} differs from torch by {difference:.1e}; expected at most {limit:.0e}."
                    " No bundle was written."
                )
            self.differences[key] = difference

    def _graph(self, name: str, precision: Precision | None = None) -> Graph:
        """The graph with the contents that the bundle has, in float32.

        With a precision (fake tensors are on): with parameters of its dtypes and without contents.
        """
        if name == "encode":
            assert self.encoder is not None
            return encode_graph(self.plan, _emptied(self.encoder, precision))
        if name in DECODING_GRAPHS:
            shapes = self.shapes
            pixels = (precision.compute if precision else "float32") == "float32"
            decoder = _emptied(self.decoder, precision) if self.decoder else None
            if name == "decode":
                return decode_graph(self.plan, decoder, pixels=pixels, strips=self.strips)
            assert decoder is not None
            assert self.strips is not None
            assert shapes is not None
            return decode_strip_graph(self.plan, decoder, self.strips, shapes, pixels=pixels)
        model = self._traced(name, precision) if precision else self.model
        if name == "prompt":
            return prompt_graph(model)
        return recache_graph(model, self.plan) if name == "recache" else step_graph(model, self.plan)

    def _traced(self, name: str, precision: Precision) -> WanModel:
        """The model that a graph is traced with: parameters of a precision's dtypes, without contents."""
        with unset_fake_temporarily(), torch.device("meta"):  # drawing fake numbers would take longer
            model = WanModel(self.plan.spec).eval()
        if name == "prompt":
            model.keep_prompt_part()  # tracing takes time for each parameter, used or not
        empty(model, precision.computed_in)
        return model


def decoder_sizes(
    plan: CachePlan, decoder: StreamingDecoder | None, compute: Dtype, strips: Strips | None
) -> DecoderSizes:
    """What the graphs that decode take from their decoder, where it is in strips or is not."""
    size = plan.geometry.latent_height, plan.geometry.latent_width

    def layouts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
        return {name: Layout(compute, shape) for name, shape in shapes.items()}

    if decoder is None or strips is None:
        return DecoderSizes(layouts(decoder.state_shapes(*size) if decoder else {}))
    found = strip_shapes(decoder, strips, *size)
    return DecoderSizes(layouts(found.whole), strips, layouts(found.state | found.edges), found.features)


def _emptied(module: M, precision: Precision | None) -> M:
    """A decoder or encoder with the contents that it has, or with a precision's dtype and without."""
    if precision is None:
        return module
    with unset_fake_temporarily():  # real tensors cannot be copied while fake ones are on
        module = copy.deepcopy(module)
    empty(module, lambda parameter: torch_dtype(precision.compute))
    return module


def encoder_record(
    plan: CachePlan, encoder: StreamingEncoder, compute: Dtype, weights: str | None, held: int
) -> GraphRecord:
    """What goes into `encode` and comes out, in a bundle for torch; `held` are the bytes of its weights."""
    shapes = encoder.state_shapes(plan.geometry.latent_height, plan.geometry.latent_width)
    carried = {cache: Layout(compute, shape) for cache, shape in shapes.items()}
    ends = as_records(encode_layouts(plan, compute, carried))
    return GraphRecord(None, weights, *ends, weight_bytes=held)


def record_without_graph(
    name: str, plan: CachePlan, decoder: DecoderSizes, compute: Dtype, weights: str | None, held: int
) -> GraphRecord:
    """What goes into `name` and comes out, in a bundle for torch; `held` are the bytes of its weights."""
    return GraphRecord(None, weights, *tensor_records(plan, compute, decoder)[name], weight_bytes=held)
