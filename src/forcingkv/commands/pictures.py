"""A sheet of frames: prompts from top to bottom, policies from left to right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

FRAMES = (0, 5, 10, 15, 20)


def write_sheet(
    videos: Mapping[str, Sequence[np.ndarray[Any, Any]]], prompts: Sequence[str], path: Path
) -> None:
    """Write a PNG of frames 0, 5, 10, 15 and 20 of each prompt's video under each policy."""
    figure = plt.figure(figsize=(4.6 * len(videos), 0.68 * len(prompts) + 0.4), layout="constrained")
    axes = figure.subplots(len(prompts), len(videos), squeeze=False)
    for column, (policy, made) in enumerate(videos.items()):
        for row, (prompt, video) in enumerate(zip(prompts, made[: len(prompts)], strict=True)):
            strip = [np.pad(video[f], ((1, 1), (1, 1), (0, 0)), constant_values=96) for f in FRAMES]
            shown = axes[row][column]
            shown.imshow(np.concatenate(strip, 1), interpolation="nearest")
            shown.set_axis_off()
            shown.set_title(policy if row == 0 else "", fontsize=11)
            if column == 0:
                words = prompt.replace(" and ", "\nand ")
                shown.text(-3, 16, words, fontsize=8, ha="right", va="center")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
