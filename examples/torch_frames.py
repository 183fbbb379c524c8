"""Frames as torch tensors, without a copy.

    python examples/torch_frames.py --bundle bundle
    python examples/torch_frames.py --bundle bundle --backend tensorrt-rtx --frames device

`--frames host` gives numpy arrays of your own. `--frames device` leaves frames in the session's memory, on
the GPU where it runs on one. There torch reads them later than Python goes on; `release` tells the session
which stream does, and their memory is written to again behind that. Prints each chunk's
tensor: where it is, its dtype and shape, and the mean of its colours.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.dlpack import from_dlpack

from forcingkv.runtime import Session


def main() -> None:
    """Generate a video and look at it with torch."""
    parser = argparse.ArgumentParser(description="Frames as torch tensors, without a copy.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prompt", default="a 3 moving left and a 7 moving up")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--frames", choices=("host", "device"), default="host")
    options = parser.parse_args()

    kept = []
    with Session.open(options.bundle, backend=options.backend, frames=options.frames) as session:
        for chunk in session.generate(options.prompt, seed=7, chunks=options.chunks):
            frames = from_dlpack(chunk.frames)  # uint8 (frames, height, width, 3), the same memory
            red, green, blue = frames.float().mean(dim=(0, 1, 2)).tolist()
            print(f"chunk {chunk.index}: {frames.dtype} {tuple(frames.shape)} on {frames.device}")
            print(f"  mean red {red:.1f}, green {green:.1f}, blue {blue:.1f}")
            kept.append(frames.clone() if options.frames == "device" else frames)
            if frames.is_cuda:
                chunk.release(torch.cuda.current_stream(frames.device))
    print(f"the video: {tuple(torch.cat(kept).shape)}")


if __name__ == "__main__":
    main()
