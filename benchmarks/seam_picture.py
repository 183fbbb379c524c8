"""Draws what motion does not explain, pair by pair of frames, with the boundaries of chunks marked.

python benchmarks/seam_picture.py baseline.mp4 pruned.mp4 --out docs/pictures/seams.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from forcingkv.measure.fidelity.motion import SAMPLED_FPS, MotionMeter
from forcingkv.measure.fidelity.seams import ChunkLayout, seam, seams
from forcingkv.measure.fidelity.video_files import open_video


def draw(axes: Axes, path: Path, layout: ChunkLayout) -> None:
    """A bar a pair: boundaries, crossings from one latent frame to the next, and the others."""
    meter = MotionMeter(SAMPLED_FPS)
    with open_video(path) as file:
        for frame in file.frames:
            meter.add(frame)
    motion = meter.motion()
    frames = len(motion.residual) + 1
    colours = np.full(frames - 1, "0.85", object)
    colours[layout.crossings(frames)], colours[layout.boundaries(frames)] = "0.55", "#b2182b"
    axes.bar(range(frames - 1), motion.residual, 0.8, color=colours.tolist())
    ratio = seam(seams(motion, layout).residual)
    axes.set_title(f"{path.stem}: seam residual {ratio:.2f}", loc="left", fontsize=10)


def main() -> None:
    """Read the options and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--first-chunk-frames", type=int, default=9)
    parser.add_argument("--chunk-frames", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sns.set_theme(style="ticks")
    figure, axes = plt.subplots(
        len(given.videos),
        1,
        figsize=(9, 1.7 * len(given.videos) + 0.5),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for place, path in zip(axes[:, 0], given.videos, strict=True):
        draw(place, path, ChunkLayout(given.first_chunk_frames, given.chunk_frames))
    axes[-1, 0].set_xlabel("pair of frames; red: chunk boundary, dark: other crossing between latent frames")
    figure.supylabel("unexplained difference, grey levels", fontsize=10)
    sns.despine(figure)
    figure.savefig(given.out, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
