"""Passes with a timestep for each frame, and the solver UniPC, in sessions and in the loop in torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.kv import attend_cache, empty_cache
from forcingkv.runtime import Bundle, Session, positions
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.text import encode_words
from forcingkv.runtime.unipc import UniPC
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.lanes import ONNX, On
from tests.runtime.videos import PROMPT

UNIPC = Schedule((999.0, 900.0, 700.0, 400.0), renoise="predicted", solver="unipc", by_frame=True)
"""Four passes, so that steps of the second order and the corrector of both orders have their turn."""
SCHEDULES = {
    "unipc": UNIPC,
    "euler": replace(UNIPC, solver="step"),
    "unipc, last": replace(UNIPC, context="last"),
    "unipc, first": replace(UNIPC, denoising_steps=(1000.0,), first=UNIPC.denoising_steps[:3]),
}
CHUNKS = 3


@cache
def bundle() -> Path:
    spec = small_spec(layers=1, schedule=UNIPC)  # verified below, by whole videos
    return shared_bundle(spec, random_model(spec).state_dict(), load_policy("full"), verify=False)


def run_by(schedule: Schedule) -> Bundle:
    """The bundle run by another schedule: its graphs know nothing of it."""
    opened = Bundle.open(bundle())
    model = replace(opened.manifest.model, schedule=schedule)
    return Bundle(opened.path, replace(opened.manifest, model=model), opened.headmap)


def text_of(opened: Bundle) -> torch.Tensor:
    return torch.from_numpy(encode_words(opened.plan.spec, PROMPT))


def start_of(opened: Bundle, frames: int) -> np.ndarray:
    shape = (*opened.manifest.graphs["step"].inputs["latents"].shape[:2], frames)
    sides = opened.manifest.graphs["step"].inputs["latents"].shape[3:]
    return np.random.default_rng(3).standard_normal((*shape, *sides)).astype(np.float32)


def made_by(session: Session, held: np.ndarray | None) -> list[np.ndarray]:
    video = session.generate(PROMPT, seed=7, chunks=CHUNKS)
    if held is not None:
        session._memory().hold(held)
    return [chunk.latents.copy() for chunk in video]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("unipc", (0, 2)), ("unipc, last", (0, 2)), ("euler", (1,)), ("unipc, first", (0,))],
)
def test_a_session_makes_the_video_of_the_loop_in_torch(on: On, kind: str, counts: tuple[int, ...]) -> None:
    opened = run_by(SCHEDULES[kind])
    with on.open(opened) as session:
        for frames in counts:
            held = start_of(opened, frames) if frames else None
            given = None if held is None else torch.from_numpy(held)
            wanted = generate(
                random_model(opened.plan.spec),
                opened.plan,
                text_of(opened),
                seeded_noise(opened.plan, 7),
                CHUNKS,
                start=given,
            )
            found = made_by(session, held)
            for made, chunk in zip(found, wanted, strict=True):
                assert relative(made, chunk.latents.numpy()) < 1e-5, (frames, chunk.index)
            if held is not None:
                np.testing.assert_array_equal(found[0][:, :, :frames], held)


def naive(opened: Bundle, held: np.ndarray) -> torch.Tensor:
    """Chunk 0 as the public code makes it: the frame is written over the latents before each pass and
    after the last, timestep 0 for it, and one solver for all frames."""
    spec, model, schedule = opened.plan.spec, random_model(opened.plan.spec), opened.plan.spec.schedule
    tables = positions.rotary(spec, opened.plan.geometry, 0, spec.frames_per_chunk)
    rotary = torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
    prompt = model.prompt(text_of(opened))
    attend = attend_cache(opened.plan, empty_cache(opened.plan, text_of(opened), 1))
    latents = seeded_noise(opened.plan, 7)(0, 0)
    solver = UniPC(schedule.later.sigmas, latents.double().numpy())
    count = held.shape[2]
    for (sigma, following), timestep in zip(
        itertools.pairwise(schedule.later.sigmas), schedule.later.timesteps, strict=True
    ):
        latents[:, :, :count] = torch.from_numpy(held)
        times = [0.0] * count + [timestep] * (spec.frames_per_chunk - count)
        features = torch.from_numpy(positions.time_features(spec, np.array([times])))
        flow, _ = model(latents, features, rotary, prompt, attend)
        if schedule.solver == "unipc":
            x0 = (latents - sigma * flow).double().numpy()
            latents = torch.from_numpy(solver.following(x0)).float()
        else:
            latents = latents + (following - sigma) * flow
    latents[:, :, :count] = torch.from_numpy(held)
    return latents


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unipc", "euler"])
def test_held_frames_are_those_of_the_formula(kind: str) -> None:
    opened = run_by(SCHEDULES[kind])
    held = start_of(opened, 1)
    given = generate(
        random_model(opened.plan.spec),
        opened.plan,
        text_of(opened),
        seeded_noise(opened.plan, 7),
        1,
        start=torch.from_numpy(held),
    )
    assert relative(next(given).latents.numpy(), naive(opened, held).numpy()) < 1e-6


def test_the_next_video_holds_nothing(on: On) -> None:
    with on.open(run_by(UNIPC)) as session:
        before = made_by(session, None)
        after_held = made_by(session, start_of(session.bundle, 1))
        assert relative(after_held[0][:, :, 1:], before[0][:, :, 1:]) > 1e-3, "the others see the frame"
        for found, wanted in zip(made_by(session, None), before, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with ONNX.open(run_by(UNIPC)) as opened:
        yield opened


@pytest.mark.parametrize(("axis", "size"), [(2, 3), (2, 0), (0, 2), (1, 1), (3, 2), (4, 9)])
def test_frames_that_do_not_fit_are_refused(session: Session, axis: int, size: int) -> None:
    """As many as a chunk has, none, or of another shape."""
    shape = list(start_of(session.bundle, 1).shape)
    shape[axis] = size
    with pytest.raises(InputError, match=r"given first frames.*fewer frames than the 3"):
        session._memory().hold(np.zeros(shape, np.float32))


def test_a_model_with_one_timestep_a_chunk_holds_nothing() -> None:
    opened = run_by(replace(UNIPC, by_frame=False))
    with pytest.raises(InputError, match="expected a multiple of 3, whole chunks"):
        list(
            generate(
                random_model(opened.plan.spec),
                opened.plan,
                text_of(opened),
                seeded_noise(opened.plan, 7),
                1,
                start=torch.from_numpy(start_of(opened, 1)),
            )
        )
