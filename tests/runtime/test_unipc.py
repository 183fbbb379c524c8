"""The solver UniPC against that of diffusers, and what follows from its definition."""

from __future__ import annotations

import numpy as np
import pytest

from forcingkv.runtime.unipc import HIGHEST, UniPC

LONGLIVE = (0.9997998476028442, 0.9372654557228088, 0.8330553770065308, 0.6246873736381531)


def levels(count: int, seed: int, first: float) -> list[float]:
    """Falling noise levels, not evenly spaced."""
    drawn = np.sort(np.random.default_rng(seed).uniform(0.02, 0.98, count))[::-1]
    return [first, *map(float, drawn[1:])]


def flow(latents: np.ndarray, sigma: float) -> np.ndarray:
    """A flow that bends, and differs from place to place."""
    turned = np.roll(latents, 1, -1) * np.linspace(0.2, 1.5, latents.shape[-1])
    return np.asarray(np.tanh(turned) * (1 + sigma) - 0.3 * latents)


def made_by_ours(sigmas: list[float], latents: np.ndarray) -> list[np.ndarray]:
    solver, made = UniPC([*sigmas, 0.0], latents), []
    for sigma in sigmas:
        latents = solver.following(latents - sigma * flow(latents, sigma))
        made.append(latents)
    return made


def made_by_diffusers(sigmas: list[float], latents: np.ndarray) -> list[np.ndarray]:
    import torch
    from diffusers import UniPCMultistepScheduler

    theirs = UniPCMultistepScheduler(
        num_train_timesteps=1000,
        solver_order=2,
        prediction_type="flow_prediction",
        predict_x0=True,
        solver_type="bh2",
        lower_order_final=True,
        use_flow_sigmas=True,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(sigmas=np.array(sigmas))
    theirs.set_begin_index(0)  # or it looks steps up by whole timesteps, which repeat
    # It rounds levels to float32, after it has taken 1e-6 off pure noise.
    theirs.sigmas = torch.tensor([*np.minimum(sigmas, HIGHEST), 0.0], dtype=torch.float64)
    now, made = torch.from_numpy(latents), []
    for sigma, timestep in zip(sigmas, theirs.timesteps, strict=True):
        found = torch.from_numpy(flow(now.numpy(), sigma))
        now = theirs.step(found, timestep, now, return_dict=False)[0]
        made.append(now.numpy())
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 50])
@pytest.mark.parametrize("first", [0.9998, 1.0])
def test_every_pass_is_that_of_diffusers(count: int, first: float) -> None:
    for seed in range(2):
        latents = np.random.default_rng(seed).standard_normal((1, 3, 2, 4, 5))
        sigmas = levels(count, seed, first)
        pairs = zip(made_by_ours(sigmas, latents), made_by_diffusers(sigmas, latents), strict=True)
        for ours, theirs in pairs:
            assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)


def test_the_levels_of_longlive() -> None:
    latents = np.random.default_rng(5).standard_normal((1, 3, 2, 4, 5))
    ours, theirs = made_by_ours(list(LONGLIVE), latents), made_by_diffusers(list(LONGLIVE), latents)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def test_the_last_pass_ends_in_its_x0() -> None:
    solver = UniPC([*LONGLIVE, 0.0], np.ones((2, 3)))
    found = [np.full((2, 3), value) for value in (0.1, 0.7, -0.4, 0.25)]
    *_, last = map(solver.following, found)
    np.testing.assert_array_equal(last, found[-1])


def test_an_x0_that_stays_is_reached_on_a_straight_line() -> None:
    """Where every pass sees the same x0, latents at a level are (1 - sigma) * x0 + sigma * noise."""
    noise, x0 = np.random.default_rng(1).standard_normal((2, 4, 5))
    solver = UniPC([*LONGLIVE, 0.0], (1 - LONGLIVE[0]) * x0 + LONGLIVE[0] * noise)
    for sigma in (*LONGLIVE[1:], 0.0):
        np.testing.assert_allclose(solver.following(x0), (1 - sigma) * x0 + sigma * noise, atol=1e-12)


def test_it_takes_no_step_of_first_order_between() -> None:
    """Two solvers of one chunk differ from one that begins anew in each pass, as Euler's steps would."""
    latents = np.random.default_rng(2).standard_normal((1, 3, 2, 4, 5))
    ours, euler = made_by_ours(list(LONGLIVE), latents), latents
    for sigma, following in zip(LONGLIVE, (*LONGLIVE[1:], 0.0), strict=True):
        euler = euler + (following - sigma) * flow(euler, sigma)
    assert np.linalg.norm(ours[-1] - euler) > 1e-3 * np.linalg.norm(euler)
