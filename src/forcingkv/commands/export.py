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
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.spec import Dtype

__all__ = ["export"]

TARGETS = ("onnx",)


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
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the model's.")] = None,
    verify: Annotated[bool, typer.Option(help="Run every graph against torch.")] = True,
    target: Annotated[str, typer.Option(help="What to build: onnx.")] = "onnx",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Bake a head map into a model and write a bundle that the runtime opens.

    Example: forcingkv export --model demo --headmap headmap.json --target onnx --out bundle
    """
    if target not in TARGETS:
        raise InputError(f"{target!r}", where="target", expected=f"one of {', '.join(TARGETS)}")
    need("export", "torch", "onnx", "onnxscript")
    from forcingkv.export import VerificationError, export_bundle
    from forcingkv.headmaps.fields import to_data
    from forcingkv.models.decoders.choose import decoder_for
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.policies import load_policy

    spec, chosen = load_spec(model), load_policy(policy)
    given = read_headmap(headmap) if headmap else None
    stored_as = one_of(Dtype, dtype, "dtype") if dtype else None
    weights = weights_for(spec, checkpoint, key, lora, random_weights)
    spec, pixels = decoder_for(spec, decoder, vae, random=random_weights)
    try:
        with console.status("exporting") as status:
            manifest = export_bundle(
                spec, weights, chosen, out, headmap=given, resolution=resolution, decoder=pixels,
                dtype=stored_as, verify=verify, say=status.update,
            )  # fmt: skip
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    if as_json:
        emit(to_data(manifest))
        return
    size = sum(record.bytes for record in manifest.files.values())
    print(f"{out}: {spec.name}, policy {chosen.name}, {size / 1e6:.1f} MB")
    print(f"KV cache {manifest.plan.kv_bytes / 1e6:.2f} MB, phases at chunk "
          + ", ".join(str(phase["first_chunk"]) for phase in manifest.plan.phases))  # fmt: skip
    if verify:
        print(f"verified against torch: largest difference {max(manifest.verification.values()):.1e}")
    else:
        print("not verified against torch (--no-verify)")
