"""What head maps cost under the policies that use them, in memory and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from forcingkv.analyze.labels import policy_of
from forcingkv.analyze.report.page import node, table
from forcingkv.headmaps import HeadMap, InputError
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec

FULL = "full"
OPERATIONS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


class Cost(NamedTuple):
    """Of the last phase of a video, which never ends."""

    kv_bytes: int
    """Keys and values that attention reads, in the model's dtype."""
    flops: int
    """Floating-point operations of a chunk."""


def costs(spec: ModelSpec, maps: Mapping[str, HeadMap]) -> dict[str, dict[str, Cost | str]]:
    """Map and policy -> resolution -> what it takes, or why it cannot be planned.

    The policy `full` comes first. Resolutions are those the model names, the smallest first; its default if
    it names none.
    """
    sizes = spec.resolutions or {f"{spec.width}x{spec.height}": (spec.width, spec.height)}
    named = sorted(sizes, key=lambda name: math.prod(sizes[name]))
    rows: dict[str, tuple[str, HeadMap | None]] = {f"all heads, {FULL}": (FULL, None)}
    rows |= {f"{name}, {policy_of(found)}": (policy_of(found), found) for name, found in maps.items()}
    return {title: {name: _cost(spec, name, *row) for name in named} for title, row in rows.items()}


def _cost(spec: ModelSpec, resolution: str, policy: str, headmap: HeadMap | None) -> Cost | str:
    try:
        plan = build_plan(spec, spec.geometry(resolution), load_policy(policy), headmap)
    except InputError as error:
        return error.what
    return Cost(plan.kv_bytes(spec.dtype), chunk_flops(plan))


def cost_table(spec: ModelSpec, maps: Mapping[str, HeadMap]) -> str:
    """The costs as a table of the page, each beside its share of what the policy `full` takes."""
    found = costs(spec, maps)
    full = next(iter(found.values()))
    top = ["", *(node("th", _resolution(spec, name), colspan=2, scope="colgroup") for name in full)]
    under = ["map and policy", *("KV memory", "work a chunk") * len(full)]
    rows = [
        [title, *(cell for name, cost in given.items() for cell in _cells(cost, full[name]))]
        for title, given in found.items()
    ]
    caption = (
        f"Cost in the last phase, and its share of what the policy {FULL} takes. KV memory in {spec.dtype};"
        " work: the floating-point operations of all passes of a chunk"
    )
    return table(caption, [top, under], rows)


def _cells(cost: Cost | str, full: Cost | str) -> list[str]:
    if isinstance(cost, str):
        return [node("td", f"cannot be planned: {cost}", colspan=2, klass="words")]
    whole = cost if isinstance(full, str) else full
    texts = (readable(cost.kv_bytes), _operations(cost.flops))
    shares = [f"{part / of:.0%}" for part, of in zip(cost, whole, strict=True)]
    return [
        node("td", text, node("span", share, klass="share"))
        for text, share in zip(texts, shares, strict=True)
    ]


def _resolution(spec: ModelSpec, name: str) -> str:
    size = spec.resolutions.get(name)
    return f"{name} ({size[0]}x{size[1]})" if size else name


def _operations(value: float) -> str:
    """Three digits, in the largest unit that keeps them before the thousands."""
    power = 0
    while value >= 1000 and power < len(OPERATIONS) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:,.0f}" if value >= 100 or not power else f"{value:#.3g}"
    return f"{digits} {OPERATIONS[power]}"
