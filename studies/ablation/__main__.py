"""What each part of forcing-kv is worth on the demo model: head map, choice of segments, ratio, and the like.

    python -m studies.ablation
    python -m studies.ablation --prompts 16 --variants 8 --out tried

Measures heads as `forcingkv analyze heads` does, runs every variant of studies/ablation/variants.toml in
torch with the same prompts and seeds, and writes into `--out`: ablations.csv, pictures/ablations.png,
pictures/ablation-differences.png, and the table in ablations.md, between its marks. Prompts that heads are
measured on are not among those that variants are run with. Finished videos are kept in `--folder`: a
run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from forcingkv.commands.console import default_prompts
from forcingkv.headmaps.writing import write_bytes, write_text
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.presets import load_spec
from studies.ablation.demo_scores import measure_videos
from studies.ablation.variant_maps import VariantMaps
from studies.ablation.variant_pictures import difference_picture, pareto_picture
from studies.ablation.variant_scores import Cost, VariantRow, VariantScores, rows_of
from studies.ablation.variant_tables import csv_text, markdown_table
from studies.ablation.variant_videos import Sample, VariantVideos
from studies.ablation.variants import PROFILED, REFERENCE, Variant, read_variants

MODEL = "demo"
FIRST_SEED = 1000
"""Heads are measured with the seeds from 0."""
BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"


def chosen_variants(names: list[str] | None, path: Path | None = None) -> list[Variant]:
    """Those of the names (None: all) and those that others are compared with, the reference first.

    They are of that file; None: of the ablation's own.
    """
    variants = read_variants(path)
    known = {variant.name for variant in variants}
    unknown = sorted(set(names or ()) - known)
    if unknown:
        sys.exit(f"--only: there is no variant {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
    wanted = known if names is None else {REFERENCE, PROFILED, *names}
    return sorted((v for v in variants if v.name in wanted), key=lambda v: v.name != REFERENCE)


def run(given: argparse.Namespace) -> list[VariantRow]:
    """Measure heads, then every variant. Says on stderr what is done."""
    torch.set_num_threads(given.threads)
    spec, stats = load_spec(MODEL), given.folder / f"stats-{given.samples}-{given.chunks}"
    weights, prompts = load_weights(spec), default_prompts(MODEL)
    measured_on, others = prompts[: given.samples], prompts[given.samples :]
    if len(others) < given.prompts:
        sys.exit(f"--prompts is {given.prompts}: only {len(others)} are left that heads are not measured on")
    maps = VariantMaps.measured(spec, weights, measured_on, given.chunks, given.threads, stats)
    samples = [
        Sample(prompt, given.first_seed + number * given.seeds + seed, given.chunks)
        for number, prompt in enumerate(others[: given.prompts])
        for seed in range(given.seeds)
    ]
    made = VariantVideos(spec, weights, samples, given.folder / "videos")
    variants = chosen_variants(given.only)
    measured: list[VariantScores] = []
    references = None
    for number, variant in enumerate(variants, 1):
        started = time.perf_counter()
        headmap = maps.of(variant)
        videos = made.videos(variant, headmap)
        references = videos if references is None else references
        cost = Cost.of(made.plan(variant, headmap))
        measured.append(measure_videos(variant, cost, videos, references, samples, spec.frames_per_chunk))
        draw = f", draw {variant.draw}" if variant.draw else ""
        seconds = time.perf_counter() - started
        print(f"{number}/{len(variants)} {variant.name}{draw}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows_of(measured, [sample.prompt for sample in samples])


def page_with(page: str, table: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """The page with that table between its marks; they are added at its end where it has none."""
    begin, end = marks
    if begin not in page or end not in page:
        page += f"\n{begin}\n{end}\n"
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{table}{end}{rest.split(end, 1)[1]}"


def main() -> None:
    """Read the options, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1, help="videos of each prompt")
    parser.add_argument("--chunks", type=int, default=7, help="of each video")
    parser.add_argument("--samples", type=int, default=16, help="videos that heads are measured on")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="of the first video")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs")
    parser.add_argument("--folder", type=Path, default=Path("build/ablations"), help="of finished videos")
    given = parser.parse_args()
    rows = run(given)
    options = "prompts", "seeds", "chunks", "samples", "first_seed", "only"
    command = " ".join(["python -m studies.ablation", *other_than_default(parser, given, options)])
    about = (
        f"`{command}`: {given.prompts} prompts, {given.seeds} seed{'s' * (given.seeds > 1)} each,"
        f" {given.chunks} chunks a video; heads measured on {given.samples} other prompts.\n\n"
    )
    page = given.out / "ablations.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    write_text(page, page_with(text, about + markdown_table(rows)))
    write_text(given.out / "ablations.csv", csv_text(rows))
    write_bytes(given.out / "pictures" / "ablations.png", pareto_picture(rows))
    write_bytes(given.out / "pictures" / "ablation-differences.png", difference_picture(rows))
    print(markdown_table(rows), end="")


def other_than_default(
    parser: argparse.ArgumentParser, given: argparse.Namespace, options: Sequence[str]
) -> list[str]:
    """Those of the options that are not the default, as they are written."""
    words = []
    for name in options:
        value = getattr(given, name)
        if value != parser.get_default(name):
            values = value if isinstance(value, list) else [str(value)]
            words.append(shlex.join([f"--{name.replace('_', '-')}", *values]))
    return words


if __name__ == "__main__":
    main()
