"""The rule `budget`: the most dynamic heads that a target of memory or time allows, and not one more."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.analyze.labels import decide_budget, plan_for
from forcingkv.headmaps import InputError, Rule
from forcingkv.headmaps.headmap import Budget
from forcingkv.models.presets import load_spec
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import headmap_of, small_spec

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SPEC = small_spec(layers=5, heads=4)
BUDGET = Budget("forcing-kv", "12x8")
ORDERS = st.permutations(range(SPEC.layers * SPEC.heads))


def scores_of(order: list[int]) -> Array:
    return (np.array(order).reshape(SPEC.layers, SPEC.heads) + 0.5) / len(order)


def chosen(scores: Array, budget: Budget) -> Bools:
    return decide_budget(scores, SPEC, budget, 1).static(scores[..., None])


def plan_of(static: Bools) -> CachePlan:
    """Built without the code under test."""
    headmap = headmap_of(SPEC, [np.flatnonzero(row).tolist() for row in static])
    return build_plan(SPEC, SPEC.geometry(BUDGET.resolution), load_policy(BUDGET.policy), headmap)


def kv_bytes(static: Bools) -> int:
    return plan_of(static).kv_bytes()


def time_ratio(static: Bools) -> float:
    full = build_plan(SPEC, SPEC.geometry(), load_policy("full"))
    return chunk_flops(plan_of(static)) / chunk_flops(full)


ALL = np.ones((SPEC.layers, SPEC.heads), bool)
LEAST, MOST = kv_bytes(ALL), kv_bytes(~ALL)


def one_more(static: Bools, scores: Array) -> Bools:
    """The static head with the lowest score made dynamic, outside layer 0, which is never split."""
    movable = np.where(static, scores, np.inf)
    movable[0] = np.inf
    more = static.copy()
    more[np.unravel_index(movable.argmin(), scores.shape)] = False
    return more


def check_lowest(static: Bools, scores: Array) -> None:
    assert scores[~static].max(initial=-1) < scores[static].min(initial=2), "the lowest scores are dynamic"


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.integers(LEAST, MOST + 1000))
def test_memory_is_used_up_to_the_last_head(order: list[int], target: int) -> None:
    scores = scores_of(order)
    static = chosen(scores, replace(BUDGET, kv_bytes=target))
    check_lowest(static, scores)
    assert kv_bytes(static) <= target
    if static[1:].any():
        assert kv_bytes(one_more(static, scores)) > target
    else:
        assert kv_bytes(static) == MOST


@settings(deadline=None, max_examples=40)
@given(ORDERS, st.floats(0, 1))
def test_time_is_used_up_to_the_last_head(order: list[int], part: float) -> None:
    scores = scores_of(order)
    least, most = time_ratio(ALL), time_ratio(~ALL)
    target = least + part * (most - least)
    static = chosen(scores, replace(BUDGET, time_ratio=target))
    check_lowest(static, scores)
    assert time_ratio(static) <= target
    if static[1:].any():
        assert time_ratio(one_more(static, scores)) > target


@settings(deadline=None, max_examples=30)
@given(ORDERS, st.lists(st.integers(LEAST, MOST), min_size=2, max_size=5))
def test_a_larger_target_takes_no_dynamic_head_away(order: list[int], targets: list[int]) -> None:
    scores = scores_of(order)
    found = [chosen(scores, replace(BUDGET, kv_bytes=target)) for target in sorted(targets)]
    for tight, loose in itertools.pairwise(found):
        assert (loose <= tight).all()


def test_the_ends_of_what_can_be_asked_for() -> None:
    scores = scores_of(list(range(20)))
    assert chosen(scores, replace(BUDGET, kv_bytes=LEAST))[1:].all(), "layer 0 costs nothing"
    assert not chosen(scores, replace(BUDGET, kv_bytes=MOST)).any()
    assert not chosen(scores, replace(BUDGET, time_ratio=1.0)).any()


def test_a_decision_records_its_target() -> None:
    budget = replace(BUDGET, kv_bytes=(LEAST + MOST) // 2)
    decision = decide_budget(scores_of(list(range(20))), SPEC, budget, 3)
    assert decision.rule == Rule("budget", sink_frames=3, budget=budget)


def test_equal_scores_are_not_torn_apart() -> None:
    """A target that would take some of them takes none: a head map follows from scores."""
    scores = np.full((5, 4), 0.5)
    scores[2] = 0.1
    budget = replace(BUDGET, kv_bytes=(LEAST + MOST) // 2)
    static = chosen(scores, budget)
    assert (static == (scores > 0.1)).all()
    assert kv_bytes(static) <= (LEAST + MOST) // 2


@pytest.mark.parametrize("kind", ["kv_bytes", "time_ratio"])
def test_the_least_that_is_named_can_be_asked_for(kind: str) -> None:
    """At the sizes of a public model, where six digits would round it down."""
    spec = load_spec("self-forcing")
    scores = np.random.default_rng(0).random((spec.layers, spec.heads))
    asked = {"kv_bytes": 10_000, "time_ratio": 0.01}[kind]
    budget = Budget("forcing-kv", "480p")
    with pytest.raises(InputError, match=f"the target {asked} .* cannot be met") as raised:
        decide_budget(scores, spec, replace(budget, **{kind: asked}), 1)
    assert raised.value.where == "budget"
    unit = {"kv_bytes": "bytes", "time_ratio": "of the time under full"}[kind]
    said = f"at least (.*) {unit}, which is what static heads alone take"
    named = re.fullmatch(said, str(raised.value.expected))
    assert named
    least = float(named[1])
    static = decide_budget(scores, spec, replace(budget, **{kind: least}), 1).static(scores[..., None])
    assert static[1:].all()
    with pytest.raises(InputError, match="cannot be met"):
        decide_budget(scores, spec, replace(budget, **{kind: least * 0.9999}), 1)


def test_half_precision_models_are_counted_in_half_precision() -> None:
    spec = load_spec("self-forcing")
    static = np.ones((spec.layers, spec.heads), bool)
    frames = plan_for(spec, static, Budget("forcing-kv", "480p")).kv_bytes() / (4 * 1560 * 128 * 2 * 360)
    assert frames == 5, "sink, transition frame and chunk"
    with pytest.raises(InputError) as raised:
        decide_budget(static * 0.5, spec, Budget("forcing-kv", "480p", kv_bytes=1), 1)
    assert f"at least {5 * 1560 * 128 * 2 * 360 * 2} bytes" in str(raised.value)


@pytest.mark.parametrize("targets", [{}, {"kv_bytes": MOST, "time_ratio": 1.0}])
def test_exactly_one_target_is_needed(targets: dict[str, float]) -> None:
    budget = replace(BUDGET, **targets)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="names no target, or two; expected bytes of KV or a share"):
        decide_budget(scores_of(list(range(20))), SPEC, budget, 1)


def test_a_policy_without_such_groups_is_refused() -> None:
    with pytest.raises(InputError, match="uses the label 'dynamic', 'static'; expected only dummy"):
        chosen(scores_of(list(range(20))), Budget("dummy-forcing", "12x8", kv_bytes=MOST))
