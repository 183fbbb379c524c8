"""The whole way at a real geometry: analyze -> export -> generate under every policy, random weights.

    python benchmarks/whole_way.py --model self-forcing --layers 2 --resolution 480p

Runs the commands as a user would, one after the other, and prints for each its seconds and its peak
resident memory, and what generating gave, as JSON. Random embeddings stand in for a text encoder, and
TAEHV with random weights decodes (`--decoder wan-vae` for the VAE).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.policies import load_policy, policy_names
from forcingkv.runtime.text import write_embeds

PROMPT = "a red kite over the dunes"
RULES = {"forcing-kv": "quota", "dummy-forcing": "dummy"}
"""The rule that makes the head map of a policy that needs one."""


def command(*words: object) -> dict[str, Any]:
    """Run a command of forcingkv; its JSON, seconds and peak memory. Says what it does on stderr."""
    print("forcingkv", *words, file=sys.stderr, flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "forcingkv", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: forcingkv {' '.join(map(str, words))}")
    result: dict[str, Any] = json.loads(out)
    seconds = round(time.perf_counter() - started, 1)
    return {"result": result, "seconds": seconds, "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def main() -> None:
    """Read the options and walk the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="self-forcing")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--resolution", default="480p")
    parser.add_argument("--policies", default=",".join(policy_names()))
    parser.add_argument("--decoder", default="taehv")
    parser.add_argument("--chunks", type=int, default=4, help="chunks to analyze and to generate")
    parser.add_argument("--out", type=Path, help="folder to keep; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        out = given.out or Path(room)
        out.mkdir(parents=True, exist_ok=True)
        print(json.dumps(walk(given, out), indent=1))


def walk(given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Analyze once for each rule, then export and generate for each policy."""
    model = out / "model.toml"
    model.write_text(
        f'base = "{given.model}"\nname = "{given.model}-{given.layers}"\nlayers = {given.layers}\n'
    )
    spec = load_spec(str(model))
    tokens = np.random.default_rng(0).standard_normal((20, spec.text_width), dtype=np.float32)
    write_embeds(out / "embeds.safetensors", [PROMPT], [tokens], {"encoder": "random numbers"})
    common = ["--model", model, "--random-weights", "--resolution", given.resolution]
    seconds = (spec.frames_of(given.chunks) - 0.5) / spec.fps
    rows: dict[str, Any] = {}
    for policy in given.policies.split(","):
        row: dict[str, Any] = {}
        headmap: list[object] = []
        if load_policy(policy).needs_headmap:
            heads = out / f"heads-{policy}"
            row["analyze"] = command(
                "analyze",
                "heads",
                *common,
                "--embeds",
                out / "embeds.safetensors",
                "--samples",
                1,
                "--chunks",
                given.chunks,
                "--rule",
                RULES[policy],
                "--out",
                heads,
            )
            row["heads"] = command("headmap", "show", heads / "headmap.json")["result"]["counts"]
            headmap = ["--headmap", heads / "headmap.json"]
        bundle = out / f"bundle-{policy}"
        exported = command(
            "export", *common, *headmap, "--policy", policy, "--decoder", given.decoder, "--out", bundle
        )
        row |= {
            "kv_bytes": exported["result"]["plan"]["kv_bytes"],
            "verification": exported["result"]["verification"],
            "export": exported,
            "generate": command(
                "generate",
                "--bundle",
                bundle,
                "--embeds",
                out / "embeds.safetensors",
                "--seconds",
                seconds,
                "--out",
                out / f"{policy}.mp4",
            ),
        }
        row["generated"] = row["generate"]["result"]
        for stage in ("analyze", "export", "generate"):
            row.get(stage, {}).pop("result", None)
        rows[policy] = row
    return {"model": given.model, "layers": given.layers, "resolution": given.resolution, "policies": rows}


if __name__ == "__main__":
    main()
