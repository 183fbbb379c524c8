"""The table of a test bed: a row a variant, what is read most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forcingkv.models.demo_occluded.data import MOST_AWAY
from studies.ablation.cells import decibel, difference, mean, percent, point, points, ratio, signed
from studies.ablation.variant_scores import VariantRow, frontier
from studies.ablation.variants import PROFILED, REFERENCE

Column = tuple[str, Callable[[VariantRow], str]]


def _after(away: int) -> Callable[[VariantRow], str]:
    return lambda row: point(row, f"right_after_{away}", percent)


LOOKS: tuple[Column, ...] = (
    ("PSNR to full, dB", lambda row: point(row, "psnr", decibel)),
    ("chunk discontinuity", lambda row: point(row, "chunk_discontinuity", decibel)),
    ("seam jolt", lambda row: point(row, "seam_jolt", ratio)),
    ("seam residual", lambda row: point(row, "seam_residual", ratio)),
    ("sharpness drift, log2", lambda row: point(row, "sharpness_drift", signed)),
    ("colour drift, dE", lambda row: point(row, "colour_drift_most", decibel)),
)
DEMO: tuple[Column, ...] = (
    ("digits read", lambda row: mean(row, "digits", percent)),
    ("in the last chunk", lambda row: point(row, "digits_last", percent)),
    ("directions right", lambda row: point(row, "directions", percent)),
    (f"digits − {REFERENCE}", lambda row: difference(row.to_full["digits"], points)),
    (f"digits − {PROFILED}", lambda row: difference(row.to_profiled["digits"], points)),
)
OCCLUDED: tuple[Column, ...] = (
    ("right in the window", lambda row: mean(row, "right_in_window", percent)),
    *((f"after {away}", _after(away)) for away in range(1, MOST_AWAY + 1)),
    ("digit", lambda row: point(row, "digit", percent)),
    ("place", lambda row: point(row, "place", percent)),
    ("direction", lambda row: point(row, "direction", percent)),
    (f"right − {REFERENCE}", lambda row: difference(row.to_full["right_in_window"], points)),
    (f"right − {PROFILED}", lambda row: difference(row.to_profiled["right_in_window"], points)),
    ("PSNR to the real clip, dB", lambda row: mean(row, "psnr_real", decibel)),
)
COLUMNS = {"demo": ("digits", DEMO), "demo-occluded": ("right_in_window", OCCLUDED)}
"""What each bed compares by, and its own columns."""


def bed_table(model: str, rows: Sequence[VariantRow]) -> str:
    """Means with 95% intervals over videos; of draws also the least and largest mean."""
    quality, own = COLUMNS[model]
    best = {row.name for row in frontier(rows, quality)}
    columns: tuple[Column, ...] = (
        ("kind", lambda row: row.family),
        ("variant", lambda row: f"`{row.name}`" + (f", {row.draws} draws" if row.draws > 1 else "")),
        ("KV MB", lambda row: f"{row.kv_bytes / 1e6:.2f}"),
        (f"attention, % of {REFERENCE}", lambda row: f"{100 * row.attention:.0f}"),
        *own,
        *LOOKS,
        ("frontier", lambda row: "yes" if row.name in best else ""),
    )
    lines = [[title for title, _ in columns], ["---", "---", *["---:"] * (len(columns) - 3), "---"]]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
