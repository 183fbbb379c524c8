"""`forcingkv analyze`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from forcingkv.commands.compare_maps import compare
from forcingkv.commands.console import AsJson, console, emit, need, progress_bar, read_prompts
from forcingkv.commands.headmap import print_map
from forcingkv.commands.labelling import NO_LABEL_OPTIONS, LabelOptions, takes_label_options
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
from forcingkv.headmaps import read_headmap
from forcingkv.headmaps.fields import one_of

if TYPE_CHECKING:
    from forcingkv.analyze import Analysis


app = typer.Typer(help="Record attention statistics, label heads, judge and compare.", no_args_is_help=True)
app.command("compare")(compare)

LEVEL_STYLES = {"safe": "green", "care": "yellow", "unsafe": "red", "unknown": "magenta"}


@app.callback()
def _group() -> None:
    """Record attention statistics, label heads, judge and compare."""


@app.command()
@takes_label_options
def heads(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for stats/, headmap.json, stability.json, report.html.")],
    checkpoint: Checkpoint = None,
    key: Key = None,
    lora: Lora = None,
    random_weights: RandomWeights = False,
    resolution: Resolution = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    embeds: Annotated[Path | None, typer.Option(help="Text embeddings that `encode` wrote.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Videos to measure; more may be added later.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first video.")] = 0,
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks a video.")] = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Query rows measured of each pass and layer; 0: all, exactly.")
    ] = 512,
    policy: Annotated[str, typer.Option(help="Policy to generate under.")] = "full",
    headmap: Annotated[Path | None, typer.Option(help="Head map, for policies that need one.")] = None,
    labels: LabelOptions = NO_LABEL_OPTIONS,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="What to compute in: float32 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Spread samples: local, or a Ray cluster's address.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers; default: all there is room for.")
    ] = None,
    stats: Annotated[
        str | None, typer.Option(help="Place for the statistics: folder or fsspec URL; default: OUT/stats.")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Forget what was recorded before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure every head over samples, steps and chunks; write a head map and how far to trust it.

    What is recorded is kept: interrupted, the same command goes on; with more --samples it adds to them.

    Example: forcingkv analyze heads --model demo --samples 16 --out runs/demo-heads
    """
    need("analyze", "torch", "polars", "sklearn", "seaborn")
    from forcingkv.analyze import Job, analyze_heads
    from forcingkv.analyze.recording import RecordedDtype
    from forcingkv.analyze.run import choose_device
    from forcingkv.models.presets import load_spec

    spec = load_spec(model)
    asked = labels.labelling(spec.geometry(resolution))
    texts = text_inputs(spec, read_prompts(prompts) if prompts else None, embeds)
    job = Job(
        spec=spec,
        weights=weights_for(spec, checkpoint, key, lora, random_weights),
        texts=texts,
        seed=seed,
        chunks=chunks,
        policy=policy,
        headmap=read_headmap(headmap) if headmap else None,
        resolution=resolution,
        rows=rows or None,
        device=choose_device(device),
        dtype=one_of(RecordedDtype, dtype, "dtype"),
        threads=threads,
    )
    length = job.recording.chunks
    with progress_bar() as shown:
        task = shown.add_task("measuring (chunks)", total=samples * length)
        analysis = analyze_heads(
            job,
            out,
            samples=samples,
            labelling=asked,
            stats=stats,
            restart=restart,
            cluster=ray,
            workers=workers,
            command=["forcingkv", *sys.argv[1:]],
            progress=lambda done, chunk: shown.update(task, completed=done * length + chunk),
        )
    _show(analysis, out, as_json)


@app.command()
@takes_label_options
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `analyze heads` wrote.")],
    labels: LabelOptions = NO_LABEL_OPTIONS,
    stats: Annotated[str | None, typer.Option(help="Place of the statistics; default: FOLDER/stats.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: FOLDER.")] = None,
    as_json: AsJson = False,
) -> None:
    """Label and judge recorded statistics again, by any rule, and write head map and report anew.

    Example: forcingkv analyze report runs/demo-heads --rule quota --static-per-layer 2
    """
    need("analyze", "torch", "polars", "sklearn", "seaborn")
    from forcingkv.analyze import analyze_statistics, write_analysis
    from forcingkv.analyze.storage import read_statistics

    place = stats or str(folder / "stats")
    asked = labels.labelling(read_statistics(place).recording.geometry)
    with console.status("labelling, judging, drawing"):
        analysis = analyze_statistics(place, asked)
        write_analysis(analysis, out or folder, ["forcingkv", *sys.argv[1:]])
    _show(analysis, out or folder, as_json)


def _show(analysis: Analysis, out: Path, as_json: bool) -> None:
    """Print what was found: the verdict, the map, and the figures behind it."""
    from forcingkv.analyze.analysis import summary_json, summary_lines

    headmap = analysis.headmap
    if as_json:
        emit(
            {
                "out": str(out),
                "headmap": headmap.to_json(),
                "digest": headmap.digest,
                "stability": summary_json(analysis),
            }
        )
        return
    screen = Console(highlight=False)
    style = LEVEL_STYLES[analysis.verdict.level]
    screen.print(
        Panel("\n".join(analysis.verdict.sentences), title=analysis.verdict.level, border_style=style)
    )
    print_map(headmap, screen)
    table = Table.grid(padding=(0, 2))
    for name, value in summary_lines(analysis):
        table.add_row(name, value)
    screen.print(table)
    console.print(f"written: {out}/headmap.json, {out}/stability.json, {out}/report.html")
