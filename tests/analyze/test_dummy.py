"""The classes of Dummy Forcing: shares by hand, and the map they make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from forcingkv.analyze import analyze_heads
from forcingkv.analyze.dummy import context_mass, label_dummies
from forcingkv.analyze.scores import read_statistics
from forcingkv.headmaps import InputError, ModelIdentity, Statistics
from forcingkv.models.checkpoint import random_weights
from forcingkv.runtime.plan import build_plan
from forcingkv.runtime.policies import load_policy
from forcingkv.runtime.text import encode_words
from tests.conftest import small_spec

IDENTITY = ModelIdentity("small", 2, 3)
MEASURED = Statistics(1, 1, 1, 0, "full")


def frames(sink: list[float], neighbour: list[float]) -> tuple[pl.DataFrame, pl.DataFrame]:
    layer, head = np.divmod(np.arange(6), 3)
    base = {"layer": layer, "head": head}
    mass = pl.DataFrame({**base, "sink": sink, "neighbour": neighbour})
    return mass, pl.DataFrame({**base, "score": [0.5] * 6})


def test_the_half_with_the_least_context_are_dummies() -> None:
    # Neighbour mass is ten times sink mass on the whole: shares of each are what is compared.
    mass, scores = frames([0.05, 0.01, 0.00, 0.02, 0.01, 0.01], [0.1, 0.4, 0.0, 0.1, 0.1, 0.3])
    headmap = label_dummies(mass, scores, IDENTITY, statistics=MEASURED)
    assert headmap.labels == (("sink", "neighbour", "dummy"), ("dummy", "dummy", "neighbour"))
    assert headmap.rule.dummy_heads == 3
    none = label_dummies(mass, scores, IDENTITY, statistics=MEASURED, dummies=0)
    assert none.labels == (("sink", "neighbour", "sink"), ("sink", "sink", "neighbour"))
    with pytest.raises(InputError, match="7 dummy heads; expected 0 to 6"):
        label_dummies(mass, scores, IDENTITY, statistics=MEASURED, dummies=7)


def test_an_analysis_can_label_for_dummy_forcing(tmp_path: Path) -> None:
    spec = small_spec()
    texts = [encode_words(spec, "a b")]
    headmap = analyze_heads(
        spec, random_weights(spec), texts, tmp_path / "a", samples=2, chunks=4, rule="dummy"
    )
    assert headmap.counts()["dummy"] == spec.layers * spec.heads // 2
    plan = build_plan(spec, spec.geometry(), load_policy("dummy-forcing"), headmap)
    assert plan.kv_bytes() < build_plan(spec, spec.geometry(), load_policy("window")).kv_bytes()

    rows = read_statistics(tmp_path / "a" / "stats").collect()
    mass = context_mass(rows.lazy(), spec.frames_per_chunk, 2)
    for one in mass.iter_rows(named=True):
        seen = rows.filter(pl.col("chunk") >= 2, layer=one["layer"], head=one["head"])
        passes = 2 * 2 * len(spec.schedule.timesteps) * spec.frames_per_chunk
        assert abs(one["sink"] - seen.filter(key_frame=0)["mass"].sum() / passes) < 1e-6
        context = seen.filter((pl.col("key_frame") >= 1) & (pl.col("key_frame") < pl.col("chunk") * 3))
        assert abs(one["neighbour"] - context["mass"].sum() / passes) < 1e-6
