"""`forcingkv export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from forcingkv.commands.console import console, emit, need
from forcingkv.headmaps import HeadMap
from forcingkv.headmaps.errors import InputError

__all__ = ["export"]

TARGETS = ("onnx",)


def export(
    model: Annotated[str, typer.Option(help="Preset or spec file (.toml).")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    headmap: Annotated[Path | None, typer.Option(help="Head map to bake in.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; default: those shipped.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="No checkpoint.")] = False,
    resolution: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT or a name.")] = None,
    policy: Annotated[str, typer.Option(help="Cache policy.")] = "forcing-kv",
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
    from forcingkv.models import checkpoint as weights_of
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.policies import load_policy

    spec, chosen = load_spec(model), load_policy(policy)
    given = HeadMap.read(headmap) if headmap else None
    read, draw = weights_of.load_weights, weights_of.random_weights
    weights = draw(spec) if random_weights else read(spec, checkpoint)
    try:
        with console.status("exporting") as status:
            manifest = export_bundle(
                spec, weights, chosen, out, headmap=given, resolution=resolution, say=status.update
            )
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
    worst = max(manifest.verification.values())
    print(f"verified against torch: largest difference {worst:.1e}")
