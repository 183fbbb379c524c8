"""An ablation as CSV, with everything, and as a Markdown table, with what is read most."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

from forcingkv.measure.fidelity.evaluation import Estimate
from forcingkv.models.demo.judge import READ_CHUNK
from studies.ablation.variant_scores import MEASURES, Measure, VariantRow, frontier
from studies.ablation.variants import PROFILED, REFERENCE

Format = Callable[[float], str]


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
            _mean(row, "digits", _percent),
            _point(row, "digits_at", _percent),
            _point(row, "directions", _percent),
            _mean(row, "psnr", _decibel),
            _point(row, "ssim", _ratio),
            _difference(row.to_full["digits"], _points),
            _difference(row.to_profiled["digits"], _points),
            _difference(row.to_profiled["psnr"], _signed),
            ", ".join(on.get(row.name, [])),
        ]
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _fields(row: VariantRow) -> Iterator[tuple[str, str]]:
    yield from {"family": row.family, "variant": row.name, "draws": str(row.draws)}.items()
    yield "kv_bytes", str(row.kv_bytes)
    yield "videos", str(row.means["digits"].videos)
    yield "prompts", str(row.means["digits"].prompts)
    kinds: dict[str, Mapping[Measure, Estimate]] = {
        "": row.means,
        "_minus_full": row.to_full,
        "_minus_profiled": row.to_profiled,
    }
    for measure in MEASURES:
        for kind, estimates in kinds.items():
            found = estimates[measure]
            for end, value in (("", found.mean), ("_low", found.low), ("_high", found.high)):
                yield f"{measure}{kind}{end}", "" if value is None else f"{value:.6g}"
        if row.draws > 1 and measure in row.spread:
            least, largest = row.spread[measure]
            yield f"{measure}_least_draw", f"{least:.6g}"
            yield f"{measure}_largest_draw", f"{largest:.6g}"


def _mean(row: VariantRow, measure: Measure, shown: Format) -> str:
    text = _point(row, measure, shown)
    found = row.means[measure]
    if found.low is not None and found.high is not None:
        text += f" [{shown(found.low)}, {shown(found.high)}]"
    if row.draws > 1 and measure in row.spread:
        least, largest = row.spread[measure]
        text += f"; draws {shown(least)} to {shown(largest)}"
    return text


def _point(row: VariantRow, measure: Measure, shown: Format) -> str:
    mean = row.means[measure].mean
    return "–" if mean is None else shown(mean)


def _difference(found: Estimate, shown: Format) -> str:
    """In bold where the interval excludes 0."""
    if found.mean is None or found.low is None or found.high is None:
        return "–" if found.mean is None else shown(found.mean)
    text = f"{shown(found.mean)} [{shown(found.low)}, {shown(found.high)}]"
    return f"**{text}**" if found.excludes_zero else text


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _points(share: float) -> str:
    """Percentage points."""
    return f"{100 * share:+.1f}"


def _decibel(value: float) -> str:
    return f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _ratio(value: float) -> str:
    return f"{value:.3f}"
