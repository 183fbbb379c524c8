"""Endless video on the demo model: what thousands of chunks do to memory and to the picture.

    python studies/endless.py [--chunks 2000] [--policies window,forcing-kv] [--steps 1000,850,500] [--seed 0]

For each policy, with positions relative to the window and absolute: memory of the process after a tenth of
the chunks and at the end; mean and standard deviation of latents over the first 100 chunks and the last 100,
and how far the means of single chunks spread; shares of digits that the judge reads as prompted. Prints a row
of JSON each. The demo model was trained on absolute positions of short clips.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from forcingkv.export import export_bundle
from forcingkv.headmaps import read_headmap
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo.data import moves_of
from forcingkv.models.demo.judge import grey, read
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy

PROMPT = "a 3 moving left and a 7 moving up"
MAP = Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json"
SPAN = 100
"""Chunks at the start, and at the end, that are compared."""


def run(session: Session, chunks: int, seed: int) -> dict[str, Any]:
    """What a video of so many chunks was."""
    means, deviations, right, resident = [], [], [], []
    wanted = [digit for digit, _ in moves_of(PROMPT)]
    for chunk in session.generate(PROMPT, seed=seed, chunks=chunks):
        means.append(float(chunk.latents.mean()))
        deviations.append(float(chunk.latents.std()))
        if not SPAN <= chunk.index < chunks - SPAN:
            seen = read(grey(np.asarray(chunk.frames)))
            right.append([one == digit for one, digit in zip(seen, wanted, strict=True)])
        resident.append(psutil.Process().memory_info().rss)
    return {
        "chunks": chunks,
        "megabytes": [round(resident[at] / 1e6, 1) for at in (chunks // 10, chunks - 1)],
        "mean": _ends(means),
        "deviation": _ends(deviations),
        "spread of means": [round(float(np.std(part)), 4) for part in (means[:SPAN], means[-SPAN:])],
        "digits read": [round(float(np.mean(part)), 3) for part in (right[:SPAN], right[-SPAN:])],
    }


def _ends(values: npt.ArrayLike) -> list[float]:
    array = np.asarray(values)
    return [round(float(part.mean()), 4) for part in (array[:SPAN], array[-SPAN:])]


def rows(
    policies: list[str], steps: list[float], chunks: int, seed: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for each policy and way of counting positions."""
    spec, headmap = load_spec("demo"), read_headmap(MAP)
    weights = load_weights(spec)
    if steps:
        schedule = replace(spec.schedule, denoising_steps=tuple(steps), redraw_from=None)
        spec = replace(spec, schedule=schedule)
    for name in policies:
        for positions in ("relative", "absolute"):
            file, bundle = folder / f"{name}-{positions}.toml", folder / f"{name}-{positions}"
            file.write_text(f'base = "{name}"\npositions = "{positions}"\n', encoding="utf-8")
            policy = load_policy(str(file))
            of = headmap if policy.needs_headmap else None
            export_bundle(spec, weights, policy, bundle, headmap=of, verify=False)
            with Session.open(bundle, threads=1) as session:
                yield {"policy": name, "positions": positions} | run(session, chunks, seed)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--policies", default="window,forcing-kv")
    parser.add_argument("--steps", default="", help="timesteps of the denoising passes; default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        policies, steps = given.policies.split(","), [float(step) for step in given.steps.split(",") if step]
        for row in rows(policies, steps, given.chunks, given.seed, Path(folder)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
