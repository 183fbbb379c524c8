"""`forcingkv analyze`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from forcingkv.commands.console import console, emit, need, progress, read_prompts
from forcingkv.commands.models import (
    Checkpoint,
    Key,
    Lora,
    Model,
    RandomWeights,
    Resolution,
    text_inputs,
    weights_for,
)

__all__ = ["app"]

app = typer.Typer(help="Record attention statistics and label heads.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Record attention statistics and label heads."""


@app.command()
def heads(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for stats/, headmap.json and report.html.")],
    checkpoint: Checkpoint = None,
    key: Key = None,
    lora: Lora = None,
    random_weights: RandomWeights = False,
    resolution: Resolution = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    embeds: Annotated[Path | None, typer.Option(help="Text embeddings that `encode` wrote.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Videos to measure.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the first video.")] = 0,
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks a video.")] = None,
    rule: Annotated[str, typer.Option(help="auto, threshold, quota, clusters or dummy.")] = "auto",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Cut of the rule threshold.")] = 0.8,
    static_per_layer: Annotated[int | None, typer.Option(help="Heads of the rule quota.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure every head over samples, chunks and steps, and write a head map.

    Example: forcingkv analyze heads --model demo --samples 8 --out runs/demo-heads
    """
    need("analyze", "torch", "polars", "sklearn", "seaborn")
    from forcingkv.analyze import analyze_heads
    from forcingkv.analyze.labels import rule_name
    from forcingkv.models.presets import load_spec

    spec = load_spec(model)
    chosen = rule_name(rule)
    asked = read_prompts(prompts) if prompts else None
    texts = text_inputs(spec, asked, embeds)
    weights = weights_for(spec, checkpoint, key, lora, random_weights)
    with progress() as shown:
        task = shown.add_task("measuring samples", total=samples)
        headmap = analyze_heads(
            spec, weights, texts, out,
            samples=samples, seed=seed, chunks=chunks, rule=chosen, alpha=alpha,
            static_per_layer=static_per_layer, resolution=resolution, command=["forcingkv", *sys.argv[1:]],
            say=lambda sample, chunk: shown.update(task, completed=sample),
        )  # fmt: skip
        shown.update(task, completed=samples)
    if as_json:
        emit({"out": str(out), "headmap": headmap.to_json(), "digest": headmap.digest})
        return
    counts = ", ".join(f"{n} {label}" for label, n in headmap.counts().items())
    cut = "" if headmap.rule.alpha is None else f", cut {headmap.rule.alpha}"
    print(f"{counts} heads by {headmap.rule.name}{cut}")
    if headmap.rule.reason:
        print(f"why: {headmap.rule.reason}")
    console.print(f"written: {out}/headmap.json, {out}/report.html, {out}/stats")
