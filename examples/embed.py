"""A session in your own program: open a bundle, generate, use the frames.

    python examples/embed.py --bundle bundle --prompt "a 3 moving left and a 7 moving up"

Prints a line for each chunk as soon as it is decoded: its frames, how bright they are, and the seconds it
took. Ends with exit code 2 for wrong input, and with 1 for a video that could not go on.
"""

from __future__ import annotations

import argparse
import sys

from forcingkv.runtime import InputError, Session, SessionError


def main() -> int:
    """Generate a video; the exit code."""
    parser = argparse.ArgumentParser(description="A session in your own program.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prompt", default="a 3 moving left and a 7 moving up")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--chunks", type=int, default=4)
    options = parser.parse_args()

    try:
        with Session.open(options.bundle) as session:
            for chunk in session.generate(options.prompt, seed=options.seed, chunks=options.chunks):
                frames, took = chunk.frames, chunk.timing  # uint8 (frames, height, width, 3), and seconds
                print(
                    f"chunk {chunk.index}: {frames.shape}, mean {frames.mean():.1f},"
                    f" {took.total:.3f} s: denoise {took.denoise:.3f}, clean {took.clean:.3f},"
                    f" decode {took.decode:.3f}",
                    flush=True,
                )
    except InputError as error:  # the bundle or the prompt, or too little memory: the message says what to do
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SessionError as error:  # no fault of the input; the same session could begin another video
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
