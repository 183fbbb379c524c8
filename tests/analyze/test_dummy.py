"""The classes of Dummy Forcing: shares by hand, and the map they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcingkv.analyze.analysis import Labelling
from forcingkv.analyze.labels import context_mass, label_dummies
from forcingkv.analyze.run import Job, analyze_heads
from forcingkv.analyze.scoring import Scoring
from forcingkv.analyze.storage import read_statistics
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule, Statistics
from forcingkv.models.checkpoint import random_weights
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.text import encode_words
from tests.analyze.test_labels import drawn_rows, recorded
from tests.conftest import small_spec

IDENTITY = ModelIdentity("small", 2, 3)
MEASURED = Statistics(1, 1, 1, 0, "full")
SCORES = np.array([[0.5, 0.25, 1.0], [0.1, 0.2, 1 / 3]])


def label(sink: list[float], neighbour: list[float]) -> HeadMap:
    return label_dummies(np.array([sink, neighbour]).reshape(2, 2, 3), SCORES, IDENTITY, MEASURED)


def test_the_half_with_the_least_context_are_dummies() -> None:
    # Neighbour mass is ten times sink mass on the whole: shares of each are what is compared.
    sink, neighbour = [0.05, 0.01, 0.00, 0.02, 0.01, 0.01], [0.1, 0.4, 0.0, 0.1, 0.1, 0.3]
    headmap = label(sink, neighbour)
    assert headmap.labels == (("sink", "neighbour", "dummy"), ("dummy", "dummy", "neighbour"))
    assert headmap.rule == Rule("dummy", sink_frames=1, dummy_heads=3)
    assert headmap.scores == ((0.5, 0.25, 1.0), (0.1, 0.2, 0.333333))
    assert (headmap.model, headmap.statistics) == (IDENTITY, MEASURED)


@pytest.mark.parametrize(("sink", "neighbour"), [(0.0, 0.1), (0.1, 0.0), (0.0, 0.0)])
def test_heads_that_look_at_nothing_are_still_labelled(sink: float, neighbour: float) -> None:
    assert label([sink] * 6, [neighbour] * 6).counts()["dummy"] == 3


def test_context_mass_is_a_mean_over_scored_passes() -> None:
    rows = drawn_rows(frames=3)
    found = recorded(rows, 2, frames_per_chunk=3)
    mass = context_mass(found, Scoring().of(found.recording.spec, 5, "denoise"))
    assert mass.shape == (2, 1, 2)
    for head in range(2):
        seen: list[Any] = [row for row in rows if row["head"] == head and row["chunk"] in (2, 3, 4)]
        assert len(seen) == 2 * 3 * 2 * 3
        sink = np.mean([row["mass"][0] for row in seen])
        between = np.mean([sum(row["mass"][1 : 3 * row["chunk"]]) for row in seen])
        np.testing.assert_allclose(mass[:, 0, head], [sink, between])


@pytest.mark.usefixtures("white_pictures")
def test_an_analysis_can_label_for_dummy_forcing(tmp_path: Path) -> None:
    spec, folder = small_spec(), tmp_path / "a"
    job = Job(spec, random_weights(spec), [encode_words(spec, "a b")], chunks=4)
    headmap = analyze_heads(job, folder, samples=2, labelling=Labelling(rule="dummy")).headmap
    assert HeadMap.read(folder / "headmap.json") == headmap
    assert headmap.counts()["dummy"] == spec.layers * spec.heads // 2
    plan = build_plan(spec, spec.geometry(), load_policy("dummy-forcing"), headmap)
    assert plan.kv_bytes() < build_plan(spec, spec.geometry(), load_policy("window")).kv_bytes()

    statistics = read_statistics(folder / "stats")
    scored = Scoring().of(spec, 4, "denoise")
    mass = context_mass(statistics, scored)
    rows = statistics.rows.collect().explode("key_frame", "mass")
    passes = 2 * 2 * len(spec.schedule.later) * spec.frames_per_chunk
    for layer, head in np.ndindex(spec.layers, spec.heads):
        seen = rows.filter(rows["chunk"] >= 2, layer=layer, head=head)
        context = seen.filter((seen["key_frame"] >= 1) & (seen["key_frame"] < seen["chunk"] * 3))
        assert abs(mass[0, layer, head] - seen.filter(key_frame=0)["mass"].sum() / passes) < 1e-6
        assert abs(mass[1, layer, head] - context["mass"].sum() / passes) < 1e-6
    assert headmap == label_dummies(
        mass,
        np.array(headmap.scores),
        statistics.recording.model,
        scored.measured(statistics.recording, 2),
    )
