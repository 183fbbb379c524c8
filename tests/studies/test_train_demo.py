"""Training of the demo model: its curriculum, its loss, and going on after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forcingkv.models.presets import load_spec
from studies import train_demo as training
from studies.flow_training import Trainer, place
from studies.train_demo import STAGES, Stage, loss_function, make_batch
from tests.conftest import random_model


def test_the_curriculum_covers_every_step_once() -> None:
    steps = sum(stage.steps for stage in STAGES)
    assert place(STAGES, steps) is None
    at = [place(STAGES, step) for step in (0, STAGES[0].steps, steps - 1)]
    assert [stage and stage[0] for stage in at] == [STAGES[0], STAGES[1], STAGES[-1]]


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_training_loss_is_that_of_each_chunk_alone(chunks: int) -> None:
    """Untrained, with a head of zeros, the flow is 0 and the loss the mean square of noise - clean."""
    spec = load_spec("demo")
    stage = Stage(chunks=chunks, batch=2, steps=1, rate=1e-3, rate_end=1e-3)
    model = random_model(spec)
    model.head.head.weight.zero_()
    model.head.head.bias.zero_()
    batch = make_batch(spec, np.random.default_rng(0), stage)
    found = loss_function(model, stage, compiled=False)(batch)
    error = batch["flow"].square().unflatten(2, (chunks, -1)).mean((0, 1, 3, 4, 5))
    weights = np.array([2.0, 1.0][:chunks])
    np.testing.assert_allclose(found.numpy(), error.numpy() * weights / weights.sum(), rtol=1e-5)


def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps at once, and two, then two from the checkpoint, give the same weights and log."""
    stages = (
        Stage(chunks=1, batch=1, steps=1, rate=1e-3, rate_end=1e-3),
        Stage(chunks=2, batch=1, steps=3, rate=1e-3, rate_end=1e-4, singles=2),
    )
    monkeypatch.setattr(training, "STAGES", stages)
    monkeypatch.setattr(training, "load_spec", lambda name: replace(load_spec(name), layers=1))
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    monkeypatch.setattr(training, "loss_function", lambda m, s: loss_function(m, s, compiled=False))
    training.train(tmp_path / "whole")
    update = Trainer.update

    def interrupted(self: Trainer, *given: object) -> object:
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.train(tmp_path / "parts")
    training.train(tmp_path / "parts")
    whole, parts = ((tmp_path / name) for name in ("whole", "parts"))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()

    def losses(out: Path) -> list[list[str]]:
        return [line.split(",")[:-1] for line in (out / "log.csv").read_text().splitlines()]

    assert losses(whole) == losses(parts)
    assert [row[0] for row in losses(whole)] == ["step", "1", "2", "3", "4"]
