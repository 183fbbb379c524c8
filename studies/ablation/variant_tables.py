"""Variants as CSV, with everything, and an ablation as a Markdown table, with what is read most."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from forcingkv.measure.fidelity.evaluation import Estimate
from forcingkv.models.demo.judge import READ_CHUNK
from studies.ablation.cells import decibel, difference, mean, percent, point, points, ratio, signed
from studies.ablation.variant_scores import Measure, VariantRow, frontier
from studies.ablation.variants import PROFILED, REFERENCE


def csv_text(rows: Sequence[VariantRow]) -> str:
    """Every mean with its interval, every paired difference, and the spread of draws. Empty: unknown."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tables = [dict(_fields(row)) for row in rows]
    names = list(dict.fromkeys(name for table in tables for name in table))
    writer.writerow(names)
    writer.writerows([table.get(name, "") for name in names] for table in tables)
    return out.getvalue()


def markdown_table(rows: Sequence[VariantRow]) -> str:
    """A row a variant: means with 95% intervals over prompts; of draws also the least and largest mean."""
    head = [
        "varied",
        "variant",
        "KV MB",
        "digits read, all chunks",
        f"in chunk {READ_CHUNK}",
        "direction right, all chunks",
        "PSNR to full, dB",
        "SSIM to full",
        f"digits − {REFERENCE}",
        f"digits − {PROFILED}",
        f"PSNR − {PROFILED}",
        "frontier",
    ]
    on: dict[str, list[str]] = {}
    words: dict[Measure, str] = {"digits": "digits", "psnr": "PSNR"}
    for measure, word in words.items():
        for row in frontier(rows, measure):
            on.setdefault(row.name, []).append(word)
    lines = [head, ["---", "---", *["---:"] * (len(head) - 3), "---"]]
    for row in rows:
        cells = [
            row.family,
            f"`{row.name}`" + (f", {row.draws} draws" if row.draws > 1 else ""),
            f"{row.kv_bytes / 1e6:.2f}",
            mean(row, "digits", percent),
            point(row, "digits_at", percent),
            point(row, "directions", percent),
            mean(row, "psnr", decibel),
            point(row, "ssim", ratio),
            difference(row.to_full["digits"], points),
            difference(row.to_profiled["digits"], points),
            difference(row.to_profiled["psnr"], signed),
            ", ".join(on.get(row.name, [])),
        ]
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _fields(row: VariantRow) -> Iterator[tuple[str, str]]:
    yield from {"family": row.family, "variant": row.name, "draws": str(row.draws)}.items()
    yield "kv_bytes", str(row.kv_bytes)
    yield "attention_to_full", f"{row.attention:.6g}"
    first = next(iter(row.means.values()))
    yield "videos", str(first.videos)
    yield "prompts", str(first.prompts)
    kinds: dict[str, Mapping[Measure, Estimate]] = {
        "": row.means,
        "_minus_full": row.to_full,
        "_minus_profiled": row.to_profiled,
    }
    for measure in row.means:
        for kind, estimates in kinds.items():
            found = estimates[measure]
            for end, value in (("", found.mean), ("_low", found.low), ("_high", found.high)):
                yield f"{measure}{kind}{end}", "" if value is None else f"{value:.6g}"
        if row.draws > 1 and measure in row.spread:
            least, largest = row.spread[measure]
            yield f"{measure}_least_draw", f"{least:.6g}"
            yield f"{measure}_largest_draw", f"{largest:.6g}"
