"""The whole analysis: record, score, label, report, into one folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from forcingkv.analyze.dummy import context_mass, label_dummies
from forcingkv.analyze.labels import ALPHA, RuleName, label_heads
from forcingkv.analyze.recorder import record_sample
from forcingkv.analyze.report import report_html
from forcingkv.analyze.scores import read_statistics, recency_scores
from forcingkv.headmaps import HeadMap, ModelIdentity, Statistics
from forcingkv.headmaps.errors import InputError
from forcingkv.models.checkpoint import Weights, build_model
from forcingkv.runtime.files import new_folder
from forcingkv.runtime.plan import build_plan
from forcingkv.runtime.policies import load_policy
from forcingkv.runtime.spec import ModelSpec

__all__ = ["SINK_FRAMES", "analyze_heads", "label_statistics"]

SINK_FRAMES = 1
"""Frames left out of the score's denominator: as many as `forcing-kv` keeps as its sink."""
POLICY = "full"


def analyze_heads(
    spec: ModelSpec,
    weights: Weights,
    texts: Sequence[npt.NDArray[np.float32]],
    out: Path,
    *,
    samples: int,
    seed: int = 0,
    chunks: int | None = None,
    rule: RuleName = "auto",
    alpha: float = ALPHA,
    static_per_layer: int | None = None,
    resolution: str | None = None,
    command: Sequence[str] = (),
    say: Callable[[int, int], None] = lambda sample, chunk: None,
) -> HeadMap:
    """Generate `samples` videos under the policy `full`, measure every head, and write `out`.

    Writes stats/sample-NNNN.parquet, headmap.json and report.html, all or nothing. Sample i uses
    text i (in turn; each (1, text_length, text_width)) and seed `seed` + i. Scores count chunks after
    `ar_start`, where pruning acts.

    Raises InputError where there are no prompts, too few chunks, or the scores are not numbers.
    """
    if not texts or samples < 1:
        raise InputError(f"{len(texts)} prompts, {samples} samples", where="analysis", expected="some")
    first_chunk = spec.ar_start + 1
    chunks = chunks or spec.attended_frames // spec.frames_per_chunk
    if chunks <= first_chunk:
        raise InputError(f"{chunks} chunks", where="chunks", expected=f"more than {first_chunk}")
    model = build_model(spec, weights)
    plan = build_plan(spec, spec.geometry(resolution), load_policy(POLICY))
    identity = ModelIdentity(spec.name, spec.layers, spec.heads, weights.digest)
    steps = len(spec.schedule.timesteps)
    measured = Statistics(samples, chunks - first_chunk, steps, seed, POLICY)
    with new_folder(out, "headmap.json") as folder:
        for sample in range(samples):
            record_sample(
                model, plan, torch.from_numpy(texts[sample % len(texts)]), seed + sample, sample, chunks,
                folder / "stats", lambda chunk, sample=sample: say(sample, chunk),  # type: ignore[misc]
            )  # fmt: skip
        headmap, scores = label_statistics(
            folder / "stats", spec, identity, measured,
            rule=rule, alpha=alpha, static_per_layer=static_per_layer,
        )  # fmt: skip
        headmap.write(folder / "headmap.json")
        page = report_html(scores, headmap, command)
        (folder / "report.html").write_text(page, encoding="utf-8")
    return headmap


def label_statistics(
    stats: Path,
    spec: ModelSpec,
    model: ModelIdentity,
    measured: Statistics,
    *,
    rule: RuleName = "auto",
    alpha: float = ALPHA,
    static_per_layer: int | None = None,
) -> tuple[HeadMap, pl.DataFrame]:
    """A head map by any rule from recorded statistics, and the recency scores behind it.

    Raises InputError where there are no statistics, or the scores are not numbers.
    """
    recorded, first_chunk = read_statistics(stats), spec.ar_start + 1
    scores = recency_scores(recorded, SINK_FRAMES, first_chunk)
    if rule == "dummy":
        mass = context_mass(recorded, spec.frames_per_chunk, first_chunk)
        return label_dummies(mass, scores, model, statistics=measured), scores
    headmap = label_heads(
        scores, model, rule, alpha=alpha, static_per_layer=static_per_layer,
        sink_frames=SINK_FRAMES, statistics=measured,
    )  # fmt: skip
    return headmap, scores
