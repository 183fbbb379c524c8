"""The whole analysis on a model whose heads are known, see `planted`: what was planted is what is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from forcingkv.analyze import Analysis, Job, Labelling, analyze_statistics, record_samples
from forcingkv.analyze.labels import RULES as KINDS
from forcingkv.analyze.labels import plan_for
from forcingkv.analyze.recording import Passes
from forcingkv.analyze.scores import observe
from forcingkv.analyze.scoring import Scoring
from forcingkv.analyze.storage import read_statistics
from forcingkv.analyze.variance import variance_split
from forcingkv.headmaps.headmap import Budget
from forcingkv.runtime.cost import chunk_flops
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.text import encode_words
from tests.analyze.planted import CHUNKS, ROLES, amplitude, logits, planted

Bools = npt.NDArray[np.bool_]

ROLE_LETTERS = {"s": "static", "d": "dynamic", "x": "switching"}


def roles(*rows: str) -> list[list[str]]:
    return [[ROLE_LETTERS[letter] for letter in row] for row in rows]


SWITCHING = roles("sdxsds", "dssxsd", "xsdsds")
"""Three static heads in each layer, two dynamic, one that is static in three of the four steps."""
STEADY = roles("sdssds", "dssssd", "ssdsds")
"""The same with no head that switches."""
PLANTED = np.array(SWITCHING)
SEED, SAMPLES = 2, 4


def record(
    place: Path, model: list[list[str]], samples: int, content: float = 0.2, passes: Passes = "denoise"
) -> Path:
    spec, weights = planted(model, SEED, content)
    texts = [encode_words(spec, prompt) for prompt in ("a b", "c d e", "e a", "b")]
    threads = torch.get_num_threads()
    try:
        # So small a model is much faster on one thread, above all on a busy machine.
        job = Job(spec, weights, texts, seed=5, chunks=CHUNKS, threads=1, passes=passes)
        record_samples(job, place, samples=samples)
    finally:
        torch.set_num_threads(threads)
    return place


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Labelling], Analysis]:
    """Analyzes one recording of the model `SWITCHING`, each way once."""
    place = record(tmp_path_factory.mktemp("switching"), SWITCHING, SAMPLES)
    return cache(lambda labelling: analyze_statistics(place, labelling))


def budget(static: Bools, *, time: bool = False) -> Budget:
    """The policy forcing-kv with just what those heads static (layers, heads) take."""
    spec, _ = planted(SWITCHING, SEED)
    open_budget = Budget("forcing-kv", f"{spec.width}x{spec.height}")
    plan = plan_for(spec, static, open_budget)
    if not time:
        return Budget("forcing-kv", open_budget.resolution, kv_bytes=plan.kv_bytes())
    full = build_plan(spec, spec.geometry(), load_policy("full"))
    return Budget("forcing-kv", open_budget.resolution, time_ratio=chunk_flops(plan) / chunk_flops(full))


STATIC = PLANTED == "static"
RULES = {
    "threshold": Labelling("threshold"),
    "low threshold": Labelling("threshold", alpha=0.5),
    "quota": Labelling("quota", static_per_layer=3),
    "quota with switching": Labelling("quota", static_per_layer=4),
    "kmeans": Labelling("kmeans"),
    "auto": Labelling("auto"),
    "memory": Labelling("budget", budget=budget(STATIC)),
    "memory with switching": Labelling("budget", budget=budget(PLANTED != "dynamic")),
    "time": Labelling("budget", budget=budget(STATIC, time=True)),
    "mixture": Labelling("mixture"),
}
KNOWN = pytest.mark.parametrize("rule", RULES)


def labels(analysis: Analysis) -> Bools:
    return np.equal(analysis.headmap.labels, "static")


@KNOWN
def test_every_rule_labels_planted_heads_right(rule: str, analyzed: Callable[[Labelling], Analysis]) -> None:
    static = analyzed(RULES[rule]).stability.static
    steady = PLANTED != "switching"
    np.testing.assert_array_equal(static[steady], STATIC[steady])


@pytest.mark.parametrize("rule", [name for name, kind in KINDS.items() if kind.compared])
def test_a_rule_beside_the_chosen_one_finds_them(
    rule: str, analyzed: Callable[[Labelling], Analysis]
) -> None:
    found = np.array(analyzed(RULES["memory"]).alternatives[rule].labels)
    steady = PLANTED != "switching"
    np.testing.assert_array_equal(found[steady], PLANTED[steady])


@KNOWN
def test_a_switching_head_is_undecided_for_its_steps(
    rule: str, analyzed: Callable[[Labelling], Analysis]
) -> None:
    stability = analyzed(RULES[rule]).stability
    switching = PLANTED == "switching"
    np.testing.assert_array_equal(stability.reasons["steps"], switching)
    # Static in three steps of four, whatever the rule makes of the mean.
    np.testing.assert_array_equal(
        stability.kept_parts["steps"], np.where(switching, np.where(stability.static, 0.75, 0.25), 1)
    )
    assert analyzed(RULES[rule]).headmap.undecided == tuple(
        tuple(np.flatnonzero(row).tolist()) for row in stability.undecided
    )


@KNOWN
def test_no_other_head_is_undecided(rule: str, analyzed: Callable[[Labelling], Analysis]) -> None:
    np.testing.assert_array_equal(analyzed(RULES[rule]).stability.undecided, PLANTED == "switching")


@pytest.mark.parametrize(
    ("rule", "level", "shaky"),
    [
        ("threshold", "safe", "0 of the 9 heads"),
        ("low threshold", "care", "3 of the 12 heads"),
        ("kmeans", "care", "3 of the 12 heads"),
        ("mixture", "care", "3 of the 12 heads"),
    ],
)
def test_switching_heads_are_dynamic_in_the_map_and_counted(
    rule: str, level: str, shaky: str, analyzed: Callable[[Labelling], Analysis]
) -> None:
    analysis = analyzed(RULES[rule])
    np.testing.assert_array_equal(labels(analysis), STATIC)
    assert analysis.headmap.rule.undecided == "dynamic"
    assert analysis.verdict.level == level
    assert "; 3 are undecided: treated as dynamic." in str(analysis.verdict)
    assert f"({shaky} that the rule calls static are undecided)" in str(analysis.verdict)


@pytest.mark.parametrize("rule", ["low threshold", "kmeans", "mixture"])
def test_undecided_heads_can_keep_their_labels(rule: str, analyzed: Callable[[Labelling], Analysis]) -> None:
    asked = RULES[rule]
    kept = analyzed(Labelling(asked.rule, alpha=asked.alpha, undecided="kept"))
    np.testing.assert_array_equal(labels(kept), kept.stability.static)
    np.testing.assert_array_equal(kept.stability.static, analyzed(asked).stability.static)
    assert (labels(kept) & (PLANTED == "switching")).any()
    assert "they keep the rule's label." in str(kept.verdict)


@pytest.mark.parametrize("rule", ["quota with switching", "memory with switching"])
def test_rules_that_fix_a_number_keep_undecided_heads(
    rule: str, analyzed: Callable[[Labelling], Analysis]
) -> None:
    np.testing.assert_array_equal(labels(analyzed(RULES[rule])), PLANTED != "dynamic")


def test_recorded_mass_and_scores_agree_with_the_closed_form(tmp_path: Path) -> None:
    """Without content attention is exp(logit) / sum, by frames; `logits` knows nothing of model or RoPE.

    The clean pass is given the last step's signs (`planted`), and has the number -1.

    A logit is at most 8, and a rounding of float32 at most 2^-24 of it; it sees a handful (shift, norm,
    rotation, product), 8 are allowed. A share of the attention moves by no more than its logits do.
    """
    place = record(tmp_path / "stats", SWITCHING, samples=1, content=0, passes="all")
    recorded = read_statistics(place)
    observed = observe(recorded, Scoring())
    places = {(made.chunk, made.step): place for place, made in enumerate(observed.scored.passes)}
    mass = recorded.rows.collect()
    tolerance = 8 * amplitude(0) * 2**-24
    for (chunk, step, layer, head), rows in mass.group_by("chunk", "step", "layer", "head"):
        frames = np.arange(3 * (chunk + 1))
        expected = np.exp(
            logits(SWITCHING[layer][head], step, layer, frames[-3:, None] - frames)  # query x key frames
        )
        expected /= expected.sum(1, keepdims=True)
        ordered = rows.sort("query_frame")
        assert ordered["key_frame"].to_list() == [frames.tolist()] * 3
        np.testing.assert_allclose(np.stack(ordered["mass"].to_list()), expected, atol=tolerance, rtol=0)
        if chunk >= recorded.recording.first_chunk:
            score = expected[:, -4:].sum() / expected[:, 1:].sum()
            found = observed.scores[0, places[chunk, step], layer, head]
            # Both sums of three rows are off by that much at most, and the lower may be small.
            assert abs(found - score) < 2 * 3 * tolerance / expected[:, 1:].sum()


def test_variance_that_heads_owe_to_the_step_is_that_of_switching_heads(
    analyzed: Callable[[Labelling], Analysis], tmp_path: Path
) -> None:
    """Compared with heads whose scores are 1 or 0: shares of a two-way table without residue."""
    steady = observe(read_statistics(record(tmp_path / "stats", STEADY, samples=2)), Scoring())
    found = []
    for model, observations in (
        (SWITCHING, analyzed(RULES["threshold"]).observations),
        (STEADY, steady),
    ):
        table = np.array([[sign > 0 for sign in ROLES[role]] for row in model for role in row], float)
        apart = table - table.mean()
        together = apart - apart.mean(0) - apart.mean(1, keepdims=True)
        split = variance_split(observations)
        assert split["head x step"] == pytest.approx((together**2).sum() / (apart**2).sum(), abs=0.01)
        assert split["step"] == pytest.approx((apart.mean(0) ** 2).mean() / (apart**2).mean(), abs=0.01)
        found.append(split["head x step"])
    with_switching, without = found
    assert with_switching > 0.1
    assert without < 0.001
