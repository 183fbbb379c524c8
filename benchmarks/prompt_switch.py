"""Whether a video follows a new prompt: digits of the demo model after a switch in mid-stream.

    python benchmarks/prompt_switch.py

Each prompt that ships with the model is switched to another one after `--before` chunks, with the caches
made anew and without, under each policy. The judge (`models/demo/judge.py`) reads the digits of each chunk
from the switch on. Prints as JSON, for each, the share of digits that are the new prompt's and the old one's,
chunk by chunk, and the share of prompts of which both new digits are read within two chunks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from forcingkv.commands.console import default_prompts, progress_bar
from forcingkv.export import export_bundle
from forcingkv.headmaps import read_headmap
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo.data import moves_of
from forcingkv.models.demo.judge import grey, read
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy

WITHIN = 2
"""Chunks after which the new digits are asked for."""


def switched(session: Session, prompts: list[str], recache: bool, before: int, after: int) -> dict[str, Any]:
    """Switch each prompt to the one seven places on; what the judge reads afterwards."""
    rows = []
    pairs = [(old, prompts[(place + 7) % len(prompts)]) for place, old in enumerate(prompts)]
    with progress_bar() as shown:
        task = shown.add_task(f"{session.plan.policy.name}, recache {recache}", total=len(pairs))
        for seed, (old, new) in enumerate(pairs):
            video = session.generate(old, seed=seed, chunks=before + after)
            row = []
            for chunk in video:
                if chunk.index == before - 1:
                    video.switch(new, recache=recache)
                elif chunk.index >= before:
                    digits = read(grey(chunk.frames))
                    row.append(
                        [
                            [seen == digit for seen, (digit, _) in zip(digits, moves_of(text), strict=True)]
                            for text in (new, old)
                        ]
                    )
            rows.append(row)
            shown.advance(task)
    found = np.array(rows)  # (prompts, chunks, new or old, halves)
    both = found[:, :, 0].all(2)
    return {
        "policy": session.plan.policy.name,
        "recache": recache,
        "prompts": len(pairs),
        "new_digits_by_chunk": found[:, :, 0].mean((0, 2)).round(3).tolist(),
        "old_digits_by_chunk": found[:, :, 1].mean((0, 2)).round(3).tolist(),
        "both_new_digits_by_chunk": both.mean(0).round(3).tolist(),
        "prompts_followed_within_2_chunks": round(float(both[:, :WITHIN].any(1).mean()), 3),
    }


def main() -> None:
    """Read the options, export a bundle a policy, and switch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policies", default="forcing-kv,window,full")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--before", type=int, default=5, help="chunks under the old prompt")
    parser.add_argument("--after", type=int, default=4, help="chunks under the new one")
    given = parser.parse_args()
    spec = load_spec("demo")
    headmap = read_headmap(Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json")
    rows = []
    with tempfile.TemporaryDirectory() as room:
        for name in given.policies.split(","):
            policy, bundle = load_policy(name), Path(room) / name
            print(f"exporting {name}", file=sys.stderr)
            export_bundle(
                spec,
                load_weights(spec),
                policy,
                bundle,
                headmap=headmap if policy.needs_headmap else None,
                verify=False,
            )
            with Session.open(bundle) as session:
                prompts = default_prompts("demo")[: given.prompts]
                rows += [
                    switched(session, prompts, recache, given.before, given.after)
                    for recache in (True, False)
                ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
