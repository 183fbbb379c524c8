"""The command: spoil files of every format, and count what came of them.

    python -m tests.hostile --inputs 10000 --seed 1 [--format F] [--jobs 2] [--out FOLDER]
    python -m tests.hostile --replay FOLDER/CASE

Exit code 1 if any input ended in a traceback, a crash, a hang, too much memory or an access outside its
folder; those inputs are kept. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tests.hostile.child import FAULTS, OUTCOMES, ROOT, Outcome, log_of, run_child, watch
from tests.hostile.formats import Format, formats

LEAN_MODULES = ("numpy", "onnxruntime", "av", "ftfy", "rich", "cv2", "pytest", "hypothesis")
MODULES = ("torch", "polars", "sklearn", "transformers", "safetensors.torch", "tokenizers", "diffusers")
OURS = (
    *("forcingkv.commands.inspect", "forcingkv.commands.headmap", "forcingkv.measure.planner.report"),
    *(
        "forcingkv.measure.planner.plan_tables",
        "forcingkv.runtime.backends.onnxruntime",
        "forcingkv.runtime.video",
    ),
    *("forcingkv.measure.fidelity.video_files", "tests.conftest"),
)
OURS_WITH_TORCH = (
    *("forcingkv.analyze", "forcingkv.models.checkpoint", "forcingkv.models.text_encoder"),
    *("forcingkv.models.decoders.wan_files",),
)


THREADS = ("OMP", "MKL", "OPENBLAS", "RAYON")


def main() -> int:
    """Run what the command line asks for."""
    # Before anything is imported that reads them. A thread of the parent would be missing in its forks.
    os.environ.update({f"{name}_NUM_THREADS": "1" for name in THREADS}, POLARS_MAX_THREADS="1")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", action="append", help="only this one; may be given again")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--lean", action="store_true", help="only what is read without torch")
    parser.add_argument("--bundle", type=Path, help="a small bundle to spoil; default: one is exported")
    parser.add_argument(
        "--out", type=Path, default=Path("hostile-faults"), help="folder for inputs that failed"
    )
    parser.add_argument("--seeds", type=Path, help="folder of whole files; made where it is not there")
    parser.add_argument("--replay", type=Path, help="a folder that was kept: read it again")
    parser.add_argument("--quiet", action="store_true", help="no line of progress")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-") as work:
        seeds = given.seeds or Path(work, "seeds")
        if not seeds.exists():
            _make_seeds(seeds, given.bundle, given.lean)
        known = [one for one in formats(seeds.absolute()) if one.lean or not given.lean]
        chosen = [one for one in known if not given.format or one.name in given.format]
        if not chosen:
            parser.error(f"no such format; there are {', '.join(one.name for one in known)}")
        _import(lean=all(one.lean for one in chosen))
        gc.freeze()  # or every child would look at all that was imported for garbage, and copy its pages
        watch()
        if given.replay:
            return _replay(given.replay, {one.name: one for one in known}, seeds)
        return _campaign(given, chosen, seeds.absolute(), Path(work).absolute())


def _make_seeds(seeds: Path, bundle: Path | None, lean: bool) -> None:
    seeds.mkdir(parents=True)
    words = [sys.executable, "-m", "tests.hostile.seeds", str(seeds)]
    subprocess.run(
        [*words, *(["--bundle", str(bundle)] if bundle else []), *["--lean"][: int(lean)]],
        check=True,
        cwd=ROOT,
    )


def _import(lean: bool) -> None:
    for name in (*LEAN_MODULES, *OURS, *(() if lean else (*MODULES, *OURS_WITH_TORCH))):
        importlib.import_module(name)


def _cases(chosen: list[Format], inputs: int, seed: int) -> Iterator[tuple[int, Format]]:
    """The inputs, numbered; each format as often as its weight says, in an order that mixes them."""
    rng = Random(f"{seed}")
    weights = [one.weight for one in chosen]
    for number in range(inputs):
        yield number, (chosen[number] if number < len(chosen) else rng.choices(chosen, weights)[0])


def run_case(one: Format, seed: int, number: int, seeds: Path, folder: Path) -> Outcome:
    """One input: a copy of the whole files, spoilt, read. A negative number: not spoilt."""
    from forcingkv.headmaps.errors import InputError
    from forcingkv.runtime.faults import SessionError

    shutil.copytree(seeds / one.seed, folder, copy_function=os.link)
    rng = Random(f"{seed}/{one.name}/{number}")
    prepare = (lambda: None) if number < 0 else partial(one.prepare, rng, folder)
    read = partial(one.read, folder)
    return run_child(folder, prepare, read, (InputError, SessionError), (str(seeds), str(seeds.resolve())))


def _campaign(given: argparse.Namespace, chosen: list[Format], seeds: Path, work: Path) -> int:
    whole: dict[str, str] = {}
    for one in chosen:
        found = run_case(one, 0, -1, seeds, work / f"whole-{one.name}")
        if found.kind != "same":
            print(f"{one.name}: the whole file is {found.kind}: {found.told}", file=sys.stderr)
            return 2
        whole[one.name] = found.value
    started = time.perf_counter()
    places = [work / f"found-{job}" for job in range(given.jobs)]
    children = []
    for job, place in enumerate(places):
        child = os.fork()
        if not child:
            code = 1
            try:
                _worker(given, job, chosen, seeds, work, place, whole, started)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(failed):
        print("a worker of the campaign itself failed", file=sys.stderr)
        return 2
    rows = [json.loads(line) for place in places for line in place.read_text().splitlines()]
    return _report(rows, chosen, time.perf_counter() - started, given.out)


def _worker(
    given: argparse.Namespace,
    job: int,
    chosen: list[Format],
    seeds: Path,
    work: Path,
    place: Path,
    whole: dict[str, str],
    started: float,
) -> None:
    counts: Counter[str] = Counter()
    with place.open("w") as out:
        for number, one in _cases(chosen, given.inputs, given.seed):
            if number % given.jobs != job:
                continue
            folder = work / f"case-{job}"
            found = run_case(one, given.seed, number, seeds, folder)
            kind = "other" if found.kind == "same" and found.value != whole[one.name] else found.kind
            counts[kind] += 1
            row = {
                "format": one.name,
                "number": number,
                "kind": kind,
                "told": found.told,
                "seconds": found.seconds,
                "grown": found.grown,
            }
            print(json.dumps(row), file=out)
            if kind in FAULTS:
                kept = given.out / f"{one.name}-{given.seed}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept)
                (kept / "case.json").write_text(json.dumps(row | {"seed": given.seed}, indent=1))
            shutil.rmtree(folder)
            done = sum(counts.values())
            if job == 0 and not given.quiet and not done % 25:
                rest = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
                at = time.perf_counter() - started
                print(
                    f"\r{done * given.jobs}/{given.inputs} in {at:.0f} s; of half: {rest}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )


def _report(rows: list[dict[str, object]], chosen: list[Format], seconds: float, out: Path) -> int:
    table: dict[str, Counter[str]] = defaultdict(Counter)
    slowest: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    for row in rows:
        table[str(row["format"])][str(row["kind"])] += 1
        slowest[str(row["format"])] = max(slowest[str(row["format"])], row["seconds"])  # type: ignore[assignment,type-var]
        largest[str(row["format"])] = max(largest[str(row["format"])], row["grown"])  # type: ignore[assignment,type-var]
    total = sum(table.values(), Counter())
    print(
        f"\n{'format':<18}{'inputs':>7}"
        + "".join(f"{name:>10}" for name in OUTCOMES)
        + f"{'slowest':>9}{'memory':>9}"
    )
    for name, counts in [*((one.name, table[one.name]) for one in chosen), ("all", total)]:
        numbers = "".join(f"{counts[kind]:>10}" for kind in OUTCOMES)
        tail = (
            f"{slowest[name]:>7.1f} s{largest[name] / 1e6:>6.0f} MB"
            if name != "all"
            else f"{seconds:>7.0f} s"
        )
        print(f"{name:<18}{sum(counts.values()):>7}{numbers}{tail}")
    told: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row in rows:
        if row["kind"] in FAULTS:
            told[str(row["format"]), str(row["kind"]), str(row["told"])[:240]].append(int(str(row["number"])))
    for (name, kind, text), numbers in sorted(told.items(), key=lambda item: -len(item[1])):
        print(f"{kind} x{len(numbers)} {name} ({numbers[0]}): {text}")
    if told:
        print(f"kept in {out}: {sum(map(len, told.values()))} inputs")
    return 1 if told else 0


def _replay(kept: Path, known: dict[str, Format], seeds: Path) -> int:
    from forcingkv.headmaps.errors import InputError
    from forcingkv.runtime.faults import SessionError

    row = json.loads((kept / "case.json").read_text())
    one = known[row["format"]]
    with tempfile.TemporaryDirectory(prefix="hostile-replay-") as place:
        folder = Path(place, "case")
        shutil.copytree(kept, folder)
        found = run_child(
            folder, lambda: None, partial(one.read, folder), (InputError, SessionError), (str(seeds),)
        )
        print(log_of(folder).read_text(errors="replace")[-2000:])
    print(f"{found.kind}: {found.told} ({found.seconds:.2f} s, {found.grown / 1e6:.0f} MB)")
    return int(found.kind in FAULTS)


if __name__ == "__main__":
    sys.exit(main())
