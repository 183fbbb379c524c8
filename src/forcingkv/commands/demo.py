"""`forcingkv demo`: the whole way on the model that ships: analyze -> head map -> export -> generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from forcingkv.commands.console import console, default_prompts, emit, need, progress_bar
from forcingkv.headmaps import DYNAMIC, STATIC

MODEL = "demo"
POLICIES = ("full", "window", "dummy-forcing", "forcing-kv")
READ_CHUNK = 5
"""Chunk index whose digits are read."""
SHOWN = 4
"""Prompts shown in the video."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo-out"),
    samples: Annotated[int, typer.Option(min=1, help="Videos to measure heads on.")] = 6,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to compare policies on.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Analyze the shipped model, export it with every policy, generate, and compare.

    Example: forcingkv demo --json
    """
    need("analyze", "torch", "polars", "sklearn", "seaborn")
    need("export", "onnx", "onnxscript")
    need("video", "av")
    from forcingkv.analyze import Job, Labelling, analyze_heads, analyze_statistics
    from forcingkv.analyze.report.pictures import headmap_picture
    from forcingkv.commands.compare import compare_policies, results
    from forcingkv.commands.models import text_inputs
    from forcingkv.commands.pictures import write_sheet
    from forcingkv.export import export_bundle
    from forcingkv.models.checkpoint import load_weights
    from forcingkv.models.demo.data import moves_of
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime import Session
    from forcingkv.runtime.policies import load_policy

    spec = load_spec(MODEL)
    weights = load_weights(spec)
    texts = default_prompts(MODEL)
    moves = [moves_of(texts[i % len(texts)]) for i in range(prompts)]
    with progress_bar() as shown:
        task = shown.add_task("1/3 measuring heads (samples)", total=samples)
        job = Job(spec, weights, text_inputs(spec, texts[::-1], None), seed, threads=threads)
        analysis = analyze_heads(
            job,
            out / "analysis",
            samples=samples,
            restart=True,
            command=["forcingkv", "demo"],
            progress=lambda done, _: shown.update(task, completed=done),
        )
        headmap = analysis.headmap
        dummies = analyze_statistics(out / "analysis" / "stats", Labelling(rule="dummy")).headmap
        maps = {"dummy-forcing": dummies, "forcing-kv": headmap}
        task = shown.add_task("2/3 exporting (bundles)", total=len(POLICIES))
        for number, name in enumerate(POLICIES):
            export_bundle(spec, weights, load_policy(name), out / "bundles" / name, headmap=maps.get(name))
            shown.update(task, completed=number + 1)
        task = shown.add_task("3/3 generating (prompts)", total=prompts)
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(Session.open(out / "bundles" / name, threads=threads))
                for name in POLICIES
            }
            chunks = spec.attended_frames // spec.frames_per_chunk
            runs = compare_policies(
                sessions, moves, chunks, seed, lambda done: shown.update(task, completed=done)
            )
            rows = results(runs, sessions, moves, READ_CHUNK)
    (out / "headmap.png").write_bytes(headmap_picture(headmap))
    videos = {name: run.videos for name, run in runs.items()}
    _write_video(videos, out / "policies.mp4", spec.fps)
    write_sheet(videos, texts[: min(SHOWN, prompts)], out / "policies.png")
    if as_json:
        counted = {STATIC: 0, DYNAMIC: 0} | headmap.counts()
        emit({"model": spec.name, "headmap": counted, "policies": rows, "out": str(out)})
        return
    _print_table(rows)
    counts = ", ".join(f"{n} {label}" for label, n in headmap.counts().items())
    print(f"head map: {counts} heads (rule {headmap.rule.name}). {analysis.verdict}")
    print(f"look at: {out}/policies.mp4, {out}/policies.png, {out}/headmap.png, {out}/analysis/report.html")


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="policies, same prompts and seeds; times of the seventh chunk, decoding included")
    titles = ("policy", "KV MB", "s/chunk", "frames/s", "PSNR to full", "digits read", "direction right")
    for title in titles:
        table.add_column(title, justify="left" if title == "policy" else "right")
    for row in rows:
        psnr = row["psnr_to_full"]
        table.add_row(
            row["policy"],
            f"{row['kv_bytes'] / 1e6:.2f}",
            f"{row['seconds_per_chunk']:.3f}",
            f"{row['frames_per_second']:.1f}",
            "-" if psnr is None else f"{psnr:.1f} dB",
            f"{row['digits_read']:.0%}",
            f"{row['direction_right']:.0%}",
        )
    type(console)(width=100).print(table)


def _write_video(videos: Mapping[str, Sequence[np.ndarray[Any, Any]]], path: Path, fps: float) -> None:
    """Policies from left to right, prompts from top to bottom, with lines between."""
    from forcingkv.runtime.video import Mp4Writer

    columns = [np.concatenate([_framed(video) for video in made[:SHOWN]], axis=1) for made in videos.values()]
    with Mp4Writer(path, fps, enlarge=4) as writer:
        writer.write(np.concatenate(columns, axis=2))


def _framed(video: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.pad(video, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
