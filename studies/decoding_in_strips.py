"""A session that decodes frames whole against one that decodes them in strips: seconds, memory, frames.

    python studies/decoding_in_strips.py [--resolution 480p] [--strips 1,4] [--rounds 2]

One layer of a public model with random weights and the real VAE decoder; chunks of one latent frame. Each
session runs in a process of its own, so that its peak of memory can be told, and they take turns. Prints as
JSON, for each number of strips: seconds of decoding each chunk (median over the rounds), the process's peak,
what its footprint counts, and how far its frames are from those of the first number of strips.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.runtime import Session
from forcingkv.runtime.memory import peak_bytes

MODEL = ("--model", "causal-forcing-framewise", "--layers", "1", "--random-weights", "--policy", "window")
CHILD = "--session"


def export(folder: Path, resolution: str, strips: str) -> Path:
    """The bundle of a model whose frames are decoded in so many strips."""
    out = folder / f"strips-{strips}"
    options = ("--resolution", resolution, "--decoder", "wan-vae", "--decode-strips", strips, "--no-verify")
    command = [sys.executable, "-m", "forcingkv", "export", *MODEL, *options, "--out", str(out)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return out


def session(bundle: str, backend: str, chunks: int, out: str) -> dict[str, Any]:
    """What a session took; its frames are written to the file `out`."""
    with Session.open(bundle, backend=backend, preflight=False) as opened:
        shape = (1, opened.spec.text_length, opened.spec.text_width)
        text = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        made = [(chunk.frames, chunk.timing.decode) for chunk in opened.generate(text, seed=1, chunks=chunks)]
        footprint = dict(opened.footprint)
    np.save(out, np.concatenate([np.asarray(frames) for frames, _ in made]))
    return {"decode": [seconds for _, seconds in made], "peak": peak_bytes(), "footprint": footprint}


def in_a_process(bundle: Path, backend: str, chunks: int) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
    """The same in a process of its own, with its frames."""
    out = bundle.parent / f"{bundle.name}.npy"
    command = [sys.executable, __file__, CHILD, str(bundle), backend, str(chunks), str(out)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1]), np.load(out)


def compare(bundles: dict[str, Path], backend: str, chunks: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each number of strips."""
    taken: dict[str, list[dict[str, Any]]] = {strips: [] for strips in bundles}
    frames: dict[str, npt.NDArray[np.uint8]] = {}
    for _ in range(rounds):
        for strips, bundle in bundles.items():
            row, frames[strips] = in_a_process(bundle, backend, chunks)
            taken[strips].append(row)
            print(json.dumps({"strips": strips} | row), file=sys.stderr, flush=True)
    first = next(iter(frames.values())).astype(int)
    return [
        {
            "backend": backend,
            "strips": int(strips),
            "decode_seconds": [median(times) for times in zip(*(row["decode"] for row in rows), strict=True)],
            "peak_bytes": max(row["peak"] for row in rows),
            "footprint": rows[0]["footprint"],
            "levels_apart": int(np.abs(frames[strips].astype(int) - first).max()),
            "pixels_apart": int((frames[strips] != first).sum()),
            "pixels": int(first.size),
        }
        for strips, rows in taken.items()
    ]


def main() -> None:
    """Export, compare and print."""
    if sys.argv[1:2] == [CHILD]:
        bundle, backend, chunks, out = sys.argv[2:]
        print(json.dumps(session(bundle, backend, int(chunks), out)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--resolution", default="480p")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--strips", default="1,4")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    with TemporaryDirectory(prefix="forcingkv-strips-") as folder:
        bundles = {count: export(Path(folder), given.resolution, count) for count in given.strips.split(",")}
        rows = compare(bundles, given.backend, given.chunks, given.rounds)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
