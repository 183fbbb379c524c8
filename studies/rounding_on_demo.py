"""Whose rounding: videos of the demo model on ONNX Runtime and on torch, both against float64.

    python studies/rounding_on_demo.py [--policies full,forcing-kv] [--seeds 0,1,2,3]

Prints as JSON, for each policy and seed, the largest difference of latents in each of 7 chunks. A video
amplifies what its passes round: two programs that are both right drift apart. The exact video tells how far
each is off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from forcingkv.commands.console import default_prompts
from forcingkv.export import export_bundle
from forcingkv.headmaps import read_headmap
from forcingkv.models.checkpoint import build_model, load_weights
from forcingkv.models.generate import generate
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session, positions
from forcingkv.runtime.graph_records import latent_shape
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.text import encode_words

CHUNKS = 7
MAP = Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json"


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Norms too, which the model takes to float32 whatever it computes in."""
    usual = torch.Tensor.float
    torch.Tensor.float = lambda self: self.double()  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = usual  # type: ignore[method-assign]


def apart(one: Sequence[Any], other: Sequence[Any]) -> list[float]:
    """The largest difference of each chunk."""
    return [float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)]


def compare(policy: str, seeds: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each seed."""
    spec, chosen, prompts = load_spec("demo"), load_policy(policy), default_prompts("demo")
    headmap, weights = read_headmap(MAP) if chosen.needs_headmap else None, load_weights(spec)
    export_bundle(spec, weights, chosen, folder / policy, headmap=headmap, verify=False)
    exact = build_model(spec, permute_heads(weights, spec, head_orders(spec, chosen, headmap))).double()
    with (
        Session.open(folder / policy, backend="onnxruntime") as ort,
        Session.open(folder / policy, backend="torch") as ours,
    ):
        shape = latent_shape(ort.plan)
        for seed in seeds:
            prompt = prompts[seed % len(prompts)]
            made = [
                [chunk.latents for chunk in session.generate(prompt, seed=seed, chunks=CHUNKS)]
                for session in (ort, ours)
            ]

            def noise(chunk: int, step: int, seed: int = seed) -> torch.Tensor:
                return torch.from_numpy(positions.chunk_noise(seed, chunk, step, shape)).double()

            with all_in_float64():
                text = torch.from_numpy(encode_words(spec, prompt)).double()
                true = [chunk.latents.numpy() for chunk in generate(exact, ort.plan, text, noise, CHUNKS)]
            yield {
                "policy": policy,
                "seed": seed,
                "onnxruntime_to_float64": apart(made[0], true),
                "torch_to_float64": apart(made[1], true),
                "onnxruntime_to_torch": apart(*made),
            }


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policies", default="full,forcing-kv")
    parser.add_argument("--seeds", default="0,1,2,3")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    with TemporaryDirectory(prefix="forcingkv-rounding-") as folder:
        rows = [row for name in given.policies.split(",") for row in compare(name, seeds, Path(folder))]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
