"""Which measures find seams: faults planted into real videos at every chunk boundary (docs/fidelity.md).

    python studies/planted_seams.py videos/*.mp4

Prints as JSON, for each video and planted fault, the published chunk discontinuity and the seam measures.
Every seam changes all frames of every second chunk, so each boundary has a jump of the same size and the
frames inside a chunk fit together as before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from forcingkv.commands.console import progress_bar
from forcingkv.measure.fidelity.motion import SAMPLED_FPS, measure_motion
from forcingkv.measure.fidelity.seams import ChunkLayout, chunk_discontinuity, seam, seams
from forcingkv.runtime.video_reader import open_video

Frames = npt.NDArray[np.uint8]


def chunk_of(frame: int, layout: ChunkLayout) -> int:
    """The index of the chunk that a pixel frame is in."""
    return max(0, (frame - layout.first) // layout.later + 1)


def plant(video: Frames, layout: ChunkLayout, change: Callable[[Frames], Frames]) -> Frames:
    """A copy of a video, uint8 (frames, height, width, 3), with every second chunk changed."""
    odd = [frame for frame in range(len(video)) if chunk_of(frame, layout) % 2]
    planted = video.copy()
    planted[odd] = change(video[odd])
    return planted


def brighten(levels: int) -> Callable[[Frames], Frames]:
    """A jump of brightness, in grey levels."""
    return lambda frames: _limited(frames.astype(np.int16) + levels)


def tint(levels: int) -> Callable[[Frames], Frames]:
    """A jump of colour: so many levels more red and less blue. Brightness hardly changes."""
    return lambda frames: _limited(frames.astype(np.int16) + np.array([levels, 0, -levels], np.int16))


def shift(rows: int, columns: int) -> Callable[[Frames], Frames]:
    """A jump of the whole picture, in pixels; what leaves on one side enters on the other."""
    return lambda frames: np.roll(frames, (rows, columns), (1, 2))


def soften(sigma: float) -> Callable[[Frames], Frames]:
    """A jump of sharpness: a Gaussian blur of that many pixels."""
    return lambda frames: np.stack([np.asarray(cv2.GaussianBlur(f, (0, 0), sigma), np.uint8) for f in frames])


def stall(video: Frames, layout: ChunkLayout) -> Frames:
    """A copy in which the last frame of each chunk is shown again in place of the first of the next."""
    stalled = video.copy()
    for boundary in layout.boundaries(len(video)):
        stalled[boundary + 1] = video[boundary]
    return stalled


def burst(video: Frames, layout: ChunkLayout, columns: int) -> Frames:
    """A copy whose picture jumps to the side and back inside chunks and nowhere else: real motion, no seam.

    It jumps in the middle frame of every second chunk.
    """
    moved = video.copy()
    ends = [*layout.boundaries(len(video)), len(video) - 1]
    for start, end in list(pairwise([-1, *ends]))[::2]:
        middle = (start + 1 + end) // 2
        moved[middle] = np.roll(video[middle], columns, 1)
    return moved


SEAMS: dict[str, Callable[[Frames, ChunkLayout], Frames]] = {
    "nothing": lambda video, layout: video,
    "brightness, 4 levels": lambda video, layout: plant(video, layout, brighten(4)),
    "colour, 6 levels": lambda video, layout: plant(video, layout, tint(6)),
    "shift, 2 pixels": lambda video, layout: plant(video, layout, shift(0, 2)),
    "blur, 1 pixel": lambda video, layout: plant(video, layout, soften(1.0)),
    "stall": stall,
    "motion inside chunks": lambda video, layout: burst(video, layout, 8),
    "nothing, looked for elsewhere": lambda video, layout: video[layout.stride :],
}
"""What is planted for the table of docs/fidelity.md. The last two are no seams: motion that is none, and a
video that begins one latent frame later, whose boundaries are not where the layout says."""


def _limited(frames: npt.NDArray[np.int16]) -> Frames:
    return frames.clip(0, 255).astype(np.uint8)


def seams_of(video: npt.NDArray[np.uint8], layout: ChunkLayout, top: int | None) -> dict[str, float | None]:
    """What is measured at boundaries, of frames (frames, height, width, 3)."""
    # At this rate dynamic degree, which is not asked for, takes no flow of its own.
    motion, count = measure_motion(video, SAMPLED_FPS), len(layout.boundaries(len(video)))
    jumps = {name: seam(ratios) for name, ratios in seams(motion, layout).items()}
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
    with progress_bar() as shown:
        task = shown.add_task("planting", total=len(given.videos) * len(SEAMS))
        for path in given.videos:
            with open_video(path) as (_, frames):
                video = np.stack(list(frames))
            for fault, planted in SEAMS.items():
                found = seams_of(planted(video, layout), layout, given.top)
                rows.append({"video": path.stem, "planted": fault} | found)
                shown.advance(task)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
