"""The study of what the clean pass is worth: which videos are pairs, what is compared, how it goes on."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.checkpoint import build_model, load_weights
from forcingkv.models.generate import next_latents
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.kv import Cache, advance, attend_cache, empty_cache
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime import Bundle, Session, positions
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.positions import chunk_noise
from forcingkv.runtime.text import encode_words
from studies import last_pass_on_demo as study
from studies import occluded_bed as bed
from tests.exported import demo_bundle
from tests.studies.test_occluded_bed import NEWEST, options


def asked(out: Path, **other: object) -> argparse.Namespace:
    given = {"out": out, "prompts": 2, "chunks": 2, "ends": [700.0], "policies": "full", "headmap": study.MAP}
    return argparse.Namespace(**(given | {"seed": 0, "backend": "torch"} | other))


def test_passes_are_made_down_to_an_end() -> None:
    spec = load_spec("demo")
    assert study.ending_at(spec, 500.0).schedule.denoising_steps == (1000.0, 950.0, 850.0, 700.0, 500.0)
    assert study.ending_at(spec, 250.0).schedule.later == spec.schedule.later
    with pytest.raises(InputError, match=r"has no pass at 600.*some of 1000, 950, 850, 700, 500, 250"):
        study.ending_at(spec, 600.0)


@pytest.mark.long
def test_videos_are_measured_once_each_and_compared_in_pairs(tmp_path: Path) -> None:
    rows = study.run(asked(tmp_path))
    path = tmp_path / study.VIDEOS
    assert [(row["policy"], row["end"]) for row in rows] == [
        ("full, clean", 700.0),
        ("full, last", 700.0),
    ] * 2
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]
    before = path.read_text()
    assert study.run(asked(tmp_path)) == rows
    assert path.read_text() == before
    compared = {row["measure"]: row for row in study.compared(rows)}
    assert compared["PSNR, dB"]["clean"].mean is None, "it is the reference"
    assert 5 < compared["PSNR, dB"]["last"].mean < 60, "another video"
    for name in ("motion, px", "chunk discontinuity", "sharpness drift, log2"):
        row = compared[name]
        assert row["difference"].mean == pytest.approx(row["last"].mean - row["clean"].mean)
    text = study.table([*compared.values()])
    assert text.startswith(
        "| end | policy | measure | clean | last | difference |\n|---|---|---|---|---|---|\n"
    )
    with pytest.raises(InputError, match="has videos of other weights"):
        study.run(asked(tmp_path, chunks=3))
    with pytest.raises(InputError, match="lacks full"):
        study.run(asked(tmp_path / "other", policies="window"))


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_given_chunks_are_in_the_cache_as_if_they_were_made(backend: str) -> None:
    """As a loop in torch makes it that gives each chunk its last pass alone."""
    opened = study.run_by(Bundle.open(demo_bundle()), load_spec("demo").filled_by("last"))
    plan, spec, prompt = opened.plan, opened.plan.spec, "a 3 moving left and a 7 moving up"
    start = np.random.default_rng(1).standard_normal((1, 1, 6, 32, 48), np.float32)
    with Session.open(opened, backend=backend, threads=1) as session:
        video = session.generate(prompt, seed=5, chunks=3, start=start)
        [*islice(video, 2)]
        bed.cache_as_made(session, video, start)
        found = next(video).latents
        plain = [*session.generate(prompt, seed=5, chunks=3, start=start)][-1].latents
    steps, shape = spec.schedule.later, (1, 1, 3, 32, 48)
    weights = permute_heads(load_weights(spec), spec, head_orders(spec, plan.policy, opened.headmap))
    model, text = build_model(spec, weights), torch.from_numpy(encode_words(spec, prompt))
    cache = empty_cache(plan, text, 1)
    for chunk in range(2):
        sigma, number = steps.sigmas[-2], 2 * len(steps)  # steps past those of all passes
        fresh = chunk_noise(5, chunk, number, shape)
        noised = torch.from_numpy(
            (1 - sigma) * start[:, :, 3 * chunk : 3 * chunk + 3] + sigma * fresh
        ).float()
        tables = positions.rotary(spec, plan.geometry, 3 * chunk, 3)
        time = torch.from_numpy(positions.time_features(spec, np.array([[steps.timesteps[-1]]])))
        rotary = torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
        with torch.no_grad():
            _, new = model(noised, time, rotary, model.prompt(text), attend_cache(plan, cache))
        cache, _ = advance(plan, cache, new, chunk=chunk)
    wanted = generate_on(model, plan, cache, text)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    assert np.abs(found - plain).max() > 0.05


def generate_on(model: WanModel, plan: CachePlan, cache: Cache, text: torch.Tensor) -> np.ndarray:
    """Latents of chunk 2 on that cache."""
    spec, shape = plan.spec, (1, 1, 3, 32, 48)
    tables = positions.rotary(spec, plan.geometry, 6, 3)
    rotary = torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
    latents = torch.from_numpy(chunk_noise(5, 2, 0, shape))
    for step, timestep in enumerate(spec.schedule.later.timesteps):
        time = torch.from_numpy(positions.time_features(spec, np.array([[timestep]])))
        with torch.no_grad():
            flow, _ = model(latents, time, rotary, model.prompt(text), attend_cache(plan, cache))
        sigma, following = spec.schedule.later.sigmas[step : step + 2]
        fresh = torch.from_numpy(chunk_noise(5, 2, step + 1, shape))
        latents = next_latents("fresh", latents, flow, sigma, following, fresh)
    return latents.numpy()


@pytest.mark.long
def test_returning_digits_are_compared_clip_by_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "MOST_AWAY", 1)
    monkeypatch.setattr(bed, "ENTRIES", {"first frame": (0, 0)})
    for context in ("clean", "last"):
        bed.run(tmp_path, [NEWEST], bed.bed_clips(2, 0), options(context=context))
        if context == "clean":
            with pytest.raises(InputError, match="no policy both as it is and as NAME, last pass"):
                [*study.returns(tmp_path / bed.RETURNS)]
    lines = [*map(json.loads, (tmp_path / bed.RETURNS).read_text().splitlines())]
    assert [line["policy"] for line in lines] == ["newest"] * 2 + ["newest, last pass"] * 2
    rows = [*study.returns(tmp_path / bed.RETURNS)]
    assert [(row["away"], row["measure"]) for row in rows] == [
        (away, name) for away in ("all", 1) for name in bed.JUDGED
    ]
    for row in rows:
        assert row["difference"].mean == pytest.approx(row["last"].mean - row["clean"].mean)
        assert row["difference"].videos == 2
