"""Training of demo-occluded: what is trained of a clip, and that it is trained as it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo_occluded.data import CHUNK, Timeline
from forcingkv.models.kv import advance, attend_cache, empty_cache
from forcingkv.models.presets import load_spec
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from studies import train_occluded as training
from studies.flow_training import TeacherForcing, frames_before, place
from studies.train_occluded import (
    BACK_WEIGHT,
    STAGES,
    TRAINED,
    Stage,
    begin,
    loss_of,
    make_batch,
    seen_frames,
    trained_chunks,
)
from tests.conftest import random_model

SHORT = Stage(chunks=5, batch=1, steps=2, rate=1e-4, rate_end=1e-4, timelines=(Timeline(0, 1),))


def test_what_is_trained_of_a_clip() -> None:
    for seed in range(20):
        trained = trained_chunks(np.random.default_rng(seed), replace(SHORT, chunks=7), Timeline(0, 2))
        assert trained[:3] == [4, 4, 5]
        assert len(trained) == TRAINED
        assert trained[3] in {0, 1, 2, 3, 6}
        waiting = replace(SHORT, chunks=7, waiting=1.0)
        assert trained_chunks(np.random.default_rng(seed), waiting, Timeline(0, 2))[3] in {2, 3}
    never = trained_chunks(np.random.default_rng(0), replace(SHORT, chunks=9), Timeline(0, 7))
    assert len(set(never)) == TRAINED


def test_what_a_trained_chunk_sees() -> None:
    spec, rng = load_spec("demo-occluded"), np.random.default_rng(0)
    assert seen_frames(spec, rng, 8, 0.0) == [*range(6, 24)]
    assert seen_frames(spec, rng, 2, 0.0) == [*range(6)]
    assert seen_frames(spec, rng, 0, 1.0) == []
    some = [seen_frames(spec, rng, 8, 1.0) for _ in range(400)]
    assert all(frames == sorted({*frames, 23}) and frames[0] >= 6 for frames in some)
    assert np.mean([len(frames) - 1 for frames in some]) == pytest.approx(17 / 2, rel=0.1)
    dropping = [len(seen_frames(spec, rng, 8, 0.6)) < 18 for _ in range(400)]
    assert np.mean(dropping) == pytest.approx(0.6, abs=0.08)


def test_no_stage_trains_a_return_that_the_window_does_not_show() -> None:
    window = load_spec("demo-occluded").chunks_to_fill
    for stage in STAGES:
        for timeline in stage.timelines:
            if timeline.returns_within(stage.chunks):
                # The chunk before the last whole view shows the digit partly: 12 of its 16 rows.
                assert timeline.returns - timeline.leaves + 2 <= window


@torch.no_grad()
def test_a_chunk_is_trained_as_it_is_generated() -> None:
    """Flow of noisy chunks beside clean ones, in one pass, against passes with a cache under `full`."""
    spec = replace(load_spec("demo-occluded"), layers=2)
    model, chunks, trained = random_model(spec), 9, [8, 2, 8, 0]
    torch.manual_seed(0)
    clean = torch.randn(1, 1, (chunks - 1) * CHUNK, spec.height, spec.width)
    noisy = torch.randn(1, 1, TRAINED * CHUNK, spec.height, spec.width)
    text = torch.randn(1, spec.text_length, spec.text_width)
    prompt, times = model.prompt(text), [700.0, 800.0, 300.0, 900.0]

    def time(*levels: float) -> torch.Tensor:
        return torch.from_numpy(positions.time_features(spec, np.array([levels])).astype(np.float32))

    def rotary(*indices: int) -> tuple[torch.Tensor, torch.Tensor]:
        tables = [positions.rotary(spec, spec.geometry(), index * CHUNK, CHUNK) for index in indices]
        cosines, sines = (torch.cat([torch.from_numpy(table[n]) for table in tables]) for n in (0, 1))
        return cosines, sines

    together, _ = model(
        torch.cat([clean, noisy], 2),
        time(*[0.0] * (chunks - 1), *times),
        rotary(*range(chunks - 1), *trained),
        prompt,
        TeacherForcing(spec, chunks - 1, [frames_before(spec, index) for index in trained]),
    )
    flows = together[:, :, -TRAINED * CHUNK :].split(CHUNK, 2)
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    cache = empty_cache(plan, text)
    for chunk in range(chunks):
        for number, index in enumerate(trained):
            if index == chunk:
                part = noisy.split(CHUNK, 2)[number]
                flow, _ = model(part, time(times[number]), rotary(chunk), prompt, attend_cache(plan, cache))
                torch.testing.assert_close(flow, flows[number], atol=2e-5, rtol=1e-4)
        if chunk < chunks - 1:
            part = clean.split(CHUNK, 2)[chunk]
            _, new = model(part, time(0.0), rotary(chunk), prompt, attend_cache(plan, cache))
            cache, _ = advance(plan, cache, new, chunk=chunk)


@torch.no_grad()
def test_the_loss_counts_digits_that_come_back_more() -> None:
    """With a head of zeros the flow is 0 and the loss the weighted mean square of noise - clean."""
    spec = replace(load_spec("demo-occluded"), layers=1)
    model = random_model(spec)
    model.head.head.weight.zero_()
    model.head.head.bias.zero_()
    batch = make_batch(spec, np.random.default_rng(0), SHORT)
    data, trained, _ = batch
    weights = 1 + (BACK_WEIGHT - 1) * data["digits"]
    assert trained[:3] == [3, 3, 4]
    back = data["digits"].unflatten(2, (TRAINED, CHUNK)).sum((0, 1, 3, 4, 5))
    assert (back[:3] > 0).all()
    assert back[3] == 0
    wanted = (data["flow"].square() * weights).sum() / weights.sum()
    torch.testing.assert_close(loss_of(model, SHORT, batch).sum(), wanted)


def test_it_begins_with_what_the_demo_knows_but_its_words() -> None:
    demo, model = random_model(load_spec("demo")), begin(load_spec("demo-occluded"))
    assert {n: p.shape for n, p in demo.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    words = len(model.spec.text.vocabulary)
    places = slice(words, words + model.spec.text_length)
    table = load_weights(load_spec("demo"))["text_embedding.0.weight"]
    torch.testing.assert_close(model.text_embedding[0].weight[:, places], table[:, 17:29], rtol=0, atol=0)


@pytest.mark.long
def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compile_blocks", lambda model: None)
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    weights = []
    for out, parts in (("whole", ((SHORT,),)), ("parts", ((replace(SHORT, steps=1),), (SHORT,)))):
        for stages in parts:
            monkeypatch.setattr(training, "STAGES", stages)
            training.train(tmp_path / out)
        weights.append((tmp_path / out / "model.safetensors").read_bytes())
        assert len((tmp_path / out / "log.csv").read_text().splitlines()) == 3
    assert weights[0] == weights[1]
    assert place((SHORT,), 2) is None
