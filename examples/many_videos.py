"""Two videos at once, on one copy of the weights.

    python examples/many_videos.py --bundle bundle

Each thread has a session of its own, with its own caches; both run the graphs that were loaded once. Prints
of each video the number of frames, their mean brightness and the seconds that a chunk took.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from forcingkv.runtime import Chunk, Session

PROMPTS = ("a 3 moving left and a 7 moving up", "a 1 moving right and a 5 moving down")


def make(session: Session, prompt: str, chunks: int) -> list[Chunk]:
    """A whole video."""
    return list(session.generate(prompt, seed=7, chunks=chunks))


def main() -> None:
    """Generate two videos in two threads."""
    parser = argparse.ArgumentParser(description="Two videos at once, on one copy of the weights.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prompts", nargs=2, default=PROMPTS)
    parser.add_argument("--chunks", type=int, default=4)
    options = parser.parse_args()

    # One thread a pass: the two videos keep two cores busy. The bundle closes with the last of its sessions.
    with (
        Session.open(options.bundle, threads=1) as first,
        first.sibling() as second,
        ThreadPoolExecutor(2) as pool,
    ):
        videos = list(pool.map(make, (first, second), options.prompts, (options.chunks, options.chunks)))
    for prompt, video in zip(options.prompts, videos, strict=True):
        frames = np.concatenate([chunk.frames for chunk in video])
        seconds = np.median([chunk.timing.total for chunk in video])
        print(f"{prompt}: {len(frames)} frames, mean {frames.mean():.2f}, {seconds:.3f} s a chunk")


if __name__ == "__main__":
    main()
