"""How fast every shipped policy is, with a clean pass and without, beside what arithmetic alone would give.

    python -m studies.speed_of_policies [--model self-forcing] [--layers 2] [--resolution 480p] [--rounds 3]
        [--policies full,window,...] [--backend onnxruntime] [--threads N] [--page docs/benchmarks.md]

Typical layers with random weights, as `forcingkv bench` has them; policies take turns, round by round. In a
turn a denoising pass and the pass that fills the cache are timed, in the last phase. A chunk with `context`
clean is all denoising passes and the latter; with last, which is the same work at another timestep, one
denoising pass fewer. Ratios are to `full` with its clean pass, of the same round; the limit is that of
operations (`runtime/cost.py`), and the share is the ratio's part of it. Decoding is not counted.

Prints a table as Markdown, and writes it into the page between its marks, if one is given.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from forcingkv.headmaps import InputError
from forcingkv.headmaps.writing import write_text
from forcingkv.measure.bench.cases import preset_cases
from forcingkv.measure.bench.results import machine
from forcingkv.measure.bench.turns import BenchCase, BenchSetup, BenchTurns, take_turns
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.kv.policies import policy_names
from forcingkv.runtime.schedule import FilledBy
from studies.ablation.__main__ import page_with

MARKS = "<!-- speed of policies: begin -->", "<!-- speed of policies: end -->"
CONTEXTS: tuple[FilledBy, ...] = get_args(FilledBy)
HEADING = "## Every policy, with its clean pass and without"
COLUMNS = ("policy", "context", "passes", "s a chunk", "ratio to `full`", "limit", "share")


def run_by(bundle: Bundle, context: FilledBy) -> Bundle:
    """A bundle whose cache is filled by that pass: its graphs know nothing of it."""
    model = bundle.manifest.model.filled_by(context)
    return Bundle(bundle.path, replace(bundle.manifest, model=model), bundle.headmap)


def rows_of(measured: Sequence[BenchTurns]) -> Iterator[dict[str, Any]]:
    """A row for each policy and context.

    Raises InputError where `full`, which all are compared with, was not timed.
    """
    full = next((one for one in measured if one.policy == "full"), None)
    if full is None:
        raise InputError("lacks full, which others are compared with", where="--policies")
    for one in measured:
        for context in CONTEXTS:
            plan = run_by(one.bundle, context).plan
            seconds = [_chunk_seconds(one, context, number) for number in range(len(one.turns))]
            against = [_chunk_seconds(full, "clean", number) for number in range(len(one.turns))]
            ratios = [wide / own for wide, own in zip(against, seconds, strict=True)]
            limit = chunk_flops(run_by(full.bundle, "clean").plan) / chunk_flops(plan)
            schedule = plan.spec.schedule
            yield {
                "policy": one.policy,
                "context": context,
                "passes": len(schedule.later) + schedule.clean_passes,
                "seconds": statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
                "limit": limit,
                "share": statistics.median(ratios) / limit,
            }


def _chunk_seconds(one: BenchTurns, context: FilledBy, number: int) -> float:
    """Of a chunk in one round."""
    case = replace(one.case, bundle=run_by(one.bundle, context))
    return BenchTurns(case, [one.turns[number]]).chunk_seconds


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, the fastest last."""
    lines = [
        f"| `{row['policy']}` | {row['context']} | {row['passes']} | {row['seconds']:.2f} |"
        f" {row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f}) | {row['limit']:.2f} |"
        f" {row['share']:.2f} |"
        for row in sorted(rows, key=lambda row: row["limit"])
    ]
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*head, *lines]) + "\n"


def main() -> None:
    """Read the options, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="self-forcing")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--resolution", default="480p")
    parser.add_argument("--policies", default=",".join(policy_names()))
    parser.add_argument("--backend", choices=("onnxruntime", "torch"), default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    setup = BenchSetup(given.rounds, given.threads, decode=False)
    with preset_cases(
        load_spec(given.model),
        given.policies.split(","),
        layers=given.layers,
        resolution=given.resolution,
        ways=((given.backend, "float32"),),
    ) as cases:
        measured = take_turns(cases, setup, progress=_say)
        made = table([*rows_of(measured)])
        about = _about(given, cases[0], len(measured[0].turns))
    print(made, end="")
    if given.page:
        text = given.page.read_text(encoding="utf-8")
        write_text(given.page, page_with(text, f"{about}\n\n{made}", MARKS))


def _about(given: argparse.Namespace, case: BenchCase, rounds: int) -> str:
    where = machine(given.threads)
    command = shlex.join(["python", "-m", "studies.speed_of_policies", *sys.argv[1:]])
    threads = f"{where['threads']} thread{'s'[: where['threads'] > 1]} of {where['processor']}"
    return (
        f"{HEADING}\n\n`{command}`: {given.model}, {given.layers} layers at"
        f" {case.bundle.plan.geometry.described}, {case.backend} in {case.dtype}, {threads}, {rounds} rounds."
        " A chunk with `context` last has no clean pass; ratios are to `full` with it, and the limit is that"
        " of operations."
    )


def _say(doing: str) -> None:
    print(doing, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
