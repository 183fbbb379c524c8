"""What head maps cost under the policies that use them, in memory and arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forcingkv.analyze.labels import policy_of
from forcingkv.analyze.report.page import node, table
from forcingkv.headmaps import HeadMap, InputError
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec

FULL = "full"
OPERATIONS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


@dataclass(frozen=True)
class Cost:
    """Of the last phase of a video, which never ends."""

    kv_bytes: int
    """Keys and values that attention reads, in the model's dtype."""
    flops: int
    """Floating-point operations of a chunk."""
    kv_share: float = 1.0
    """Share of what the policy `full` takes."""
    flops_share: float = 1.0


def resolutions(spec: ModelSpec) -> tuple[str, ...]:
    """The model's named resolutions, the smallest first; its default if it names none."""
    named = sorted(spec.resolutions, key=lambda name: spec.resolutions[name][0] * spec.resolutions[name][1])
    return tuple(named) or (f"{spec.width}x{spec.height}",)


def full_costs(spec: ModelSpec) -> dict[str, Cost | str]:
    """Resolution -> what the policy `full` takes, or why it cannot be planned."""
    return {name: _cost(spec, name, FULL, None) for name in resolutions(spec)}


def costs(spec: ModelSpec, maps: Mapping[str, HeadMap]) -> dict[str, dict[str, Cost | str]]:
    """Name of a map -> resolution -> what it takes beside `full`, or why it cannot be planned."""
    full = full_costs(spec)
    return {
        name: {
            resolution: _beside(_cost(spec, resolution, policy_of(headmap), headmap), full[resolution])
            for resolution in full
        }
        for name, headmap in maps.items()
    }


def _cost(spec: ModelSpec, resolution: str, policy: str, headmap: HeadMap | None) -> Cost | str:
    try:
        plan: CachePlan = build_plan(spec, spec.geometry(resolution), load_policy(policy), headmap)
    except InputError as error:
        return error.what
    return Cost(plan.kv_bytes(spec.dtype), chunk_flops(plan))


def _beside(cost: Cost | str, full: Cost | str) -> Cost | str:
    if isinstance(cost, str) or isinstance(full, str):
        return cost
    return Cost(cost.kv_bytes, cost.flops, cost.kv_bytes / full.kv_bytes, cost.flops / full.flops)


def cost_table(spec: ModelSpec, maps: Mapping[str, HeadMap]) -> str:
    """The same as a table of the page, the policy `full` first."""
    full = full_costs(spec)
    top = ["", *(node("th", _resolution(spec, name), colspan=2, scope="colgroup") for name in full)]
    under = ["map and policy", *(text for _ in full for text in ("KV memory", "work a chunk"))]
    rows = [[f"all heads, {FULL}", *(cell for cost in full.values() for cell in _cells(cost))]]
    for name, given in costs(spec, maps).items():
        rows.append(
            [f"{name}, {policy_of(maps[name])}", *(cell for cost in given.values() for cell in _cells(cost))]
        )
    caption = (
        f"Cost in the last phase, and its share of what the policy {FULL} takes. KV memory in {spec.dtype};"
        " work: the floating-point operations of all passes of a chunk"
    )
    return table(caption, [top, under], rows)


def _cells(cost: Cost | str) -> list[str]:
    if isinstance(cost, str):
        return [node("td", f"cannot be planned: {cost}", colspan=2, klass="words")]
    return [
        node("td", value, node("span", f"{share:.0%}", klass="share"))
        for value, share in (
            (readable(cost.kv_bytes), cost.kv_share),
            (_operations(cost.flops), cost.flops_share),
        )
    ]


def _resolution(spec: ModelSpec, name: str) -> str:
    if name not in spec.resolutions:
        return name
    width, height = spec.resolutions[name]
    return f"{name} ({width}x{height})"


def _operations(value: float) -> str:
    """Three digits, in the largest unit that keeps them before the thousands."""
    power = 0
    while value >= 1000 and power < len(OPERATIONS) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:,.0f}" if value >= 100 or not power else f"{value:#.3g}"
    return f"{digits} {OPERATIONS[power]}"
