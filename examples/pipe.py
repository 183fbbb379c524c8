"""Frames into another process, as they are made.

    python examples/pipe.py --bundle bundle
    python examples/pipe.py --bundle bundle --to "ffmpeg -f rawvideo -pix_fmt rgb24 -s 48x32 -i - out.mp4"

The other process reads raw rgb24 from its standard input: frame after frame, row after row, three bytes a
pixel. Without `--to` it is a Python that prints each frame's mean brightness. The command line can do it too:

    forcingkv generate --bundle bundle --prompt "..." --out - | ffmpeg -f rawvideo -pix_fmt rgb24 -s 48x32 \
        -r 8 -i - out.mp4
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

from forcingkv.runtime import Session

READER = """import sys
size = int(sys.argv[1])
while frame := sys.stdin.buffer.read(size):
    print(f"brightness {sum(frame) / size:.2f}", flush=True)
"""


def main() -> None:
    """Generate a video into a pipe."""
    parser = argparse.ArgumentParser(description="Frames into another process.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prompt", default="a 3 moving left and a 7 moving up")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--to", help="command that reads the frames")
    options = parser.parse_args()

    with Session.open(options.bundle) as session:
        width, height = session.bundle.manifest.frame_size
        reader = [sys.executable, "-c", READER, str(width * height * 3)]
        command = shlex.split(options.to) if options.to else reader
        sent = 0
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            assert child.stdin is not None
            for chunk in session.generate(options.prompt, seed=7, chunks=options.chunks):
                child.stdin.write(chunk.frames)
                child.stdin.flush()
                sent += len(chunk.frames)
    print(f"{sent} frames of {width}x{height} sent; the reader ended with exit code {child.returncode}")


if __name__ == "__main__":
    main()
