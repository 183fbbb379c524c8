"""Export: from weights and a head map to a bundle that the runtime opens."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import onnx
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

import forcingkv
from forcingkv.export import fp8, int8
from forcingkv.export.activations import activation_bytes
from forcingkv.export.bake import Planned, bake_weights, baked_bytes, baked_model, store_tensors
from forcingkv.export.engine_builder import (
    EngineTarget,
    build_engine,
    check_dtype,
    check_plugin,
    decomposed,
    engine_target,
    warnings_of,
)
from forcingkv.export.fp8 import CalibrationTexts, calibrate
from forcingkv.export.graphs import Graph, decode_graph, empty, prompt_graph, step_graph
from forcingkv.export.onnx_writer import value_records, write_onnx
from forcingkv.export.precision import ExportDtype, Precision, Target, precision_of, torch_dtype
from forcingkv.export.space import check_disk, check_memory_to_calibrate, check_memory_to_verify
from forcingkv.export.verify import graph_difference, quantized_differences
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import record_file
from forcingkv.headmaps.folders import check_folder, new_folder
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.models.checkpoint import Weights, weight_shapes
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.heads import head_orders
from forcingkv.models.torch_threads import use_threads
from forcingkv.models.wan import WanModel
from forcingkv.prune.launcher import KERNELS, UNEVEN_KERNELS, kernel_sms
from forcingkv.prune.onnx_operators import check_choice
from forcingkv.runtime.bundle import (
    GRAPHS,
    CalibrationRecord,
    GraphRecord,
    Manifest,
    PlanRecord,
    TensorRecord,
    tensor_records,
)
from forcingkv.runtime.bundle_files import BUNDLE, HEADMAP, MANIFEST
from forcingkv.runtime.engines import EngineRecord, KernelRecord
from forcingkv.runtime.graph_check import check_graph
from forcingkv.runtime.graph_file import read_graph
from forcingkv.runtime.graph_memory import weight_bytes
from forcingkv.runtime.graph_records import check_records
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import StoredTensor

WEIGHTS, DECODER = "weights.safetensors", "decoder.safetensors"
"""Files that the graphs point into."""
NAMES = (MANIFEST, HEADMAP, WEIGHTS, DECODER, "engines", "kernels", *(f"{name}.onnx" for name in GRAPHS))
"""What a bundle may have at its top."""

TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and torch, in float32, that an export passes with."""

ROUNDED_TOLERANCE = 2.0
"""Largest difference of x0 that an export in FP8 or int8 passes with; 1 is what rounding inputs changes."""


class VerificationError(Exception):
    """The exported graphs do not compute what the model computes."""


def check_out(out: Path) -> list[str]:
    """What is in the folder of a bundle and is no part of one: it stays when the bundle is written anew.

    Raises InputError unless a bundle can be written there now. Nothing is left of the trial.
    """
    return check_folder(out, BUNDLE, NAMES)


def export_bundle(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    policy: Policy,
    out: Path,
    *,
    headmap: HeadMap | None = None,
    resolution: str | None = None,
    decoder: StreamingDecoder | None = None,
    dtype: ExportDtype | None = None,
    target: Target = "onnx",
    sms: Sequence[int] = (),
    aot: bool = False,
    verify: bool | None = None,
    calibration: CalibrationTexts | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Bake the head map into the weights, trace the graphs, verify them, and write the bundle.

    Args:
        spec: the model.
        weights: its tensors by Wan name, heads in their original order; read one at a time.
        policy: what each head group sees.
        out: the bundle's folder; written whole or not at all. Of a bundle that is there its own files are
            replaced, and others stay (`check_out` names them).
        headmap: needed where the policy tells heads apart.
        resolution: "WxH" or a name; None for the model's default. Frames are cropped to even sides that do
            not divide into tokens (`ModelSpec.geometry`).
        decoder: what makes pixels of latents; needed unless the latents are pixels.
        dtype: what the weights are stored as, and what TensorRT computes in; `fp8` for the linear layers
            of the blocks, with bfloat16; `int8` for them, for ONNX Runtime, with the model's default. None:
            the model's default, and bfloat16 for TensorRT.
        target: `onnx` for ONNX Runtime; `torch` for the backend of that name, without graphs; a flavour of
            TensorRT to build engines too.
        sms: compute capabilities to build engines for; none: that of this machine's GPU.
        aot: whether the plugin's kernels are compiled into the engines; for the flavour tensorrt only.
        verify: whether to run every graph in float32 and compare it with torch; needs the memory of
            the model. None: for ONNX Runtime only.
        calibration: what fp8 is calibrated with, which needs the memory of the model. For fp8 only.
        progress: called with a line on what is done next.

    Raises:
        InputError: something does not fit; see `build_plan`, `onnx_operators.check_choice`, `precision_of`,
            `engine_builder.engine_target` and `space`.
        VerificationError: a graph differs from torch by more than `TOLERANCE` or `ROUNDED_TOLERANCE`.
        EngineError: TensorRT did not build an engine.
    """
    engines = None if target == "onnx" or target == "torch" else engine_target(target, sms, aot=aot)
    if (sms or aot) and engines is None:
        where = "--aot" if aot else "--sm"
        raise InputError("is for engines only", where=where, expected="--target tensorrt or tensorrt-rtx")
    gpus = engines.sms if engines else ()
    check_out(out)
    precision = precision_of(dtype or ("bfloat16" if engines else spec.dtype), target, gpus, spec.dtype)
    headmap = headmap if policy.needs_headmap else None
    plan = build_plan(spec, spec.geometry(resolution), policy, headmap)
    if target != "torch":
        check_choice(plan)  # which graphs have to be able to make
    if (decoder is None) != (spec.decoder.kind == "pixels"):
        raise ValueError(f"the decoder of {spec.name} is {spec.decoder.kind}, and {decoder!r} was given")
    verify = target == "onnx" if verify is None else verify
    if verify and target == "torch":
        raise InputError("compares graphs with torch, and there are none", where="verify")
    if verify:
        check_memory_to_verify(plan, decoder)
    if calibration and precision.linear != "fp8":
        raise InputError("is for fp8 only", where="calibration", expected="dtype fp8")
    if precision.linear == "fp8" and not calibration:
        hint = "Pass them as `calibration` (on the command line --calibration)."
        raise InputError("needs texts to calibrate it with", where="dtype fp8", hint=hint)
    if calibration:
        check_memory_to_calibrate(plan)
    if engines:
        check_dtype(engines, precision.compute)
        check_plugin(plan, engines)
    check_disk(out, baked_bytes(spec, precision), len(gpus))
    use_threads()
    with new_folder(out, BUNDLE, NAMES) as folder:
        bundle = _Writer(folder, plan, decoder, precision, engines, verify, target != "torch", progress)
        bundle.write_weights(weights, head_orders(spec, policy, headmap))
        if calibration:
            bundle.calibrate(calibration)
        for name in GRAPHS:
            bundle.describe(name) if target == "torch" else bundle.write_graph(name)
        check_records(bundle.records, plan, precision.compute, str(out))
        if engines:
            bundle.write_engines(engines)
        if headmap:
            headmap.write(folder / HEADMAP)
        progress("computing digests")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = Manifest(
            schema="forcingkv.bundle/1",
            model=spec,
            resolution=(plan.geometry.width, plan.geometry.height),
            policy=policy,
            plan=PlanRecord.of(plan, precision.compute),
            graphs=bundle.records,
            files={path.relative_to(folder).as_posix(): record_file(path) for path in files},
            versions={
                "forcingkv": forcingkv.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "onnx": onnx.__version__,
            },
            headmap=headmap.digest if headmap else None,
            verification=bundle.differences,
            compute=precision.compute,
            engines=tuple(bundle.engines),
            kernels=tuple(bundle.kernels),
            warnings=(*warnings_of(plan, precision.compute), *decomposed(bundle.engines)),
            calibration=bundle.calibration,
            taken=(weights.taken or None) if isinstance(weights, Weights) else None,
            loras=(weights.loras or None) if isinstance(weights, Weights) else None,
            crop=plan.geometry.crop,
            linear=precision.linear,
        )
        (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return manifest


@dataclass
class _Writer:
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

    def write_weights(self, weights: Mapping[str, Tensor], orders: Sequence[Sequence[int]]) -> None:
        """Write the baked weights and those of the decoder."""
        spec, path = self.plan.spec, self.folder / WEIGHTS
        self.stored[WEIGHTS] = bake_weights(weights, spec, orders, path, self.precision, self.progress)
        if self.decoder:
            # Decoders are small, and bfloat16 shows in pixels: on a CPU they stay as they are.
            # torch computes in what it likes best, and the file is small: it gets what there is.
            state, compute = self.decoder.state_dict(), self.precision.compute if self.graphs else "float32"
            planned: Planned = {name: (compute, tuple(tensor.shape)) for name, tensor in state.items()}
            self.stored[DECODER] = store_tensors(planned, state.__getitem__, self.folder / DECODER)

    def calibrate(self, texts: CalibrationTexts) -> None:
        """Find the scales of the inputs of linear layers in FP8."""
        self.scales, self.calibration = calibrate(self.model, self.plan, self.precision, texts, self.progress)
        if not self.verify:
            del self.model  # nothing needs its memory any more

    def describe(self, name: str) -> None:
        """Record what goes in and out where there is no graph."""
        size, compute = (
            (self.plan.geometry.latent_height, self.plan.geometry.latent_width),
            self.precision.compute,
        )
        caches = self.decoder.state_shapes(*size) if self.decoder else {}
        carried = {cache: TensorRecord(compute, shape) for cache, shape in caches.items()}
        file = self._weights_of(name)
        # `prompt` and `step` are of one model, which is loaded once.
        held = (
            0
            if name == "prompt"
            else sum(tensor.bytes for tensor in self.stored.get(file or "", {}).values())
        )
        layouts = tensor_records(self.plan, compute, carried)[name]
        self.records[name] = GraphRecord(None, file, *layouts, weight_bytes=held)

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
        )
        if precision.compute == "float32":  # ONNX Runtime runs the graph
            shapes = [self.plan.phase_shapes(phase) for phase in self.plan.phases]
            activations = activation_bytes(traced, shapes if name == "step" else [{}])
            weights = weight_bytes(read_graph(path.read_bytes(), str(path)))
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
            for name in GRAPHS:
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
        )

    def _weights_of(self, name: str) -> str | None:
        """The file that a graph's weights lie in."""
        file = DECODER if name == "decode" else WEIGHTS
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
        if name == "decode":
            decoder, kind = self.decoder, precision.compute if precision else "float32"
            if decoder and precision:
                with unset_fake_temporarily():  # real tensors cannot be copied while fake ones are on
                    decoder = copy.deepcopy(decoder)
                empty(decoder, lambda parameter: torch_dtype(kind))
            return decode_graph(self.plan, decoder, pixels=kind == "float32")
        model = self._traced(name, precision) if precision else self.model
        return prompt_graph(model) if name == "prompt" else step_graph(model, self.plan)

    def _traced(self, name: str, precision: Precision) -> WanModel:
        """The model that a graph is traced with: parameters of a precision's dtypes, without contents."""
        with unset_fake_temporarily(), torch.device("meta"):  # drawing fake numbers would take longer
            model = WanModel(self.plan.spec).eval()
        if name == "prompt":
            model.keep_prompt_part()  # tracing takes time for each parameter, used or not
        empty(model, precision.computed_in)
        return model
