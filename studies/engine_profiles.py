"""What optimization profiles cost: the engine of `step`, its phases put into profiles in several ways.

    python studies/engine_profiles.py BUNDLE --sm 89 [--sm 120]

BUNDLE is one for TensorRT-RTX, of a policy with many phases. Each row is a build in a process of its own:
seconds, the engine's bytes, the activation memory that TensorRT plans for its largest profile, and whether
all attention is fused. `--forms` chooses rows: static (a profile for each phase), eight (the last phase
alone, the others in seven), rule (what `runtime/kv/profiles.py` does), two (the last phase alone), one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from forcingkv.export.engine_builder import run_child
from forcingkv.runtime import Bundle
from forcingkv.runtime.flavour import FLAVOURS
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.profiles import MOST_PROFILES, grouped, profiles_of

RTX = FLAVOURS["tensorrt-rtx"]


def _eight(plan: CachePlan) -> list[int]:
    last, shared = len(plan.phases) - 1, MOST_PROFILES - 1
    return sorted({round(last * number / shared) for number in range(shared)} | {last})


FORMS: Mapping[str, Callable[[CachePlan], Sequence[int]]] = {
    "static": lambda plan: range(len(plan.phases)),
    "eight": _eight,
    "rule": lambda plan: [profile.phases.start for profile in profiles_of(plan)],
    "two": lambda plan: sorted({0, len(plan.phases) - 1}),
    "one": lambda plan: [0],
}
"""Name -> the first phase of each profile."""


def row(bundle: Bundle, form: str, sm: int, folder: Path) -> list[str]:
    """The cells of one build."""
    plan, engine = bundle.plan, folder / "step.engine"
    starts = FORMS[form](plan)
    report = run_child(
        bundle.graph("step"),
        RTX,
        plugins="python" if plan.choice else None,
        sm=sm,
        profiles=[profile.shapes for profile in grouped(plan, starts)],
        engine=str(engine),
    )
    return [
        form,
        str(sm),
        str(len(starts)),
        f"{report['seconds']:.1f}",
        f"{engine.stat().st_size / 1e6:.1f}",
        f"{report['activation_bytes'] / 1e6:.1f}",
        f"{report['peak_bytes'] / 1e9:.2f}",
        "no" if report["decomposed"] else "yes",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sm", type=int, action="append", required=True)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    asked = parser.parse_args()
    bundle = Bundle.open(asked.bundle)
    names = ("profiles", "sm", "number", "built in, s", "engine, MB", "activations, MB", "host, GB", "fused")
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for sm in asked.sm:
            for form in asked.forms:
                print("| " + " | ".join(row(bundle, form, sm, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
