"""Mass, scores and labels against plain formulas; recording against attention done by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.analyze import analyze_heads
from forcingkv.analyze.labels import label_heads
from forcingkv.analyze.mass import frame_mass
from forcingkv.analyze.scores import mean_scores, read_statistics, recency_scores
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Statistics
from forcingkv.models.checkpoint import Weights, random_weights
from forcingkv.runtime.text import encode_words
from tests.conftest import small_spec

IDENTITY = ModelIdentity("small", 2, 4)
MEASURED = Statistics(1, 1, 1, 0, "full")
TEXTS = [encode_words(small_spec(), prompt) for prompt in ("a b", "c d")]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 7),
       st.floats(0.1, 20), st.integers(0, 2**31))  # fmt: skip
def test_mass_equals_the_full_softmax(
    heads: int, query_frames: int, key_frames: int, tokens: int, width: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, query_frames * tokens, width, generator=generator) * scale
    k = torch.randn(heads, key_frames * tokens, width, generator=generator)
    attention = (q.double() @ k.double().transpose(1, 2) / width**0.5).softmax(-1)
    naive = attention.unflatten(2, (key_frames, tokens)).sum(-1)
    naive = naive.unflatten(1, (query_frames, tokens)).mean(2)
    found = frame_mass(q, k, tokens)
    # float32 logits of size `scale` carry an error of that size times 1e-6.
    torch.testing.assert_close(found.double(), naive, atol=1e-6 * max(1, scale), rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(heads, query_frames), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HeadMap]:
    spec = small_spec()
    out = tmp_path_factory.mktemp("analysis") / "heads"
    headmap = analyze_heads(
        spec, random_weights(spec), TEXTS, out, samples=3, seed=5, chunks=4, command=["x"]
    )
    return out, headmap


def test_statistics_hold_every_pass_once(analysis: tuple[Path, HeadMap]) -> None:
    spec = small_spec()
    rows = read_statistics(analysis[0] / "stats").collect()
    key = ["sample", "chunk", "step", "layer", "head", "query_frame", "key_frame"]
    assert rows.select(key).is_unique().all()
    frames = [3, 6, 9, 12]
    assert len(rows) == 3 * sum(frames) * 2 * spec.layers * spec.heads * 3
    totals = rows.group_by(key[:-1]).agg(pl.col("mass").sum())
    assert totals["mass"].is_between(1 - 1e-5, 1 + 1e-5).all()
    assert sorted(rows.filter(chunk=2)["key_frame"].unique()) == list(range(9))


def test_scores_follow_the_definition(analysis: tuple[Path, HeadMap]) -> None:
    """Mass on the last 4 key frames over total mass less sink mass, per observation."""
    statistics = read_statistics(analysis[0] / "stats")
    scores = recency_scores(statistics, sink_frames=1, first_chunk=2)
    rows = statistics.collect()
    for one in scores.sample(20, seed=0).iter_rows(named=True):
        at = {name: one[name] for name in ("sample", "chunk", "step", "layer", "head")}
        seen = rows.filter(**at)
        newest = 3 * at["chunk"] + 2
        recent = seen.filter(pl.col("key_frame") >= newest - 3)["mass"].sum()
        rest = seen["mass"].sum() - seen.filter(key_frame=0)["mass"].sum()
        assert abs(one["score"] - recent / rest) < 1e-6


def test_the_same_analysis_gives_the_same_files(analysis: tuple[Path, HeadMap], tmp_path: Path) -> None:
    spec = small_spec()
    again = analyze_heads(
        spec, random_weights(spec), TEXTS, tmp_path / "b", samples=3, seed=5, chunks=4,
        command=["x"],
    )  # fmt: skip
    assert again == analysis[1]
    for name in ("headmap.json", "report.html"):
        assert (tmp_path / "b" / name).read_bytes() == (analysis[0] / name).read_bytes()
    page = (tmp_path / "b" / "report.html").read_text()
    assert page.count("<img alt=") == 3
    assert "http" not in page, "the report works offline"


def test_an_analysis_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    spec = small_spec()
    drawn = random_weights(spec)
    weights = Weights(drawn.shapes, lambda name: drawn[name] * (math.nan if ".0.self_attn.q" in name else 1))
    with pytest.raises(InputError, match="recency scores are not numbers"):
        analyze_heads(spec, weights, TEXTS, tmp_path / "out", samples=1, chunks=3)
    with pytest.raises(InputError, match="2 chunks; expected more than 2"):
        analyze_heads(spec, random_weights(spec), TEXTS, tmp_path / "out", samples=1, chunks=2)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_a_sink_of_its_own_is_measured_on_the_frames_it_sees(tmp_path: Path) -> None:
    """As LongLive: 9 frames at most, of which the first 3 stay."""
    spec = small_spec(attended_frames=9, sink_frames=3)
    analyze_heads(spec, random_weights(spec), TEXTS, tmp_path / "a", samples=1, chunks=5)
    rows = read_statistics(tmp_path / "a" / "stats").collect()
    seen = [sorted(rows.filter(chunk=chunk)["key_frame"].unique()) for chunk in range(5)]
    assert seen == [
        [0, 1, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 6, 7, 8, 9, 10, 11],
        [0, 1, 2, 9, 10, 11, 12, 13, 14],
    ]


def scores_of(means: list[list[float]], spread: float = 0.0) -> pl.DataFrame:
    rows = [
        {"sample": s, "chunk": 2, "step": 0, "layer": layer, "head": head, "score": mean + sign * spread}
        for s, sign in enumerate((-1, 1))
        for layer, row in enumerate(means)
        for head, mean in enumerate(row)
    ]
    return pl.DataFrame(rows)


def letters(headmap: HeadMap) -> list[str]:
    return ["".join(label[0] for label in row) for row in headmap.labels]


MEANS = [[0.9, 0.85, 0.2, 0.3], [0.95, 0.4, 0.5, 0.8]]


def test_rules_label_as_they_say() -> None:
    def labelled(rule: str, means: list[list[float]] = MEANS, **options: int) -> HeadMap:
        return label_heads(
            scores_of(means), IDENTITY, rule, sink_frames=1, statistics=MEASURED, **options  # type: ignore[arg-type]
        )  # fmt: skip

    assert letters(labelled("threshold")) == ["ssdd", "sdds"]
    assert letters(labelled("quota", static_per_layer=1)) == ["sddd", "sddd"]
    assert letters(labelled("quota", static_per_layer=0)) == ["dddd", "dddd"]
    assert letters(labelled("quota", static_per_layer=4)) == ["ssss", "ssss"]
    assert letters(labelled("clusters")) == ["ssdd", "sdds"]
    split = labelled("auto")
    assert (split.rule.name, split.rule.alpha, split.rule.reason) == ("threshold", 0.8, None)
    low = labelled("auto", [[v / 2 for v in row] for row in MEANS])
    assert low.rule.name == "clusters"
    assert low.rule.reason is not None
    assert "0%" in low.rule.reason
    assert letters(low) == ["ssdd", "sdds"]
    with pytest.raises(InputError, match="a quota of 5 static heads"):
        labelled("quota", static_per_layer=5)


def test_confidence_is_the_share_of_observations_that_agree() -> None:
    headmap = label_heads(
        scores_of(MEANS, spread=0.08), IDENTITY, "threshold", sink_frames=1, statistics=MEASURED
    )
    assert headmap.confidence == ((1.0, 0.5, 1.0, 1.0), (1.0, 1.0, 1.0, 0.5))
    np.testing.assert_allclose(mean_scores(scores_of(MEANS, 0.08)), MEANS)
