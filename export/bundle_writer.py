"""Export: from weights and a head map to a bundle that the runtime opens."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

import forcingkv
from forcingkv.export.bake import baked_bytes
from forcingkv.export.bundle_parts import DECODER, ENCODER, WEIGHTS, PartsWriter
from forcingkv.export.engine_builder import (
    check_dtype,
    check_plugin,
    check_profiles,
    decomposed,
    engine_target,
    warnings_of,
)
from forcingkv.export.fp8 import CalibrationTexts
from forcingkv.export.precision import ExportDtype, Target, precision_of
from forcingkv.export.space import check_disk, check_memory_to_calibrate, check_memory_to_verify
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import record_file
from forcingkv.headmaps.folders import check_folder, new_folder
from forcingkv.headmaps.headmap import HeadMap
from forcingkv.models.checkpoint import Weights
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import strips_of
from forcingkv.models.encoders import StreamingEncoder
from forcingkv.models.heads import head_orders
from forcingkv.models.torch_threads import use_threads
from forcingkv.prune.onnx_operators import check_choice
from forcingkv.runtime.bundle import (
    Manifest,
    PlanRecord,
)
from forcingkv.runtime.bundle_files import BUNDLE, HEADMAP, MANIFEST, STATISTICS
from forcingkv.runtime.context import without_encoder
from forcingkv.runtime.graph_records import ALL_GRAPHS, STRIP, check_records
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.rebuild import encoding, encodings
from forcingkv.runtime.kv.statistics import QueryStatistics, required_statistics
from forcingkv.runtime.spec import ENCODED, ModelSpec

NAMES = (
    *(MANIFEST, HEADMAP, STATISTICS, WEIGHTS, DECODER, ENCODER, "engines", "kernels"),
    *(f"{name}.onnx" for name in ALL_GRAPHS),
)
"""What a bundle may have at its top."""


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
    statistics: QueryStatistics | None = None,
    resolution: str | None = None,
    decoder: StreamingDecoder | None = None,
    strips: int | None = None,
    encoder: StreamingEncoder | None = None,
    dtype: ExportDtype | None = None,
    target: Target = "onnx",
    sms: Sequence[int] = (),
    aot: bool = False,
    verify: bool | None = None,
    recache: bool | None = None,
    calibration: CalibrationTexts | None = None,
    origin: Callable[[], str] | None = None,
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
        statistics: of the model's queries; needed where the policy scores tokens by them.
        resolution: "WxH" or a name; None for the model's default. Frames are cropped to even sides that do
            not divide into tokens (`ModelSpec.geometry`).
        decoder: what makes pixels of latents; needed unless the latents are pixels.
        strips: in how many strips it decodes a frame (`runtime/decode_strips.py`); None: chosen by the size.
        encoder: what makes latents of pictures and videos; None: the bundle has no graph `encode`.
        dtype: what the weights are stored as, and what TensorRT computes in; `fp8` for the linear layers
            of the blocks, with bfloat16; `int8` for them, for ONNX Runtime, with the model's default. None:
            the model's default, and bfloat16 for TensorRT.
        target: `onnx` for ONNX Runtime; `torch` for the backend of that name, without graphs; a flavour of
            TensorRT to build engines too.
        sms: compute capabilities to build engines for; none: that of this machine's GPU.
        aot: whether the plugin's kernels are compiled into the engines; for the flavour tensorrt only.
        verify: whether to run every graph in float32 and compare it with torch; needs the memory of
            the model. None: for ONNX Runtime only.
        recache: whether there is a graph for switches of the prompt that encode newest frames anew (recache
            keep-sink and empty-sink); for ONNX Runtime only. None: where that is the model's own way, and the
            policy has it, and where the model encodes newest frames before each chunk.
        calibration: what fp8 is calibrated with, which needs the memory of the model. For fp8 only.
        origin: gives what `Manifest.origin` says, once everything was read.
        progress: called with a line on what is done next.

    Raises:
        InputError: something does not fit; see `build_plan`, `onnx_operators.check_choice`, `precision_of`,
            `engine_builder.engine_target` and `space`.
        VerificationError: a graph differs from torch by more than `TOLERANCE` or `ROUNDED_TOLERANCE`.
        EngineError: TensorRT did not build an engine.
    """
    if spec.context == "recompute" and target not in ("onnx", "torch"):
        raise InputError(
            f"builds no engine of the pass that {spec.name} makes before each chunk",
            where=f"--target {target}",
            expected="--target onnx or torch",
        )
    engines = None if target == "onnx" or target == "torch" else engine_target(target, sms, aot=aot)
    if (sms or aot) and engines is None:
        where = "--aot" if aot else "--sm"
        raise InputError("is for engines only", where=where, expected="--target tensorrt or tensorrt-rtx")
    gpus = engines.sms if engines else ()
    check_out(out)
    precision = precision_of(dtype or ("bfloat16" if engines else spec.dtype), target, gpus, spec.dtype)
    headmap = headmap if policy.needs_headmap else None
    plan = build_plan(spec, spec.geometry(resolution), policy, headmap, statistics)
    statistics = required_statistics(plan)
    if target != "torch":
        check_choice(plan)  # which graphs have to be able to make
    if (decoder is None) != (spec.decoder.kind == "pixels"):
        raise ValueError(f"the decoder of {spec.name} is {spec.decoder.kind}, and {decoder!r} was given")
    in_strips = strips_of(decoder, plan.geometry, strips)
    if encoder and spec.decoder.kind == "pixels":
        raise ValueError(f"the latents of {spec.name} are pixels, and an encoder was given")
    if spec.context_first == "encoded" and encoder is None and spec.decoder.kind != "pixels":
        raise without_encoder(plan, "the export")
    verify = target == "onnx" if verify is None else verify
    if verify and target == "torch":
        raise InputError("compares graphs with torch, and there are none", where="verify")
    if verify:
        check_memory_to_verify(plan, decoder, in_strips, encoder)
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
        check_profiles(plan, engines)
    more = {
        STRIP: in_strips is not None,
        "recache": _has_recache(plan, target, recache),
        "encode": encoder is not None,
    }
    names = [name for name in ALL_GRAPHS if more.get(name, True)]
    check_disk(out, baked_bytes(spec, precision), len(gpus))
    use_threads()
    with new_folder(out, BUNDLE, NAMES) as folder:
        bundle = PartsWriter(
            folder,
            plan,
            decoder,
            precision,
            engines,
            verify,
            target != "torch",
            progress,
            encoder,
            in_strips,
        )
        bundle.write_weights(weights, head_orders(spec, policy, headmap))
        if calibration:
            bundle.calibrate(calibration)
        for name in names:
            bundle.describe(name) if target == "torch" else bundle.write_graph(name)
        check_records(bundle.records, plan, precision.compute, str(out), in_strips)
        if engines:
            bundle.write_engines(engines)
        if headmap:
            headmap.write(folder / HEADMAP)
        if statistics:
            statistics.write(folder / STATISTICS)
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
            origin=origin() if origin else None,
            linear=precision.linear,
            strips=in_strips,
            statistics=statistics.digest if statistics else None,
        )
        (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return manifest


def _has_recache(plan: CachePlan, target: Target, asked: bool | None) -> bool:
    """Whether a bundle has the graph `recache`. Raises InputError where it is asked for and cannot be."""
    where = "--recache-graph"
    if asked and target != "onnx":
        hint = "torch needs none, and for TensorRT no engine is built of it: switch with --recache replay."
        raise InputError("is a graph for ONNX Runtime", where=where, expected="--target onnx", hint=hint)
    if plan.recomputes and asked is False:
        what = f"would leave out the pass that {plan.spec.name} makes before each chunk"
        raise InputError(what, where="--no-recache-graph")
    there = bool(encodings(plan))
    if asked and not there:
        encoding(plan, plan.phases[-1].first_chunk + 1, keep_sink=True)  # says why
        raise InputError(f"has no frames to encode under {plan.policy.name}", where=where)
    own = plan.recomputes or plan.spec.recache in ENCODED
    return target == "onnx" and there and (own if asked is None else asked)
