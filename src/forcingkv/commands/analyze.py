"""`forcingkv analyze`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from forcingkv.commands.compare_maps import compare
from forcingkv.commands.console import MOST, AsJson, console, emit, need, progress_bar, results_alone, say
from forcingkv.commands.given import (
    LatentsFolder,
    Noises,
    check_latents_folder,
    noises_for,
    say_noises,
)
from forcingkv.commands.grouped import takes
from forcingkv.commands.headmap import print_map
from forcingkv.commands.models import (
    Checkpoint,
    Embeds,
    Key,
    Loras,
    Model,
    NoPresetLora,
    RandomWeights,
    Resolution,
    Threads,
    text_inputs,
    weights_for,
)
from forcingkv.commands.query_statistics import queries
from forcingkv.headmaps import Budget, InputError, read_headmap
from forcingkv.headmaps.fields import one_of, shown
from forcingkv.headmaps.plain import plain
from forcingkv.measure.tables import PlainConsole
from forcingkv.runtime.prompts import read_prompts
from forcingkv.runtime.spec import Geometry

if TYPE_CHECKING:
    from forcingkv.analyze import Analysis, Labelling


app = typer.Typer(help="Record attention statistics, label heads, judge and compare.", no_args_is_help=True)
app.command("compare")(compare)
app.command("queries")(queries)

LEVEL_STYLES = {"safe": "green", "care": "yellow", "unsafe": "red", "unknown": "magenta"}

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class LabelOptions:
    """What a user said of labels."""

    rule: Annotated[str, Option(help="auto, threshold, quota, kmeans, mixture, budget or dummy.")] = "auto"
    alpha: Annotated[float, Option(min=0, max=1, help="Cut of the rule threshold.")] = 0.8
    static_per_layer: Annotated[
        int | None, Option(min=0, help="Static heads a layer, for the rule quota; default: half.")
    ] = None
    sink_frames: Annotated[int, Option(min=0, help="First frames left out of the score's denominator.")] = 1
    recent_frames: Annotated[
        int | None,
        Option(min=1, help="Newest key frames that a score counts; default: the chunk and one before it."),
    ] = None
    passes: Annotated[
        str | None,
        Option(
            help="Passes that are scored: denoise, clean or all. `heads` records them, denoise by default;"
            " `report` chooses among those recorded, all by default."
        ),
    ] = None
    score_chunks: Annotated[
        str | None,
        Option(help="Chunks that are scored, such as 4, 2-6 or 2,4,6; default: all after the split."),
    ] = None
    undecided: Annotated[
        str | None,
        Option(help="Undecided heads: dynamic or kept; default: dynamic, kept under quota and budget."),
    ] = None
    target_kv: Annotated[
        str | None, Option(help="For the rule budget: most KV memory, such as 1.5GB or 800MB.")
    ] = None
    target_time: Annotated[
        float | None, Option(min=0, help="For the rule budget: most time of a chunk, as a share of full.")
    ] = None
    target_resolution: Annotated[
        str | None, Option(help="Resolution that the target is for; default: that of the recording.")
    ] = None

    def labelling(self, recorded: Geometry) -> Labelling:
        """What they ask for; a target without a resolution holds at the one that was recorded.

        Raises InputError for words that are not known, or a target too many.
        """
        from forcingkv.analyze import Labelling
        from forcingkv.analyze.analysis import Undecided
        from forcingkv.analyze.labels import RULES
        from forcingkv.analyze.recording import Passes

        rule = one_of(RULES, self.rule, "rule")
        if self.undecided not in (None, *get_args(Undecided)):
            raise InputError(f"is {self.undecided!r}", where="--undecided", expected="kept or dynamic")
        targets = [target for target in (self.target_kv, self.target_time) if target is not None]
        if (rule == "budget") != (len(targets) == 1):
            raise InputError(
                f"the rule {rule} is given {len(targets)} targets",
                expected="one of --target-kv and --target-time with --rule budget, and none with other rules",
            )
        resolution = self.target_resolution or f"{recorded.width}x{recorded.height}"
        kv_bytes = bytes_of(self.target_kv) if self.target_kv else None
        return Labelling(
            rule=rule,
            alpha=self.alpha,
            static_per_layer=self.static_per_layer,
            sink_frames=self.sink_frames,
            undecided=cast("Undecided | None", self.undecided),
            budget=Budget("forcing-kv", resolution, kv_bytes, self.target_time) if targets else None,
            recent_frames=self.recent_frames,
            passes=None if self.passes is None else one_of(Passes, self.passes, "passes"),
            score_chunks=None if self.score_chunks is None else numbers_of(self.score_chunks),
        )


@app.command()
@takes("labels", LabelOptions)
def heads(
    model: Model,
    out: Annotated[Path, Option(help="Folder for stats/, headmap.json, stability.json, report.html.")],
    checkpoint: Checkpoint = None,
    key: Key = None,
    lora: Loras = None,
    no_preset_lora: NoPresetLora = False,
    random_weights: RandomWeights = False,
    resolution: Resolution = None,
    prompts: Annotated[Path | None, Option(help="Text file, one prompt a line.")] = None,
    embeds: Embeds = None,
    samples: Annotated[int, Option(min=1, max=MOST, help="Videos to measure; more may be added later.")] = 8,
    seed: Annotated[int, Option(min=0, help="Seed of the first video.")] = 0,
    noise: Noises = None,
    latents_out: LatentsFolder = None,
    chunks: Annotated[int | None, Option(min=1, help="Chunks a video.")] = None,
    rows: Annotated[
        int, Option(min=0, help="Query rows measured of each pass and layer; 0: all, exactly.")
    ] = 512,
    policy: Annotated[str, Option(help="Policy to generate under.")] = "full",
    headmap: Annotated[Path | None, Option(help="Head map, for policies that need one.")] = None,
    *,
    labels: LabelOptions,
    device: Annotated[
        str | None, Option(help="cpu, cuda, cuda:1, mps or xpu; default: cuda if there is one.")
    ] = None,
    dtype: Annotated[str, Option(help="What to compute in: float32 or bfloat16.")] = "float32",
    threads: Threads = None,
    ray: Annotated[str | None, Option(help="Spread samples: local, or a Ray cluster's address.")] = None,
    workers: Annotated[
        int | None, Option(min=1, max=MOST, help="Ray workers; default: all there is room for.")
    ] = None,
    stats: Annotated[
        str | None, Option(help="Place for the statistics: folder or fsspec URL; default: OUT/stats.")
    ] = None,
    restart: Annotated[bool, Option(help="Forget what was recorded before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure every head over samples, passes and chunks; write a head map and how far to trust it.

    What is recorded is kept: interrupted, the same command goes on; with more --samples it adds to them.

    Example: forcingkv analyze heads --model demo --samples 16 --out runs/demo-heads
    """
    need("analyze", "torch", "polars", "sklearn", "seaborn")
    from forcingkv.analyze import Job, analyze_heads
    from forcingkv.analyze.recording import RecordedDtype
    from forcingkv.analyze.results import check_places
    from forcingkv.analyze.run import check_room, choose_device, recording_plan, video_length
    from forcingkv.analyze.storage import Storage
    from forcingkv.models.presets import load_spec
    from forcingkv.runtime.ray_cluster import LOCAL, check_device

    spec = load_spec(model)
    asked = labels.labelling(spec.geometry(resolution))
    mapped = read_headmap(headmap) if headmap else None
    chosen, kind = choose_device(device), one_of(RecordedDtype, dtype, "dtype")
    recorded = asked.passes or "denoise"
    asked.scoring.check(spec, video_length(spec, chunks), recorded)
    check_latents_folder(latents_out)
    if ray:
        check_device(chosen)
    if latents_out and ray not in (None, LOCAL):
        what = "would be written by workers on other machines"
        raise InputError(what, where="--latents-out", expected=f"no --ray, or --ray {LOCAL}")
    check_room(  # before weights are fetched
        recording_plan(spec, resolution, policy, mapped),
        stats or out / "stats",
        samples=samples,
        restart=restart,
        cluster=ray,
        workers=workers,
        chunks=video_length(spec, chunks),
        dtype=kind,
        device=chosen,
        passes=recorded,
    )
    check_places(out, stats, samples=samples, restart=restart)
    texts = text_inputs(spec, read_prompts(prompts) if prompts else None, embeds)
    noises = noises_for(
        noise, recording_plan(spec, resolution, policy, mapped), samples, video_length(spec, chunks)
    )
    say_noises(noises, seed)
    before = 0 if restart or latents_out is None else len(Storage(stats or out / "stats").samples())
    if before:
        say(
            f"note: {before} samples were recorded before: no latents of theirs are written (--restart)",
            error=True,
        )
    job = Job(
        spec=spec,
        weights=weights_for(spec, checkpoint, key, lora, no_preset_lora, random_weights),
        texts=texts,
        seed=seed,
        chunks=chunks,
        policy=policy,
        headmap=mapped,
        resolution=resolution,
        rows=rows or None,
        device=chosen,
        dtype=kind,
        threads=threads,
        passes=recorded,
        noises=tuple(noises),
        latents=latents_out.absolute() if latents_out else None,
    )
    length = job.length
    with results_alone(), progress_bar() as shown:
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
@takes("labels", LabelOptions)
def report(
    folder: Annotated[Path, Argument(help="Folder that `analyze heads` wrote.")],
    *,
    labels: LabelOptions,
    stats: Annotated[str | None, Option(help="Place of the statistics; default: FOLDER/stats.")] = None,
    out: Annotated[Path | None, Option(help="Folder to write to; default: FOLDER.")] = None,
    as_json: AsJson = False,
) -> None:
    """Label and judge recorded statistics again, by any rule, and write head map and report anew.

    Example: forcingkv analyze report runs/demo-heads --rule quota --static-per-layer 2
    """
    need("analyze", "torch", "polars", "sklearn", "seaborn")
    from forcingkv.analyze import analyze_statistics, write_analysis
    from forcingkv.analyze.results import check_results
    from forcingkv.analyze.storage import read_statistics

    check_results(out or folder)
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
        found = {"headmap": headmap.to_json(), "digest": headmap.digest, "stability": summary_json(analysis)}
        emit({"out": str(out)} | found)
        return
    screen, level = PlainConsole(), analysis.verdict.level
    told = Text("\n".join(map(plain, analysis.verdict.sentences)))
    screen.print(Panel(told, title=level, border_style=LEVEL_STYLES[level]))
    print_map(headmap, screen)
    table = Table.grid(padding=(0, 2))
    for name, value in summary_lines(analysis):
        table.add_row(name, value)
    screen.print(table)
    written = f"written: {out}/headmap.json, {out}/stability.json, {out}/report.html"
    console.print(written, soft_wrap=True)


def bytes_of(text: str) -> int:
    """Bytes of a size such as 1.5GB (10^9) or 800MiB (2^20). Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(f"is {text!r}", where="--target-kv", expected="a size, such as 1.5GB or 800MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def numbers_of(text: str) -> tuple[int, ...]:
    """Numbers as people list them: 4, or 2-6, or 2,4,6-8. Each once, in order.

    Raises InputError for anything else.
    """
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last:
            raise InputError(
                f"is {shown(text)}", where="--score-chunks", expected="chunks, such as 4, 2-6 or 2,4,6"
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))
