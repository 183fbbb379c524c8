"""A long video that outlives its process: its state is saved every few chunks.

    python examples/resume.py --bundle bundle --state state --out frames.rgb --chunks 40

Kill it at any time and start it again with the same words: it goes on from the last saved state, to the bit,
and `frames.rgb` (raw rgb24) becomes what it would have been. With a larger `--chunks` it makes a finished
video longer. Prints each chunk and each save.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forcingkv.runtime import Session


def main() -> None:
    """Begin a video, or go on with it."""
    parser = argparse.ArgumentParser(description="A long video that outlives its process.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder of the state")
    parser.add_argument("--out", type=Path, required=True, help="file of raw frames")
    parser.add_argument("--prompt", default="a 3 moving left and a 7 moving up")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="chunks between two saves")
    options = parser.parse_args()

    with Session.open(options.bundle) as session, options.out.open("ab") as file:
        if (options.state / "state.json").is_file():  # it is written last: the state is whole
            video = session.restore(options.state)
            print(f"going on with chunk {video.index}")
        else:
            video = session.generate(options.prompt, seed=7)  # without end
        width, height = session.bundle.manifest.frame_size
        size = session.spec.frames_of(video.index) * width * height * 3
        if file.tell() < size:
            parser.error(f"{options.out} is not the file that goes with {options.state}")
        file.truncate(size)  # chunks that came after the save are made again
        while video.index < options.chunks:
            chunk = next(video)
            file.write(chunk.frames)
            print(f"chunk {chunk.index}", flush=True)
            if video.index % options.every == 0:
                file.flush()  # first the frames, then the state that counts on them
                video.save(options.state)
                print(f"saved: chunk {video.index} comes next", flush=True)


if __name__ == "__main__":
    main()
