"""Draw the training curve from the log of `train`.

python -m forcingkv.models.demo.curve --log models/demo/training.csv --out models/demo/curve.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl
from matplotlib import pyplot as plt

WINDOW = 25
"""Steps averaged into a point."""


def draw_curve(log: Path, out: Path) -> None:
    """Read columns step, chunks, loss, first (CSV) and write a PNG."""
    rows = pl.read_csv(log).with_columns(pl.col("loss", "first").rolling_mean(WINDOW, min_samples=1))
    figure = plt.figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(rows["step"], rows["loss"], label="all chunks")
    axes.plot(rows["step"], rows["first"], label="first chunk", linewidth=0.8)
    for row, chunks in enumerate(rows["chunks"].unique().sort()):
        start = int(rows.filter(chunks=chunks)["step"][0])
        axes.axvline(start, color="grey", linewidth=0.6)
        axes.annotate(f" {chunks} chunk{'s' * (chunks > 1)}", (start, 0.45 / 1.3**row), color="grey")
    axes.set(xlabel="step", ylabel="flow matching loss", ylim=(0.03, 0.6), yscale="log")
    axes.legend()
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw_curve(options.log, options.out)
