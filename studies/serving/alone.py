"""The same video without a service, in a process of its own: what the processor can do.

    python -m studies.serving.alone --bundle B --seconds 10 --frames rgb24

Prints JSON: frames a second, and seconds to the first chunk of a session that is open.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from forcingkv.runtime import Session
from forcingkv.serve.frame_coding import coder_for
from studies.serving.clients import PROMPT


def main() -> None:
    """Make a video for so long, and print how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--skip", type=float, default=2.0, help="seconds at the beginning that do not count")
    parser.add_argument("--frames", default="rgb24")
    given = parser.parse_args()
    with Session.open(given.bundle) as session:
        width, height = session.bundle.manifest.frame_size
        coder = coder_for(given.frames, width, height, session.spec.fps, 1, 0)
        began, first, counted = time.monotonic(), 0.0, 0
        for chunk in session.generate(PROMPT, seed=1, chunks=None):
            coder.parts(chunk.frames)
            past = time.monotonic() - began
            first = first or past
            if past > given.seconds:
                break
            counted += len(chunk.frames) if past > given.skip else 0
        coder.close()
    print(json.dumps({"first": first, "rate": counted / (given.seconds - given.skip)}))


if __name__ == "__main__":
    main()
