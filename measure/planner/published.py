"""Published figures beside what the planner predicts, and the constant that was fitted to one of them.

All of it is data: `published.json`, which `python studies/planner_fit.py` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from forcingkv.headmaps.reading import parse_json
from forcingkv.measure.planner.gpus import Gpu
from forcingkv.runtime.footprint import readable

FILE = "published.json"
BOUND = 0.15
"""Relative error above which a row gives a reason."""


@cache
def _file() -> Any:
    return parse_json((resources.files(__package__) / FILE).read_bytes(), FILE)


def efficiencies() -> dict[str, Any]:
    """The constant of each class of GPUs.

    `value`: share of the peak that kernels reach. `rows`, `gpus`: figures it was fitted to, and where they
    were measured. `carried_from`: the class it was taken over from, where no GPU of its own has a figure.
    `lowest`, `highest`: the least and the most that published FPS under the policy full need.
    """
    constants: dict[str, Any] = _file()["efficiency"]
    return constants


def published_data() -> dict[str, Any]:
    """The constants and all rows, for JSON: each row with its prediction and relative error."""
    return {name: _file()[name] for name in ("efficiency", "rows")}


def basis(gpu: Gpu) -> str:
    """Where the constant of a GPU comes from, as a phrase."""
    constant = efficiencies()[gpu.family]
    if gpu.key in constant["gpus"]:
        return f"fitted to {'; '.join(constant['rows'])}"
    origin = constant["carried_from"]
    near = f"of the class {origin}" if origin else "of the same class"
    return f"taken over from {', '.join(constant['gpus'])} {near}: not fitted, never measured"


def uncertainty() -> str:
    """How near predictions are to the published figures that nothing was fitted to, as a sentence."""
    others = [one for one in _file()["rows"] if not one["row"]["fitted"]]
    near = sum(not one["off"] for one in others)
    most = max(abs(one["error"]) for one in others)
    return (
        f"Of {len(others)} published figures that nothing was fitted to, {near} are predicted within"
        f" {BOUND:.0%}; the others are off by up to {most:.0%} (forcingkv plan --published)."
    )


def published_lines() -> Iterator[str]:
    """Published figures against predictions: Markdown."""
    figures = [(one, one["row"]) for one in _file()["rows"]]
    for name, constant in efficiencies().items():
        origin = f"fitted to {', '.join(constant['rows'])}"
        if constant["carried_from"]:
            origin = f"carried over from `{constant['carried_from']}`: not fitted, never measured"
        yield f"- efficiency of class `{name}`: {constant['value']:.4f}, {origin}"
    columns = "setting, measure, published, predicted, error, efficiency needed"
    yield from ("", f"| {columns.replace(', ', ' | ')} | frames needed, policy | frames needed, full |")
    yield "|---" * 8 + "|"
    for one, row in figures:
        error = f"**{one['error']:+.1%}**" if one["off"] else f"{one['error']:+.1%}"
        cells = (
            row["name"],
            row["measure"],
            *(_figure(row["measure"], value) for value in (row["published"], one["predicted"])),
            "fitted" if row["fitted"] else error,
            "" if one["needed"] is None else f"{one['needed']:.2f}",
            *("" if one[n] is None else f"{one[n]:.1f}" for n in ("policy_frames", "full_frames")),
        )
        yield f"| {' | '.join(cells)} |"
    yield from ("", f"Off by more than {BOUND:.0%}, and why:", "")
    for one, row in figures:
        if one["off"]:
            yield f"- {row['name']}, {row['measure']} ({one['error']:+.1%}): {row['reason']}."
    yield from ("", "Assumed, since the source does not say it:", "")
    for _, row in figures:
        if row["note"] and not row["fitted"]:
            yield f"- {row['name']}, {row['measure']}: {row['note']}."


def _figure(measure: str, value: float) -> str:
    if measure == "kv_bytes":
        return readable(round(value))
    return f"{value:.0%}" if measure == "attention_share" else f"{value:.2f}"
