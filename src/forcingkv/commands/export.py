"""`forcingkv export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from forcingkv.commands.baked import heads_to_bake, random_statistics, statistics_to_bake
from forcingkv.commands.console import console, default_prompts, emit, need, say
from forcingkv.commands.models import (
    CacheFilledBy,
    Checkpoint,
    Key,
    Layers,
    Loras,
    Model,
    NoPresetLora,
    RandomWeights,
    Resolution,
    check_layers,
    text_inputs,
    weights_for,
    with_context,
)
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.prompts import read_prompts
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import read_embeds

if TYPE_CHECKING:
    from forcingkv.export.fp8 import CalibrationTexts


PROMPTS = 4
"""How many of the prompts that ship with a model fp8 is calibrated with."""


def export(
    model: Model,
    out: Annotated[Path, Option(help="Folder of the bundle.")],
    headmap: Annotated[Path | None, Option(help="Head map to bake in.")] = None,
    statistics: Annotated[
        Path | None,
        Option(help="Statistics of the model's queries (analyze queries), for policies that score by them."),
    ] = None,
    checkpoint: Checkpoint = None,
    key: Key = None,
    lora: Loras = None,
    no_preset_lora: NoPresetLora = False,
    random_weights: RandomWeights = False,
    layers: Layers = None,
    resolution: Resolution = None,
    policy: Annotated[str, Option(help="Cache policy.")] = "forcing-kv",
    context: CacheFilledBy = None,
    decoder: Annotated[str | None, Option(help="wan-vae, taehv or lighttae; default: the model's.")] = None,
    vae: Annotated[Path | None, Option(help="Weights of the decoder: a file or a folder.")] = None,
    decode_strips: Annotated[
        int | None,
        Option(help="In how many strips wan-vae decodes a frame; default: by its size, 1 up to 480p."),
    ] = None,
    encoder: Annotated[
        str | None,
        Option(
            help="Make latents of pictures and videos too, with this VAE, a file or a folder; `vae`: that of"
            " --vae; `random`: random weights."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="What weights are stored as, and torch and TensorRT compute in: float32, bfloat16, float16,"
            " fp8 (linear layers in FP8, all else in bfloat16), int8 (linear layers in int8, with --target"
            " onnx); default: the model's, for TensorRT bfloat16."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        Option(
            help="What to calibrate fp8 with: text embeddings (forcingkv encode), or for the demo model"
            " prompts, one a line; default: prompts that ship with the model."
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        Option(
            "--verify/--no-verify",
            help="Compare every graph with torch, in float32; default: only with --target onnx.",
        ),
    ] = None,
    recache_graph: Annotated[
        bool | None,
        Option(
            "--recache-graph/--no-recache-graph",
            help="One more graph, with which ONNX Runtime switches prompts by keep-sink and empty-sink;"
            " default: where that is the model's way.",
        ),
    ] = None,
    target: Annotated[
        str, Option(help="onnx; torch, in seconds, without graphs; tensorrt-rtx or tensorrt for engines too.")
    ] = "onnx",
    sm: Annotated[
        list[int] | None,
        Option(help="GPU to build for, such as 89 for 8.9; may be given again. Default: the one here."),
    ] = None,
    aot: Annotated[bool, Option("--aot", help="Compile the plugin into the engines: tensorrt only.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Bake a head map into a model and write a bundle that the runtime opens.

    Example: forcingkv export --model demo --headmap headmap.json --target onnx --out bundle
    """
    need("export", "torch", "onnx", "onnxscript")
    from forcingkv.export import EngineError, VerificationError, export_bundle
    from forcingkv.export.bundle_writer import check_out
    from forcingkv.export.precision import ExportDtype, Target
    from forcingkv.headmaps.fields import to_data
    from forcingkv.measure.bench.cases import typical_layers
    from forcingkv.models.decoders import decoder_for
    from forcingkv.models.encoders import encoder_for
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.kv.policies import load_policy

    wanted = one_of(Target, target, "target")
    spec, chosen = with_context(load_spec(model), context), load_policy(policy)
    given = read_headmap(headmap) if headmap else None
    of_queries = statistics_to_bake(chosen, statistics)
    if given and not chosen.needs_headmap:
        say(f"note: the policy {chosen.name} treats all heads alike, and uses no head map", error=True)
    check_layers(layers, random_weights)
    if random_weights and given is None:
        given = heads_to_bake(spec, chosen, None, random=True)
    if layers:
        spec, chosen, given = typical_layers(spec, chosen, given if chosen.needs_headmap else None, layers)
    of_queries = of_queries or (random_statistics(spec, chosen) if random_weights else None)
    precision = one_of(ExportDtype, dtype, "dtype") if dtype else None
    if kept := check_out(out):
        names = ", ".join(kept[:5]) + (f" and {len(kept) - 5} more" if len(kept) > 5 else "")
        say(f"note: {out} holds what is no part of its bundle, and stays: {names}", error=True)
    if calibration and precision != "fp8":
        raise InputError("is for fp8 only", where="--calibration", expected="--dtype fp8")
    texts = texts_for(spec, calibration, random_weights) if precision == "fp8" else None
    encoded_by = _encoder_file(encoder, vae) if encoder else None
    weights = weights_for(spec, checkpoint, key, lora, no_preset_lora, random_weights)
    spec, pixels = decoder_for(spec, decoder, vae, random=random_weights)
    frames = encoder_for(spec, encoded_by) if encoder else None
    try:
        with console.status("exporting") as status:
            manifest = export_bundle(
                spec,
                weights,
                chosen,
                out,
                headmap=given,
                statistics=of_queries,
                resolution=resolution,
                decoder=pixels,
                strips=decode_strips,
                encoder=frames,
                dtype=precision,
                target=wanted,
                sms=sm or (),
                aot=aot,
                verify=verify,
                recache=recache_graph,
                calibration=texts,
                progress=status.update,
            )
    except (VerificationError, EngineError) as error:
        say(*f"error: {error}".splitlines(), error=True)
        raise typer.Exit(1) from error
    if as_json:
        emit(to_data(manifest))
        return
    size = sum(record.bytes for record in manifest.files.values())
    say(f"{out}: {spec.name}, policy {chosen.name}, {size / 1e6:.1f} MB")
    say(
        f"KV cache {manifest.plan.kv_bytes / 1e6:.2f} MB, phases at chunk "
        + ", ".join(str(phase["first_chunk"]) for phase in manifest.plan.phases)
    )
    if manifest.crop:
        computed, shown = ("{}x{}".format(*size) for size in (manifest.resolution, manifest.crop))
        say(f"computed at {computed}; the last columns and rows are cut off: frames are {shown}")
    if spec.schedule.context == "last":
        say("the last denoising pass of a chunk fills the cache: there is no clean pass")
    if manifest.strips:
        say(f"{spec.decoder.kind} decodes a frame {manifest.strips.described}")
    if record := manifest.calibration:
        width, height = record.resolution
        of = f"{len(record.prompts)} {record.texts}" if record.prompts else "random embeddings: no real texts"
        say(f"FP8 calibrated with {record.chunks} chunks at {width}x{height} for {of}")
    if manifest.verification:
        exact = {name: found for name, found in manifest.verification.items() if not name.startswith("step.")}
        say(f"verified against torch: largest difference {max(exact.values()):.1e}")
    elif wanted != "torch":
        say("not verified against torch: add --verify to do that")
    for engine in manifest.engines:
        say(
            f"engine {engine.graph} for sm_{engine.sm}: {manifest.files[engine.file].bytes / 1e6:.1f} MB,"
            f" activations {engine.activation_bytes / 1e6:.1f} MB, built in {engine.seconds:.0f} s"
            f" with {engine.peak_bytes / 1e9:.1f} GB"
            + (f", {len(engine.starts)} profiles for the phases {engine.sharing}" if engine.sharing else "")
        )
    for warning in manifest.warnings:
        say(f"warning: {warning}", error=True)


def _encoder_file(encoder: str, vae: Path | None) -> Path | None:
    """The file of the VAE that `--encoder` names; None: random weights."""
    if encoder == "random":
        return None
    if encoder != "vae":
        return Path(encoder)
    if vae is None:
        expected = "--vae with it, a file of the VAE, or random"
        raise InputError(
            "means the file of --vae, which is not given", where="--encoder vae", expected=expected
        )
    return vae


def texts_for(spec: ModelSpec, file: Path | None, random: bool) -> CalibrationTexts:
    """What to calibrate with. Raises InputError where nothing is given and no prompts ship with the model."""
    from forcingkv.export.fp8 import CalibrationTexts, random_texts

    if spec.text.kind == "words" and (file is None or file.suffix != ".safetensors"):
        if file is None:
            prompts = default_prompts(spec.name)[:PROMPTS]
            return CalibrationTexts("prompts", tuple(prompts), tuple(text_inputs(spec, prompts, None)))
        lines = read_prompts(file)
        texts = tuple(line.text for line in lines)
        return CalibrationTexts("prompts", texts, tuple(text_inputs(spec, lines, None)))
    if file:
        return CalibrationTexts("embeddings", read_embeds(file).prompts, tuple(text_inputs(spec, None, file)))
    if random:
        return random_texts(spec)
    raise InputError(
        f"needs texts to calibrate {spec.name} with, and none ship with it",
        where="--dtype fp8",
        expected="--calibration FILE with text embeddings",
        hint="Make the file with: forcingkv encode --prompts prompts.txt --out embeds.safetensors",
    )
