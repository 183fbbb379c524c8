"""Is there a better rule? For a budget of bytes, the policy that does best on both test beds.

    python -m studies.policy_search --out runs/search [--budget forcing-kv]

Candidates are policies of one memory beside sink and newest frames, for all heads alike or for dynamic heads
alone, each filled up to the bytes of the policy `--budget`. Successive halving (Jamieson and Talwalkar,
2016): all are run on few prompts and clips, the best third on twice as many, and so on. A candidate's score
is the share of digits read on `demo` plus the share of returning digits that are right on `demo-occluded`,
away no longer than the window.

Prompts, clips and seeds are none of those that `studies.comparison` takes, which gives the verdict, for both
beds:

    python -m studies.comparison --bed demo --policies runs/search/best.toml --out runs/search/verdict

OUT/best.toml has the best ones, OUT/rungs.jsonl all scores. Videos are kept in OUT/videos: a run goes on
where another stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forcingkv.headmaps import DYNAMIC, STATIC, HeadMap, InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.headmaps.writing import write_text
from forcingkv.measure.nominal import shipped_map
from forcingkv.models.checkpoint import Weights, load_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import ALL, Policy, load_policy
from forcingkv.runtime.spec import ModelSpec
from studies.ablation.variant_videos import VariantVideos
from studies.ablation.variants import PROFILED, REFERENCE, Variant, WantedMap
from studies.comparison.beds import Bed, demo_bed, occluded_bed

Table = dict[str, Any]

FIRST_SEED = 50000
CLIP_SEED = 1
WITHIN = 4
"""Chunks that digits are away at most: after as many the window still has them."""
RUNGS = ((4, 16), (12, 32), (32, 64))
"""(prompts of demo, clips of demo-occluded) that candidates are run on, rung by rung."""
STAYS = 3
"""One candidate in so many goes on to the next rung."""
BEST = 3
"""How many are written at the end, at least."""
SINKS = (0, 1, 3)
ALIKE = "all heads"
STATICS: dict[str, list[Table] | None] = {
    ALIKE: None,
    "dynamic heads": [{"role": "sink", "frames": 1}, {"role": "recent", "frames": 1}],
    "dynamic heads, static ones without sink": [{"role": "recent", "frames": 1}],
}
"""In which heads the memory is, and what static heads see then."""
MOST_RECENT = 15

MEMORIES: tuple[tuple[str, Table | None], ...] = (
    ("none", None),
    *(
        (f"every {every}th of {frames}", {"role": "strided", "every": every, "frames": frames})
        for every, frames in product((3, 6), (1, 2, 3))
    ),
    *(
        (f"bank of {frames} of every {every}th", {"role": "bank", "frames": frames, "every": every})
        for every, frames in product((1, 3), (1, 2, 3))
    ),
    *(
        (
            f"{blocks} frames merged by {patch}",
            {"role": "merged", "frames": 1, "patch": patch, "blocks": blocks},
        )
        for patch, blocks in ((2, 2), (2, 4), (2, 8), (4, 8))
    ),
    *(
        (
            f"{frames:g} tokens by {score}{', together' * together}",
            {"role": "tokens", "frames": frames, "score": score, "together": together},
        )
        for frames, score, together in product(
            (0.5, 1.0, 1.5, 2.0, 2.5, 3.0), ("queries", "similarity"), (False, True)
        )
    ),
)


@dataclass(frozen=True)
class Scored:
    """A candidate and what it was worth on a rung."""

    policy: Policy
    digits: float
    right: float

    @property
    def score(self) -> float:
        return self.digits + self.right


@dataclass(frozen=True)
class Model:
    """A model of a bed, and its own head map."""

    spec: ModelSpec
    weights: Weights
    headmap: HeadMap

    @classmethod
    def load(cls, name: str) -> Model:
        """The demo model of that name. Raises InputError where no head map ships with it."""
        spec = load_spec(name)
        headmap = shipped_map(spec, load_policy(PROFILED))
        if headmap is None:
            raise InputError("has no head map that ships", where=name)
        return cls(spec, load_weights(spec), headmap)

    def kv_bytes(self, policy: Policy) -> int:
        """Bytes of keys and values in the last phase. Raises InputError where the policy does not fit."""
        return build_plan(self.spec, self.spec.geometry(), policy, self.headmap).kv_bytes()


def candidates(models: Sequence[Model], budgets: Sequence[int]) -> Iterator[Policy]:
    """Every policy of the grammar that fits all budgets, each with as many newest frames as they allow."""
    for sink, (memory, table), heads in product(SINKS, MEMORIES, STATICS):
        largest = None
        for recent in range(1, MOST_RECENT + 1):
            policy = made_of(sink, memory, table, recent, heads)
            try:
                fits = all(m.kv_bytes(policy) <= b for m, b in zip(models, budgets, strict=True))
            except InputError:  # more than the window holds
                break
            if not fits:
                break
            largest = policy
        if largest:
            yield largest


def made_of(sink: int, memory: str, table: Table | None, recent: int, heads: str) -> Policy:
    """A policy of these parts, in these heads (`STATICS`)."""
    first = [{"role": "sink", "frames": sink}] if sink else []
    roles = [*first, *([table] if table else []), {"role": "recent", "frames": recent}]
    static = STATICS[heads]
    groups = {ALL: roles} if static is None else {STATIC: static, DYNAMIC: roles}
    words = f"sink {sink}, {memory}, newest {recent}; {heads}"
    return from_data(Policy, {"name": words, "summary": words, "groups": groups}, words)


def judged(model: Model, bed: Bed, policy: Policy, folder: Path) -> float:
    """The mean of what a bed compares by."""
    made = VariantVideos(model.spec, model.weights, bed.samples, folder)
    videos = made.videos(Variant("search", policy.name, policy, WantedMap("profiled")), model.headmap)
    found = [bed.measure(number, video, video)[bed.quality] for number, video in enumerate(videos)]
    return float(np.mean([value for value in found if value is not None]))


def search(out: Path, budget: str) -> list[Scored]:
    """Successive halving; the last rung, best first. Says on stderr what is done."""
    models = [Model.load("demo"), Model.load("demo-occluded")]
    given = load_policy(budget)
    left = list(candidates(models, [model.kv_bytes(given) for model in models]))
    print(f"{len(left)} candidates of at most the bytes of {budget}", file=sys.stderr, flush=True)
    scored: list[Scored] = []
    for rung, (prompts, clips) in enumerate(RUNGS):
        beds = demo_bed(prompts, FIRST_SEED), occluded_bed(clips, CLIP_SEED, WITHIN)
        scored = []
        # The policy that sets the budget goes all the way, to be compared with.
        for policy in [given, *left]:
            shares = [judged(*pair, policy, out / "videos") for pair in zip(models, beds, strict=True)]
            scored.append(Scored(policy, *shares))
            line = {"rung": rung, "policy": policy.name, "digits": shares[0], "right": shares[1]}
            with (out / "rungs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), file=sys.stderr, flush=True)
        scored.sort(key=lambda one: -one.score)
        ranked = [one.policy for one in scored if one.policy is not given]
        left = ranked[: max(BEST, len(ranked) // STAYS)]
    return scored


def best_toml(scored: Sequence[Scored], out: Path) -> str:
    """The best as a file of variants, with what all are compared with; each policy in a file of its own."""
    named = {REFERENCE: REFERENCE, PROFILED: PROFILED}
    for number, one in enumerate([one for one in scored if one.policy.name not in named][:BEST], 1):
        file = out / f"best-{number}.toml"
        write_text(file, policy_toml(replace(one.policy, name=f"best-{number}")))
        named[one.policy.name] = str(file.resolve())
    sweeps = [
        f'[[sweep]]\nfamily = "search"\nname = {json.dumps(name)}\npolicy = {json.dumps(policy)}\n'
        for name, policy in named.items()
    ]
    return "\n".join(sweeps)


def policy_toml(policy: Policy) -> str:
    """The policy as TOML. JSON writes strings, numbers and booleans as TOML does."""
    data = to_data(policy)
    lines = [f"{name} = {json.dumps(data[name])}" for name in ("name", "summary")]
    lines.append("\n[groups]")
    for label, roles in data["groups"].items():
        shown = [
            "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in role.items() if v is not None) + " }"
            for role in roles
        ]
        lines.append(f"{label} = [{', '.join(shown)}]")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the options, search, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--budget", default=PROFILED, help="a policy's name: candidates take at most its bytes"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    scored = search(given.out, given.budget)
    write_text(given.out / "best.toml", best_toml(scored, given.out))
    for one in scored:
        print(f"{one.score:.3f}  digits {one.digits:.1%}  right {one.right:.1%}  {one.policy.name}")


if __name__ == "__main__":
    main()
