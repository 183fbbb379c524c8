"""Which measures find seams: faults planted into real videos at every chunk boundary.

    python benchmarks/planted_seams.py videos/*.mp4

Prints as JSON, for each video and planted fault, the published chunk discontinuity and the seam measures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forcingkv.commands.console import progress
from forcingkv.measure.fidelity.discontinuity import chunk_discontinuity, seam, seams
from forcingkv.measure.fidelity.layout import ChunkLayout
from forcingkv.measure.fidelity.motion import SAMPLED_FPS, MotionMeter
from forcingkv.measure.fidelity.planting import SEAMS
from forcingkv.measure.fidelity.video_files import open_video


def seams_of(video: npt.NDArray[np.uint8], layout: ChunkLayout, top: int | None) -> dict[str, float | None]:
    """What is measured at boundaries, of frames (frames, height, width, 3)."""
    meter = MotionMeter(SAMPLED_FPS)  # dynamic degree, which is not asked for, then takes no flow of its own
    for frame in video:
        meter.add(frame)
    motion, count = meter.motion(), len(layout.boundaries(len(video)))
    jumps = {name: seam(ratios) for name, ratios in vars(seams(motion, layout)).items()}
    return {"chunk_discontinuity": chunk_discontinuity(motion.magnitude, top or count)} | jumps


def main() -> None:
    """Read the options and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--first-chunk-frames", type=int, default=9)
    parser.add_argument("--chunk-frames", type=int, default=12)
    parser.add_argument("--top", type=int, help="pairs that the published metric takes")
    given = parser.parse_args()
    layout, rows = ChunkLayout(given.first_chunk_frames, given.chunk_frames), []
    with progress() as shown:
        task = shown.add_task("planting", total=len(given.videos) * len(SEAMS))
        for path in given.videos:
            with open_video(path) as file:
                video = np.stack(list(file.frames))
            for fault, planted in SEAMS.items():
                found = seams_of(planted(video, layout), layout, given.top)
                rows.append({"video": path.stem, "planted": fault} | found)
                shown.advance(task)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
