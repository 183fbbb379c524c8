"""`python -m tools.gpu_check`: run the steps, print a line of JSON for each result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.gpu_check.driver import BAD, ROOT, SECONDS, Settings, run_steps
from tools.gpu_check.steps import STEPS

KIT = ROOT / "build" / "gpu-check-kit"
OUT = ROOT / "build" / "gpu-check.jsonl"


def main() -> int:
    """The command; its exit code is 1 where a step did not end as it has to."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--kit", type=Path, default=KIT, help="folder of parts made by `make gpu-check-kit`")
    parser.add_argument("--out", type=Path, default=OUT, help="file for all lines")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all steps together")
    parser.add_argument("--only", metavar="STEP,...", help="these steps alone")
    parser.add_argument("--list", action="store_true", help="list the steps and what each proves")
    given = parser.parse_args()
    if given.list:
        for step in STEPS:
            print(f"{step.name:<14} {step.limit:>4.0f} s  {step.proves}")
        return 0
    names = given.only.split(",") if given.only else [step.name for step in STEPS]
    unknown = sorted(set(names) - {step.name for step in STEPS})
    if unknown:
        parser.error(f"there is no step {', '.join(unknown)}: --list shows those there are")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    kit = given.kit.resolve() if given.kit.is_dir() else None
    settings = Settings(given.seconds, kit, given.out)
    lines = run_steps([step for step in STEPS if step.name in names], settings)
    told = lines[-1]
    counts = ", ".join(f"{count} {status}" for status, count in told["steps"].items())
    print(f"{counts} in {told['seconds']:.0f} s; all lines are in {given.out}", file=sys.stderr)
    for line in lines[:-1]:
        if line["status"] in BAD:
            part = f" ({line['part']})" if "part" in line else ""
            print(f"{line['step']}{part} {line['status']}: {line.get('why', '')}", file=sys.stderr)
    return 1 if told["not_right"] else 0


if __name__ == "__main__":
    sys.exit(main())
