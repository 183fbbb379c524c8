"""Scores and rules: what is observed of a head, and on which side of a rule's boundary that puts it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from forcingkv.analyze.labels import RULES, Decision, decide, least_static, policy_of
from forcingkv.analyze.recording import SCHEMA, Pass, Recording
from forcingkv.analyze.scores import FLOOR, Observations, observe
from forcingkv.analyze.scoring import Scored, Scoring
from forcingkv.analyze.storage import Recorded
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.headmaps.fields import one_of
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import CLEAN_PASS
from tests.conftest import small_spec

Array = npt.NDArray[np.float64]

MEANS = [[0.9, 0.85, 0.2, 0.3], [0.95, 0.4, 0.5, 0.8]]


def observed(features: Array | list[Any], sink_frames: int = 1) -> Observations:
    """One observation of each head, from mean features (layers, heads, 3)."""
    return grid(np.array(features, float)[None, None, None], sink_frames)


def grid(values: Array, sink_frames: int = 1, clean: bool = False) -> Observations:
    """Observations of chunks from 2 on that all have as many denoising steps, from features (samples, chunks,
    steps, layers, heads, 3). With `clean` the last step is the clean pass."""
    samples, chunks, steps = values.shape[:3]
    passes = [
        Pass(2 + at, CLEAN_PASS if clean and step == steps - 1 else step, 1000.0 - step)
        for at, step in np.ndindex(chunks, steps)
    ]
    scored = Scored(tuple(passes), sink_frames, 4)
    return Observations(values.reshape(samples, -1, *values.shape[3:]), tuple(range(samples)), scored)


def features_of(current: Array, transition: Array) -> Array:
    """Features of mass on the current chunk, on the transition frame, and the rest on the history."""
    history = 1 - current - transition
    return np.stack([current + transition, np.log(current / history), np.log(transition / history)], -1)


def of_scores(scores: Array | list[list[float]]) -> Array:
    """Features of heads with exactly those scores, a third of the recent mass on the transition frame."""
    score = np.array(scores)
    features = features_of(score * 2 / 3, score / 3)
    features[..., 0] = score
    return features


def letters(static: npt.NDArray[np.bool_]) -> list[str]:
    return ["".join("s" if value else "d" for value in row) for row in static]


def labelled(decision: Decision, found: Observations) -> list[str]:
    return letters(decision.static(found.mean()))


# --- what is observed -------------------------------------------------------------------------------


def recorded(rows: Iterable[dict[str, object]], samples: int, **changes: object) -> Recorded:
    """Rows as if they were recorded: 5 chunks of a model of 1 layer and 2 heads, 1 step, 1 frame a chunk."""
    sizes = {"layers": 1, "heads": 2, "frames_per_chunk": 1, "schedule": small_spec().schedule}
    spec = small_spec(**(sizes | changes))
    recording = Recording(
        SCHEMA,
        ModelIdentity("small", spec.layers, spec.heads),
        spec,
        12,
        8,
        "full",
        None,
        0,
        5,
        None,
        "float32",
    )
    return Recorded(pl.DataFrame(list(rows)).lazy(), recording, tuple(range(samples)), "stats")


def drawn_rows(samples: int = 2, frames: int = 1, seed: int = 0) -> list[dict[str, object]]:
    """Every pass of those samples, in any order, with random mass."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for sample, chunk, step, head, query in np.ndindex(samples, 5, 2, 2, frames):
        keys = (chunk + 1) * frames
        rows.append(
            {
                "sample": sample,
                "chunk": chunk,
                "step": step,
                "layer": 0,
                "head": head,
                "query_frame": query,
                "key_frame": list(range(keys)),
                "mass": random.dirichlet(np.ones(keys)).tolist(),
            }
        )
    return [rows[index] for index in random.permutation(len(rows))]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("sink_frames", [0, 1, 2])
def test_scores_follow_the_definition(frames: int, sink_frames: int) -> None:
    """docs/method.md, "Head profile": the newest frame of the previous chunk and the current chunk, over all
    but the sink; the mean over query frames is taken before the ratio. Without history there is no score."""
    rows = drawn_rows(frames=frames)
    found = observe(recorded(rows, 2, frames_per_chunk=frames), Scoring(sink_frames))
    chunks = tuple(chunk for chunk in (2, 3, 4) if chunk * frames - 1 > sink_frames)
    assert len(chunks) == (3 if frames == 3 else 3 - sink_frames)
    assert found.values.shape == (2, 2 * len(chunks), 1, 2, 3)
    assert found.samples == (0, 1)
    assert found.scored.chunks == chunks
    assert (found.scored.sink_frames, found.scored.recent_frames) == (sink_frames, frames + 1)
    assert [(made.chunk, made.step) for made in found.scored.passes] == [
        (c, s) for c in chunks for s in (0, 1)
    ]
    for index in np.ndindex(2, 2 * len(chunks), 1, 2):
        sample, place, layer, head = index
        chunk, step = chunks[place // 2], place % 2
        at = {"sample": sample, "chunk": chunk, "step": step, "layer": layer, "head": head}
        seen = [row for row in rows if all(row[name] == value for name, value in at.items())]
        mass = np.mean([row["mass"] for row in seen], 0)
        first = chunk * frames
        kept = mass[sink_frames:].sum()
        current, transition = mass[first:].sum(), mass[first - 1] if first > sink_frames else 0.0
        history = kept - current - transition
        expected = [
            (current + transition) / kept,
            np.log(current / max(history, FLOOR)),
            np.log(max(transition, FLOOR) / max(history, FLOOR)),
        ]
        np.testing.assert_allclose(found.values[index], expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.mean(), found.values.reshape(-1, 1, 2, 3).mean(0))


def test_statistics_that_are_not_whole_are_refused() -> None:
    rows = drawn_rows()
    scored = next(row for row in rows if row["chunk"] == 3)
    for faulty, message in [
        ([row for row in rows if row is not scored], r"sample \d has 11 scored rows; expected 12"),
        ([*rows, scored], r"sample \d has 13 scored rows"),
        ([row for row in rows if row["sample"] == 0], "sample 1 has 0 scored rows"),
        ([*rows, {**scored, "sample": 7}], "sample 7 has 1 scored rows"),
        ([scored if row["sample"] == 1 and row["chunk"] > 1 else row for row in rows], "sample"),
        (
            [{**row, "mass": [0.4] * 4} if row is scored else row for row in rows],
            r"sums to 1.6 \(chunk 3, step \d, layer 0, head \d; 1 such",
        ),
        ([{**row, "mass": [np.nan] * 4} if row is scored else row for row in rows], "sums to nan"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            observe(recorded(faulty, 2), Scoring(0))
        assert raised.value.where == "stats"
    twice = [dict(row, head=0) for row in rows]
    with pytest.raises(InputError, match="has a row twice"):
        observe(recorded(twice, 2), Scoring(0))


# --- threshold and quota ----------------------------------------------------------------------------


def test_a_head_is_static_from_the_threshold_on() -> None:
    below, above = np.nextafter(0.8, 0), np.nextafter(0.8, 1)
    found = observed(of_scores([[0.8, below, above, 0.1]]), sink_frames=3)
    decision = decide(found, "threshold")
    assert labelled(decision, found) == ["sdsd"]
    assert decision.rule == Rule("threshold", alpha=0.8, sink_frames=3, recent_frames=4)
    np.testing.assert_allclose(decision.margin(found.mean()), [[0, 0, 0, -0.7]], atol=1e-12)
    other = decide(found, "threshold", alpha=0.1)
    assert labelled(other, found) == ["ssss"]
    assert other.rule.alpha == 0.1


QUOTAS = {0: "dddd dddd", 1: "sddd sddd", 2: "ssdd sdds", 3: "ssds sdss", 4: "ssss ssss", None: "ssdd sdds"}


@pytest.mark.parametrize("quota", QUOTAS)
def test_a_quota_makes_the_highest_scores_of_each_layer_static(quota: int | None) -> None:
    found = observed(of_scores(MEANS))
    decision = decide(found, "quota", static_per_layer=quota)
    assert " ".join(labelled(decision, found)) == QUOTAS[quota]
    share = 2 if quota is None else quota
    assert decision.rule == Rule("quota", static_per_layer=share, sink_frames=1, recent_frames=4)
    assert np.isfinite(decision.margin(found.mean())).all()


def test_a_quota_cuts_halfway_between_two_heads() -> None:
    found = observed(of_scores(MEANS))
    margin = decide(found, "quota", static_per_layer=1).margin(found.mean())
    np.testing.assert_allclose(margin[:, 0], [0.025, 0.075])
    np.testing.assert_allclose(margin[[0, 1], [1, 3]], [-0.025, -0.075])


@pytest.mark.parametrize("quota", [-1, 5])
def test_a_quota_that_no_layer_has_is_refused(quota: int) -> None:
    with pytest.raises(InputError, match=f"cannot make {quota} heads of each layer static; expected 0 to 4"):
        decide(observed(of_scores(MEANS)), "quota", static_per_layer=quota)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6, unique=True), st.integers(0, 6))
def test_so_many_of_all_heads_can_be_made_static(scores: list[float], static: int) -> None:
    rows = np.array(scores).reshape(2, 3)
    decision = least_static(rows, static, Rule("given"))
    found = decision.static(rows[..., None])
    assert found.sum() >= static, "ties, also those that float64 makes of neighbours, are static"
    assert rows[found].min(initial=1) >= rows[~found].max(initial=0)
    if static == 0 or np.diff(np.sort(scores)).min() > 1e-12:
        assert found.sum() == static


# --- clusters ---------------------------------------------------------------------------------------


def clouds(seed: int, static: npt.NDArray[np.bool_]) -> Observations:
    """Static heads see 90% recent mass, the others 40%, both with some scatter."""
    random = np.random.default_rng(seed)
    recent = np.where(static, 0.9, 0.4) + random.uniform(-0.04, 0.04, static.shape)
    share = random.uniform(0.65, 0.75, static.shape)
    return observed(features_of(recent * share, recent * (1 - share)))


@pytest.mark.parametrize("rule", ["kmeans", "mixture"])
@pytest.mark.parametrize("seed", range(4))
def test_clusters_find_planted_clouds(rule: str, seed: int) -> None:
    static = np.random.default_rng(seed + 100).random((4, 6)) < 0.4
    found = clouds(seed, static)
    decision = decide(found, rule)
    assert letters(decision.static(found.mean())) == letters(static)
    named, chosen = decision.rule, decision.rule.static_center
    assert (named.name, named.reason, named.alpha, named.sink_frames) == (rule, None, None, 1)
    assert chosen is not None
    np.testing.assert_allclose(chosen, found.mean()[static][:, 1:].mean(0), atol=1e-3)


@pytest.mark.parametrize("rule", ["kmeans", "mixture"])
def test_the_cluster_with_more_recent_mass_is_static(rule: str) -> None:
    """Also where little of it lies on the transition frame, so that the sum of log-ratios is lower."""
    scatter = np.random.default_rng(0).uniform(0.99, 1.01, 12)
    current = np.repeat([0.85, 0.35], 6) * scatter
    transition = np.repeat([0.001, 0.35], 6) * scatter
    found = observed(features_of(current, transition)[None])
    assert found.values[..., :6, 1:].sum() < found.values[..., 6:, 1:].sum()
    assert found.scores[..., :6].min() > found.scores[..., 6:].max()
    assert labelled(decide(found, rule), found) == ["ssssssdddddd"]


def test_recorded_centers_reproduce_the_decision_of_kmeans() -> None:
    random = np.random.default_rng(1)
    found = clouds(0, random.random((4, 6)) < 0.4)
    decision = decide(found, "kmeans")
    centers = np.array([decision.rule.dynamic_center, decision.rule.static_center])
    asked = random.uniform(-4, 4, (1000, 4, 6, 3))
    distances = np.linalg.norm(asked[..., None, 1:] - centers, axis=-1)
    margin = (distances[..., 0] ** 2 - distances[..., 1] ** 2) / 2 / np.linalg.norm(centers[1] - centers[0])
    np.testing.assert_allclose(decision.margin(asked), margin, atol=1e-4)
    clear = np.abs(margin) > 1e-4
    assert clear.mean() > 0.99
    assert (decision.static(asked) == (distances[..., 1] < distances[..., 0]))[clear].all()


def test_the_margin_of_a_mixture_is_the_log_odds_of_two_gaussians() -> None:
    """Of clouds so far apart that each observation belongs to one, with the scatter that both have."""
    static = np.random.default_rng(3).random((4, 6)) < 0.4
    found = clouds(5, static)
    points = [found.mean()[which][:, 1:] for which in (static, ~static)]
    scatter = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in points) / static.size
    asked = np.random.default_rng(4).uniform(-1, 3, (100, 4, 6, 3))
    density = [
        np.log(len(part))
        + multivariate_normal(part.mean(0), scatter + 1e-3 * np.eye(2)).logpdf(asked[..., 1:])
        for part in points
    ]
    margin = decide(found, "mixture").margin(asked)
    np.testing.assert_allclose(margin, density[0] - density[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rule", ["kmeans", "mixture"])
def test_the_recorded_boundary_reproduces_the_decision(rule: str) -> None:
    decision = decide(clouds(0, np.random.default_rng(1).random((4, 6)) < 0.4), rule)
    asked = np.random.default_rng(2).uniform(-4, 4, (50, 4, 6, 3))
    current, transition, constant = decision.rule.boundary or ()
    margin = current * asked[..., 1] + transition * asked[..., 2] + constant
    np.testing.assert_allclose(margin, decision.margin(asked), atol=1e-4)


@pytest.mark.parametrize("rule", ["kmeans", "mixture"])
def test_heads_all_alike_form_no_clusters(rule: str) -> None:
    with pytest.raises(InputError, match="all heads look alike; expected heads that form two clusters"):
        decide(observed(of_scores([[0.5] * 4] * 2)), rule)


# --- choosing a rule --------------------------------------------------------------------------------


@pytest.mark.parametrize("static", range(13))
def test_the_threshold_is_kept_where_a_sixth_lies_on_either_side(static: int) -> None:
    rule: str = "threshold" if 2 <= static <= 10 else "kmeans"
    scores = np.r_[np.linspace(0.9, 0.95, static), np.linspace(0.1, 0.2, 12 - static)].reshape(2, 6)
    found = observed(of_scores(scores))
    decision = decide(found, "auto")
    assert decision.rule.name == rule
    assert labelled(decision, found) == labelled(decide(found, rule), found)
    reason = f"the threshold 0.8 would make {static / 12:.0%} of the heads static, which splits nothing"
    assert decision.rule.reason == (None if rule == "threshold" else reason)


def test_a_rule_is_found_by_its_name() -> None:
    names = ("auto", "threshold", "quota", "kmeans", "mixture", "budget", "dummy")
    assert tuple(RULES) == names
    with pytest.raises(InputError, match=f"no rule 'clusters'; expected one of {', '.join(names)}"):
        one_of(RULES, "clusters", "rule")


@pytest.mark.parametrize("rule", ["budget", "dummy"])
def test_rules_that_need_more_are_decided_elsewhere(rule: str) -> None:
    with pytest.raises(ValueError, match=f"the rule {rule} needs more than observations"):
        decide(observed(of_scores(MEANS)), rule)


@pytest.mark.parametrize("rule", ["threshold", "quota", "kmeans", "mixture"])
def test_parts_asked_together_get_the_answers_they_get_alone(rule: str) -> None:
    random = np.random.default_rng(2)
    decision = decide(clouds(3, random.random((4, 6)) < 0.4), rule)
    current = random.uniform(0.05, 0.6, (3, 2, 4, 6))
    parts = features_of(current, random.uniform(0.05, 0.35, current.shape))
    for index in np.ndindex(3, 2):
        np.testing.assert_allclose(decision.margin(parts)[index], decision.margin(parts[index]), atol=1e-12)
        assert (decision.static(parts)[index] == decision.static(parts[index])).all()
    assert (decision.static(parts) == (decision.margin(parts) >= 0)).all()


def test_every_rule_names_a_policy_and_a_map_is_used_by_the_one_that_knows_its_labels() -> None:
    for kind in RULES.values():
        labels = tuple(load_policy(kind.policy).groups)
        identity = ModelIdentity("small", 1, len(labels))
        assert policy_of(HeadMap(identity, (labels,), Rule("given"))) == kind.policy
    assert policy_of(HeadMap(ModelIdentity("small", 1, 1), (("wave",),), Rule("given"))) == "forcing-kv"
