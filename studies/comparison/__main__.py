"""Every policy on a test bed, at its own bytes: what it remembers, and how its videos look.

    python -m studies.comparison --bed demo
    python -m studies.comparison --bed demo-occluded
    python -m studies.comparison --bed demo-occluded --prompts 16 --only full memflow --out tried

Measures heads as `forcingkv analyze heads` does, runs every variant of studies/comparison/policies.toml in
torch with the same prompts, given frames and seeds, and writes into `--out`: comparison-BED.csv,
pictures/comparison-BED.png, and the bed's table in comparison.md, between its marks. Finished videos are kept
in `--folder`: a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from forcingkv.headmaps.writing import write_bytes, write_text
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.presets import load_spec
from studies.ablation.__main__ import chosen_variants, other_than_default, page_with
from studies.ablation.variant_maps import VariantMaps
from studies.ablation.variant_scores import Cost, VariantRow, VariantScores, rows_of
from studies.ablation.variant_tables import csv_text
from studies.ablation.variant_videos import VariantVideos
from studies.comparison.bed_pictures import bytes_picture, lengths_picture
from studies.comparison.bed_tables import bed_table
from studies.comparison.beds import BEDS, CHUNKS, DTYPE, Bed

POLICIES = Path(__file__).with_name("policies.toml")


def run(bed: Bed, given: argparse.Namespace) -> list[VariantRow]:
    """Measure heads, then every variant. Says on stderr what is done."""
    torch.set_num_threads(given.threads)
    spec = load_spec(bed.model)
    weights, folder = load_weights(spec, given.checkpoint), given.folder / bed.model
    prompts, stats = list(bed.measured_on[: given.samples]), folder / f"stats-{given.samples}"
    maps = VariantMaps.measured(spec, weights, prompts, CHUNKS, given.threads, stats)
    made = VariantVideos(spec, weights, bed.samples, folder / "videos")
    variants = chosen_variants(given.only, given.policies)
    measured: list[VariantScores] = []
    references = None
    for number, variant in enumerate(variants, 1):
        started = time.perf_counter()
        headmap = maps.of(variant)
        statistics = maps.statistics_of(variant)
        videos = made.videos(variant, headmap, statistics)
        references = references or videos
        found = [bed.measure(*one) for one in zip(range(len(videos)), videos, references, strict=True)]
        values = {name: [one[name] for one in found] for name in found[0]}
        cost = Cost.of(made.plan(variant, headmap, statistics), DTYPE)
        measured.append(VariantScores(variant, cost, values))
        draw = f", draw {variant.draw}" if variant.draw else ""
        seconds = time.perf_counter() - started
        print(f"{number}/{len(variants)} {variant.name}{draw}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows_of(measured, bed.names)


def main() -> None:
    """Read the options, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bed", choices=BEDS, required=True)
    parser.add_argument("--prompts", type=int, default=64, help="or clips, in steps of 16")
    parser.add_argument("--samples", type=int, default=16, help="videos that heads are measured on")
    parser.add_argument("--policies", type=Path, default=POLICIES, help="file of variants")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--checkpoint", type=Path, help="weights; default: those that ship")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs")
    parser.add_argument("--folder", type=Path, default=Path("build/comparison"), help="of finished videos")
    given = parser.parse_args()
    bed = BEDS[given.bed](given.prompts)
    rows = run(bed, given)
    table = bed_table(bed.model, rows)
    options = "bed", "prompts", "samples", "only"
    command = " ".join(["python -m studies.comparison", *other_than_default(parser, given, options)])
    about = (
        f"`{command}`: {len(bed.samples)} videos of each variant; heads measured on {given.samples} other"
        " prompts.\n\n"
    )
    page = given.out / "comparison.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    marks = f"<!-- {bed.model}: begin -->", f"<!-- {bed.model}: end -->"
    write_text(page, page_with(text, about + table, marks))
    write_text(given.out / f"comparison-{bed.model}.csv", csv_text(rows))
    pictures = given.out / "pictures"
    write_bytes(pictures / f"comparison-{bed.model}.png", bytes_picture(rows, bed.quality))
    if bed.model == "demo-occluded":
        write_bytes(pictures / "comparison-lengths.png", lengths_picture(rows))
    print(table, end="")


if __name__ == "__main__":
    main()
