"""The rule `budget`: as many dynamic heads as a target of memory or time allows.

Dynamic heads cost more than static ones. The heads with the lowest recency scores stay dynamic for as
long as the target is met, and the others are made static.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from forcingkv.analyze.labels import Decision, label_rows, least_static
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.headmaps.headmap import Budget
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.plan import CachePlan, build_plan
from forcingkv.runtime.policies import load_policy
from forcingkv.runtime.spec import ModelSpec

Array = npt.NDArray[np.float64]


def decide_budget(scores: Array, spec: ModelSpec, budget: Budget, sink_frames: int) -> Decision:
    """The decision with the most dynamic heads that meets the target.

    Args:
        scores: mean recency scores (layers, heads).
        spec: the model.
        budget: exactly one target: bytes of keys and values in the model's dtype, or predicted time
            over that of `full`. Time is predicted as operations (`runtime.cost`): what a machine
            that is busy with arithmetic alone would need.
        sink_frames: frames left out of the scores' denominators, to be recorded.

    Raises:
        InputError: no target or two, or one that even all static heads do not meet.
    """
    cost, target, unit = _target(spec, budget)
    heads = scores.size
    order = np.argsort(scores, axis=None, kind="stable")

    def meets(dynamic: int) -> bool:
        static = np.ones(heads, bool)
        static[order[:dynamic]] = False
        return cost(plan_for(spec, static.reshape(scores.shape), budget)) <= target

    if not meets(0):
        # Rounded up, so that what is named can be asked for.
        least = math.ceil(cost(plan_for(spec, np.ones(scores.shape, bool), budget)) * 1e6) / 1e6
        raise InputError(
            f"the target {target:.15g} {unit} cannot be met",
            where="budget",
            expected=f"at least {least:.15g} {unit}, which is what static heads alone take",
        )
    # Costs rise with the number of dynamic heads: the last count that meets the target.
    low, high = 0, heads
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if meets(middle) else (low, middle - 1)
    return least_static(scores, heads - low, Rule("budget", sink_frames=sink_frames, budget=budget))


def plan_for(spec: ModelSpec, static: npt.NDArray[np.bool_], budget: Budget) -> CachePlan:
    """The plan of the budget's policy with those heads static (layers, heads)."""
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    headmap = HeadMap(identity, label_rows(static), Rule("budget"))
    return build_plan(spec, spec.geometry(budget.resolution), load_policy(budget.policy), headmap)


def _target(spec: ModelSpec, budget: Budget) -> tuple[Callable[[CachePlan], float], float, str]:
    if (budget.kv_bytes is None) == (budget.time_ratio is None):
        raise InputError(
            "names no target, or two",
            where="budget",
            expected="bytes of KV or a share of the time under full",
            hint="Give one of --target-kv and --target-time.",
        )
    if budget.kv_bytes is not None:
        return (lambda plan: plan.kv_bytes(spec.dtype)), budget.kv_bytes, "bytes"
    assert budget.time_ratio is not None
    full = chunk_flops(build_plan(spec, spec.geometry(budget.resolution), load_policy("full")))
    return (lambda plan: chunk_flops(plan) / full), budget.time_ratio, "of the time under full"
