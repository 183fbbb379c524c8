"""Stability: intervals against formulas and simulation, shares by hand, each reason by itself; verdicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.analyze.analysis import Undecided, headmap_of, undecided_choice, verdict
from forcingkv.analyze.labels import decide
from forcingkv.analyze.stability import REASONS, Interval, Stability, judge_stability, samples_needed
from forcingkv.headmaps import InputError, ModelIdentity, Rule, Statistics
from tests.analyze.test_labels import grid, of_scores

Array = npt.NDArray[np.float64]

CUT = 0.5


def judged(scores: Array, clean: bool = False) -> Stability:
    """The rule `threshold` at 0.5, of scores (samples, chunks, steps, layers, heads)."""
    found = grid(of_scores(scores), clean=clean)
    return judge_stability(found, decide(found, "threshold", alpha=CUT))


def of_samples(values: Array) -> Array:
    """Scores of one chunk and step, from (samples, layers, heads)."""
    return values[:, None, None]


# --- intervals --------------------------------------------------------------------------------------


def test_with_many_samples_the_interval_is_that_of_the_normal_distribution() -> None:
    samples = np.random.default_rng(0).beta(5, 3, (400, 2, 3))
    found = judged(of_samples(samples))
    mean, error = samples.mean(0), samples.std(0, ddof=1) / 400**0.5
    np.testing.assert_allclose(found.score, mean)
    np.testing.assert_allclose((found.interval.low - mean) / error, -1.96, atol=0.2)
    np.testing.assert_allclose((found.interval.high - mean) / error, 1.96, atol=0.2)
    np.testing.assert_allclose(found.spread, samples.std(0, ddof=1))


@pytest.mark.parametrize(("a", "b"), [(6.0, 6.0), (8.0, 2.0)])
def test_the_interval_holds_the_true_mean_in_about_95_of_100_runs(a: float, b: float) -> None:
    """Each of 500 heads is a run of 30 samples, drawn from a distribution whose mean is known."""
    samples = np.random.default_rng(1).beta(a, b, (30, 20, 25))
    interval = judged(of_samples(samples)).interval
    holds = (interval.low <= a / (a + b)) & (a / (a + b) <= interval.high)
    assert 0.90 <= holds.mean() <= 0.98


def test_resampling_takes_whole_samples() -> None:
    """What varies over steps and chunks within a sample alone does not widen the interval."""
    within = np.random.default_rng(2).uniform(-0.3, 0.3, (1, 4, 3, 1, 2))
    between = np.array([0.45, 0.55])[:, None, None, None, None]
    found = judged(between + within - within.mean((1, 2), keepdims=True))
    np.testing.assert_allclose(found.interval.low, 0.45)
    np.testing.assert_allclose(found.interval.high, 0.55)


def test_the_same_observations_give_the_same_numbers() -> None:
    scores = np.random.default_rng(3).random((5, 2, 2, 2, 3))
    once, again = judged(scores), judged(scores)
    np.testing.assert_array_equal(once.interval.low, again.interval.low)
    np.testing.assert_array_equal(once.undecided, again.undecided)


@given(st.floats(0.001, 0.5), st.floats(0.002, 0.2))
def test_samples_needed_are_the_fewest_that_do(spread: float, half_width: float) -> None:
    (needed,) = samples_needed(np.array([spread]), half_width)
    assert 1.96 * spread / needed**0.5 <= half_width * 1.0001
    assert needed == 2 or 1.96 * spread / (needed - 1) ** 0.5 > half_width * 0.9999


def test_so_many_samples_do_give_such_an_interval() -> None:
    spread, half_width = 0.1, 0.03
    (needed,) = samples_needed(np.array([spread]), half_width)
    assert needed == 43
    means = np.random.default_rng(4).normal(0.6, spread, (20_000, needed)).mean(1)
    assert 0.94 <= (np.abs(means - 0.6) <= half_width).mean() <= 0.96
    np.testing.assert_array_equal(
        samples_needed(np.array([[0.0, 0.1], [0.2, 1e-9]]), 0.01), [[2, 385], [1537, 2]]
    )


# --- shares and reasons -----------------------------------------------------------------------------


def test_kept_shares_are_counts() -> None:
    scores = np.random.default_rng(5).random((4, 3, 2, 2, 3))
    found = judged(scores)
    for layer, head in np.ndindex(2, 3):
        one = scores[..., layer, head]
        static = one.mean() >= CUT
        assert found.static[layer, head] == static

        def share(means: list[float], static: bool = static) -> float:
            return sum((value >= CUT) == static for value in means) / len(means)

        kept = {part: shares[layer, head] for part, shares in found.kept_parts.items()}
        assert kept["samples"] == share([one[i].mean() for i in range(4)])
        assert kept["chunks"] == pytest.approx(share([one[:, i].mean() for i in range(3)]))
        assert kept["steps"] == share([one[:, :, i].mean() for i in range(2)])
        assert found.kept[layer, head] == pytest.approx(share(list(one.ravel())))
    np.testing.assert_array_equal(found.firm, found.kept_parts["samples"] == 1)
    np.testing.assert_allclose(found.margin, scores.mean((0, 1, 2)) - CUT)


def distances(reason: str | None) -> Array:
    """Distances from the cut (20 samples, 4 chunks, 4 steps and a clean pass), doubtful for that reason
    alone."""
    distance = np.full((20, 4, 5), 0.1)
    if reason == "interval":
        # One sample in twenty is allowed to differ, but this one nearly outweighs all others.
        distance[:] = 0.001
        distance[7] = -0.015
    elif reason == "samples":
        distance[3:5] = -0.1
    elif reason == "steps":
        distance[:, :, 1] = -0.1
    elif reason == "clean pass":
        distance[:, :, 4] = -0.1
    elif reason == "chunks":
        distance[:, 3] = -0.1
    return distance


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("reason", [None, *REASONS])
def test_a_head_is_undecided_for_each_reason_by_itself(reason: str | None, side: int) -> None:
    firm = CUT + 0.1 * np.ones((20, 4, 5))
    found = judged(np.stack([CUT + side * distances(reason), firm], -1)[:, :, :, None], clean=True)
    assert found.static[0].tolist() == [side == 1, True]
    assert set(found.reasons) == set(REASONS)
    assert {name for name, heads in found.reasons.items() if heads[0, 0]} == ({reason} if reason else set())
    assert found.undecided[0].tolist() == [reason is not None, False]


def test_one_sample_in_twenty_may_differ() -> None:
    values = np.full((40, 1, 2), 0.7)
    values[:2, 0, 0] = values[:3, 0, 1] = 0.4
    found = judged(of_samples(values))
    assert found.kept_parts["samples"].tolist() == [[0.95, 0.925]]
    assert found.firm.tolist() == [[True, False]]
    assert found.undecided.tolist() == [[False, True]]


def test_a_step_must_be_clearly_on_the_other_side() -> None:
    """At step 1 both heads are dynamic on the mean, but of the second the samples do not say so."""
    scores = np.full((10, 2, 3, 1, 2), 0.8)
    scores[:, :, 1] = 0.45
    scores[:2, :, 1, :, 1] = 0.6
    found = judged(scores)
    assert found.kept_parts["steps"] == pytest.approx(np.full((1, 2), 2 / 3))
    assert found.reasons["steps"].tolist() == [[True, False]]


def test_one_sample_says_nothing_of_others() -> None:
    scores = np.full((1, 3, 2, 1, 4), 0.7)
    scores[:, :, 1, :, 1] = 0.4
    scores[:, 2, :, :, 2] = 0.4
    found = judged(scores)
    for unknown in (found.interval.low, found.interval.high, found.spread):
        assert np.isnan(unknown).all()
    assert found.kept_parts["samples"].tolist() == [[1.0] * 4]
    assert [name for name, heads in found.reasons.items() if heads.any()] == ["steps", "chunks"]
    assert found.undecided.tolist() == [[False, True, True, False]]
    said = verdict(found, "dynamic")
    assert (said.level, said.sentences) == (
        "unknown",
        (
            "One sample says nothing about others; within it 2 of 4 heads change sides with the step or"
            " chunk.",
            "Record more samples before you trust this map.",
        ),
    )
    with pytest.raises(ValueError, match="one sample says nothing about the spread"):
        samples_needed(found.spread, 0.01)


@pytest.mark.parametrize("rule", ["quota", "kmeans", "mixture"])
def test_every_rule_can_be_judged(rule: str) -> None:
    static = np.array([[True, False, False], [False, True, True]])
    scatter = np.random.default_rng(6).uniform(-0.05, 0.05, (6, 2, 2, 2, 3))
    found = grid(of_scores(np.where(static, 0.9, 0.3) + scatter))
    decision = decide(found, rule, static_per_layer=1)  # type: ignore[arg-type]
    stability = judge_stability(found, decision)
    if rule != "quota":
        np.testing.assert_array_equal(stability.static, static)
        assert not stability.undecided.any()
        assert (stability.kept == 1).all()
    np.testing.assert_array_equal(stability.static, stability.margin >= 0)


# --- maps and verdicts ------------------------------------------------------------------------------


def test_undecided_heads_are_dynamic_unless_the_rule_fixes_their_number() -> None:
    for rule in ("threshold", "kmeans", "mixture"):
        assert undecided_choice(rule, None) == undecided_choice(rule, "dynamic") == "dynamic"
        assert undecided_choice(rule, "kept") == "kept"
    for rule in ("quota", "budget"):
        assert undecided_choice(rule, None) == undecided_choice(rule, "kept") == "kept"
        with pytest.raises(InputError, match=f"rule {rule} fixes how many heads are static; expected kept"):
            undecided_choice(rule, "dynamic")


@pytest.mark.parametrize(("choice", "labels"), [("kept", "sds"), ("dynamic", "sdd")])
def test_the_map_says_what_became_of_undecided_heads(choice: Undecided, labels: str) -> None:
    scores = np.stack([0.1 + distances(None), -distances("chunks"), distances("steps")], -1)[:, :, :4, None]
    found = grid(of_scores(CUT + scores))
    decision = decide(found, "threshold", alpha=CUT)
    measured, model = Statistics(20, 4, 4, 0, "full"), ModelIdentity("small", 1, 3)
    headmap = headmap_of(decision, judge_stability(found, decision), model, measured, choice)
    assert "".join(label[0] for label in headmap.labels[0]) == labels
    assert headmap.undecided == ((1, 2),)
    assert headmap.rule == Rule("threshold", alpha=CUT, sink_frames=1, recent_frames=4, undecided=choice)
    assert (headmap.model, headmap.statistics) == (model, measured)
    assert headmap.scores == ((0.7, 0.45, 0.55),)
    assert headmap.margins == ((0.2, -0.05, 0.05),)
    assert headmap.confidence == ((1.0, 0.75, 0.75 if choice == "kept" else 0.25),)


def case(
    shaky: int, dynamic_shaky: int = 0, static: int = 134, firm: int = 312, samples: int = 100
) -> Stability:
    """360 heads, of which so many are static, undecided, or keep their label in most samples."""
    heads = np.arange(360).reshape(30, 12)
    undecided = (heads < shaky) | (heads >= 360 - dynamic_shaky)
    zero = np.zeros((30, 12))
    reasons = dict.fromkeys(REASONS, np.zeros((30, 12), bool)) | {"samples": undecided}
    kept = np.where(heads < firm, 0.95, 0.94)
    return Stability(
        heads < static, zero, Interval(zero, zero), zero, zero, {"samples": kept}, zero, reasons, samples
    )


def test_the_verdict_says_how_many_heads_keep_their_label() -> None:
    first = "312 of 360 heads keep their label in 95% of samples;"
    assert verdict(case(21), "dynamic").sentences == (
        f"{first} 21 are undecided: treated as dynamic.",
        "A static map is safe only with the undecided heads dynamic"
        " (21 of the 134 heads that the rule calls static are undecided).",
    )
    assert verdict(case(1), "kept").sentences[0] == f"{first} 1 is undecided: it keeps the rule's label."
    assert verdict(case(21), "kept").sentences[0] == f"{first} 21 are undecided: they keep the rule's label."
    assert str(verdict(case(0, 2), "dynamic")) == (
        f"{first} 2 are undecided: treated as dynamic. A static map is safe for this model"
        " (0 of the 134 heads that the rule calls static are undecided)."
    )
    assert verdict(case(100), "dynamic").sentences[1] == (
        "A static map is not safe for this model (100 of the 134 heads that the rule calls static are"
        " undecided): roles change while it runs."
    )


@pytest.mark.parametrize(
    ("shaky", "dynamic_shaky", "level"),
    [
        (0, 0, "safe"),
        (5, 0, "safe"),
        (6, 0, "care"),
        (49, 0, "care"),
        (50, 0, "unsafe"),
        (100, 0, "unsafe"),
        (0, 200, "safe"),
    ],
)
def test_only_static_heads_endanger_a_map(shaky: int, dynamic_shaky: int, level: str) -> None:
    assert verdict(case(shaky, dynamic_shaky, static=100), "dynamic").level == level


def test_few_samples_are_named_in_the_verdict() -> None:
    assert verdict(case(0, samples=15), "dynamic").sentences[-1] == (
        "Measured on 15 samples only: intervals are too narrow."
    )
    assert len(verdict(case(0, samples=16), "dynamic").sentences) == 2
    assert verdict(replace(case(0, static=0), samples=16), "dynamic").level == "safe"
