"""`forcingkv export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from forcingkv.commands.console import console, emit, need
from forcingkv.commands.models import (
    Checkpoint,
    Key,
    Lora,
    Model,
    RandomWeights,
    Resolution,
    weights_for,
)
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.spec import Dtype

__all__ = ["export"]



def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    headmap: Annotated[Path | None, typer.Option(help="Head map to bake in.")] = None,
    checkpoint: Checkpoint = None,
    key: Key = None,
    lora: Lora = None,
    random_weights: RandomWeights = False,
    resolution: Resolution = None,
    policy: Annotated[str, typer.Option(help="Cache policy.")] = "forcing-kv",
    decoder: Annotated[str | None, typer.Option(help="wan-vae or taehv; default: the model's.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Weights of the decoder: a file or a folder.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What weights are stored as and TensorRT computes in: float32, bfloat16 or float16;"
            " default: the model's, bfloat16 for TensorRT."
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Run every graph against torch in float32; default: for onnx."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="onnx, or onnx and engines: tensorrt-rtx, tensorrt.")
    ] = "onnx",
    sm: Annotated[
        list[int] | None,
        typer.Option(help="GPU to build for, such as 89 for 8.9; may be given several times."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Bake a head map into a model and write a bundle that the runtime opens.

    Example: forcingkv export --model demo --headmap headmap.json --target onnx --out bundle
    """
    need("export", "torch", "onnx", "onnxscript")
    from forcingkv.export import EngineError, VerificationError, export_bundle
    from forcingkv.export.precision import Target
    from forcingkv.headmaps.fields import to_data
    from forcingkv.models.decoders.choose import decoder_for
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.policies import load_policy

    wanted = one_of(Target, target, "target")
    spec, chosen = load_spec(model), load_policy(policy)
    given = read_headmap(headmap) if headmap else None
    stored_as = one_of(Dtype, dtype, "dtype") if dtype else None
    weights = weights_for(spec, checkpoint, key, lora, random_weights)
    spec, pixels = decoder_for(spec, decoder, vae, random=random_weights)
    try:
        with console.status("exporting") as status:
            manifest = export_bundle(
                spec, weights, chosen, out, headmap=given, resolution=resolution, decoder=pixels,
                dtype=stored_as, target=wanted, sms=sm or (), verify=verify, say=status.update,
            )  # fmt: skip
    except (VerificationError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    if as_json:
        emit(to_data(manifest))
        return
    size = sum(record.bytes for record in manifest.files.values())
    print(f"{out}: {spec.name}, policy {chosen.name}, {size / 1e6:.1f} MB")
    print(f"KV cache {manifest.plan.kv_bytes / 1e6:.2f} MB, phases at chunk "
          + ", ".join(str(phase["first_chunk"]) for phase in manifest.plan.phases))  # fmt: skip
    if manifest.verification:
        print(f"verified against torch: largest difference {max(manifest.verification.values()):.1e}")
    else:
        print("not verified against torch (--verify does)")
    for engine in manifest.engines:
        print(
            f"engine {engine.graph} for sm_{engine.sm}: {manifest.files[engine.file].bytes / 1e6:.1f} MB,"
            f" activations {engine.activation_bytes / 1e6:.1f} MB, built in {engine.seconds:.0f} s"
            f" with {engine.peak_bytes / 1e9:.1f} GB"
        )
    for warning in manifest.warnings:
        print(f"warning: {warning}", file=sys.stderr)
