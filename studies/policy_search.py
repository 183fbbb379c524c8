"""Is there a better rule? For a budget of bytes, the policy that does best on both test beds.

    python -m studies.policy_search --out runs/search [--budget forcing-kv] [--workers 2]

Candidates are policies of one memory beside sink and newest frames, for all heads alike or for dynamic heads
alone, exact or in fewer bits, each filled up to the bytes of the policy `--budget`. Successive halving
(Jamieson and Talwalkar, 2016): all are run on few prompts and clips, the best quarter on more, and so on. A
candidate's score is the share of digits read on `demo` plus the share of returning digits that are right on
`demo-occluded`, away no longer than the window.

Prompts, clips and seeds are none of those that `studies.comparison` takes, which gives the verdict, for both
beds:

    python -m studies.comparison --bed demo --policies runs/search/best.toml --out runs/search/verdict

OUT/best.toml has those of the last rung, OUT/rungs.jsonl all scores. Videos are kept in OUT/videos: a run
goes on where another stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
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
from studies.comparison.beds import DTYPE, Bed, demo_bed, occluded_bed

Table = dict[str, Any]

FIRST_SEED = 50000
CLIP_SEED = 1
WITHIN = 4
"""Chunks that digits are away at most: after as many the window still has them."""
RUNGS = ((2, 16), (8, 32), (32, 64))
"""(prompts of demo, clips of demo-occluded) that candidates are run on, rung by rung."""
STAYS = 4
"""One candidate in so many goes on to the next rung."""
BEST = 3
"""How many run on the last rung, and are written, at least."""
SINKS = (0, 1, 3)
ALIKE = "all heads"
STATICS: dict[str, list[Table] | None] = {
    ALIKE: None,
    "dynamic heads": [{"role": "sink", "frames": 1}, {"role": "recent", "frames": 1}],
    "dynamic heads, static ones without sink": [{"role": "recent", "frames": 1}],
}
"""In which heads the memory is, and what static heads see then."""
WINDOW = 18
"""Frames that a head sees at most beside its chunk: as many as in training."""
BITS = (None, "int8", "int4")
"""Of sink and newest frames; those that have another memory beside them are exact."""

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
            f"older {frames} in int4",
            {"role": "strided", "every": 1, "frames": frames, "dtype": "int4"},
        )
        for frames in (3, 6, 9, 12, 15)
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
        """Bytes of keys and values in the last phase, as the comparison counts them.

        Raises InputError where the policy does not fit.
        """
        return build_plan(self.spec, self.spec.geometry(), policy, self.headmap).kv_bytes(DTYPE)


def candidates(models: Sequence[Model], budgets: Sequence[int]) -> Iterator[Policy]:
    """Every policy of the grammar that fits all budgets, each with as many newest frames as they allow."""
    for sink, (memory, table), heads, bits in product(SINKS, MEMORIES, STATICS, BITS):
        if bits and table:
            continue
        largest = None
        for recent in range(1, WINDOW - sink + 1):
            policy = made_of(sink, memory, table, recent, heads, bits)
            try:
                fits = all(m.kv_bytes(policy) <= b for m, b in zip(models, budgets, strict=True))
            except InputError:  # more than the window holds
                break
            if not fits:
                break
            largest = policy
        if largest:
            yield largest


def made_of(
    sink: int, memory: str, table: Table | None, recent: int, heads: str, bits: str | None = None
) -> Policy:
    """A policy of these parts, in these heads (`STATICS`), those of `bits` in as many."""
    dtype = {"dtype": bits} if bits else {}
    first = [{"role": "sink", "frames": sink} | dtype] if sink else []
    roles = [*first, *([table] if table else []), {"role": "recent", "frames": recent} | dtype]
    static = STATICS[heads]
    groups = {ALL: roles} if static is None else {STATIC: [r | dtype for r in static], DYNAMIC: roles}
    words = f"sink {sink}, {memory}, newest {recent}; {heads}{f'; {bits}' if bits else ''}"
    # What is kept in fewer bits cannot be turned with the window.
    positions = "absolute" if bits or "dtype" in (table or {}) else None
    data = {"name": words, "summary": words, "groups": groups, "positions": positions}
    return from_data(Policy, data, words)


def judged(model: Model, bed: Bed, policy: Policy, folder: Path) -> float:
    """The mean of what a bed compares by."""
    made = VariantVideos(model.spec, model.weights, bed.samples, folder)
    videos = made.videos(Variant("search", policy.name, policy, WantedMap("profiled")), model.headmap)
    found = [bed.measure(number, video, video)[bed.quality] for number, video in enumerate(videos)]
    return float(np.mean([value for value in found if value is not None]))


def scored_all(
    policies: Sequence[Policy], size: tuple[int, int], folder: Path, workers: int
) -> Iterator[Scored]:
    """All policies on a rung of `RUNGS`, in order. Each worker has a thread."""
    if workers == 1:
        yield from (scored(policy, size, folder) for policy in policies)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(partial(scored, size=size, folder=folder), policies)


def scored(policy: Policy, size: tuple[int, int], folder: Path) -> Scored:
    """A policy on so many prompts and clips."""
    prompts, clips = size
    beds = demo_bed(prompts, FIRST_SEED), occluded_bed(clips, CLIP_SEED, WITHIN)
    return Scored(policy, *(judged(*pair, policy, folder) for pair in zip(both_models(), beds, strict=True)))


@cache
def both_models() -> tuple[Model, Model]:
    """Those of both beds."""
    return Model.load("demo"), Model.load("demo-occluded")


def search(out: Path, budget: str, workers: int = 1) -> list[Scored]:
    """Successive halving; the last rung, best first. Says on stderr what is done."""
    models, given = both_models(), load_policy(budget)
    left = list(candidates(models, [model.kv_bytes(given) for model in models]))
    print(f"{len(left)} candidates of at most the bytes of {budget}", file=sys.stderr, flush=True)
    found: list[Scored] = []
    for rung, size in enumerate(RUNGS):
        found = []
        # The policy that sets the budget goes all the way, to be compared with.
        for one in scored_all([given, *left], size, out / "videos", workers):
            found.append(one)
            line = {"rung": rung, "policy": one.policy.name, "digits": one.digits, "right": one.right}
            with (out / "rungs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), file=sys.stderr, flush=True)
        found.sort(key=lambda one: -one.score)
        ranked = [one.policy for one in found if one.policy.name != given.name]
        left = ranked[: max(BEST, len(ranked) // STAYS)]
    return found


def best_toml(found: Sequence[Scored], out: Path) -> str:
    """Those of the last rung as a file of variants, with what all are compared with; each policy in a file of
    its own, `best-1.toml` the best."""
    named = {REFERENCE: REFERENCE, PROFILED: PROFILED}
    for number, one in enumerate([one for one in found if one.policy.name not in named], 1):
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
    head = "name", "summary", "positions"
    lines = [f"{name} = {json.dumps(data[name])}" for name in head if data.get(name) is not None]
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
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = search(given.out, given.budget, given.workers)
    write_text(given.out / "best.toml", best_toml(found, given.out))
    for one in found:
        print(f"{one.score:.3f}  digits {one.digits:.1%}  right {one.right:.1%}  {one.policy.name}")


if __name__ == "__main__":
    main()
