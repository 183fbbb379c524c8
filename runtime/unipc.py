"""UniPC, the multistep solver between a chunk's passes: `UniPC` (`docs/method.md`, "Schedule and renoising").

Zhao, Bai, Rao, Zhou and Lu: UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models (2023). Of its kinds the one with order 2, B(h) = exp(h) - 1 ("bh2"), which predicts x0, on straight
paths: alpha = 1 - sigma. It is that of `diffusers.UniPCMultistepScheduler` and of LongLive 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

HIGHEST = 1 - 1e-6
"""Where pure noise lies for the solver, as in diffusers: at 1 the logarithm of alpha is infinite."""

Doubles = npt.NDArray[np.float64]


class Step(NamedTuple):
    """From one noise level to the next: latents' = shrunk * latents + gain * x0, in first order."""

    shrunk: float
    gain: float
    h: float
    """How far it goes in lambda = log(alpha / sigma); infinite to the level 0."""

    @classmethod
    def between(cls, sigma: float, following: float) -> Step:
        """The step from `sigma` to the level `following`, which is lower."""
        h = _lambda(following) - _lambda(sigma)
        return cls(following / sigma, -(1 - following) * math.expm1(-h), h)


class UniPC:
    """The latents of one chunk on their way through its passes. Each chunk begins anew.

    In each pass after the first the latents that the last step began at are taken again to this level, now
    with the x0 of this level too (the corrector, which costs no pass); from there the next step begins, with
    the x0 of this pass and of the one before (the predictor). The first step and the last are of first order,
    so that the last pass ends in its x0.
    """

    def __init__(self, sigmas: Sequence[float], latents: npt.NDArray[Any]) -> None:
        """
        Args:
            sigmas: the noise levels of the passes, falling, then 0.
            latents: what the first pass reads.
        """
        self._sigmas = [min(float(sigma), HIGHEST) for sigma in sigmas]
        self._latents: Doubles = np.asarray(latents, np.float64)
        """Those that the last step began at, or the next one will."""
        self._found: list[Doubles] = []
        """x0 of the passes so far, the last two."""
        self._pass = 0

    def following(self, x0: npt.NDArray[Any]) -> Doubles:
        """The latents for the next pass; after the last pass its x0.

        Args:
            x0: of this pass: latents - sigma * flow.
        """
        now = np.asarray(x0, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # a session says itself what is not finite
            if self._pass:
                self._latents = self._corrected(now)
            self._found = [*self._found[-1:], now]
            predicted = self._predicted()
        self._pass += 1
        return predicted

    def _corrected(self, now: Doubles) -> Doubles:
        """The latents of this pass, from those of the last one and the x0 of both."""
        at = self._pass
        step = Step.between(*self._sigmas[at - 1 : at + 1])
        last = self._found[-1]
        base = step.shrunk * self._latents + step.gain * last
        if len(self._found) == 1:
            return base + step.gain * 0.5 * (now - last)
        r = self._reach(at - 1, step.h)
        b = math.expm1(-step.h)
        one = -b / step.h - 1
        two = -one / step.h - 1 / 2
        first, second = one / b, 2 * two / b
        of_before = (first - second) / (1 - r)
        return base + step.gain * (
            of_before / r * (self._found[0] - last) + (first - of_before) * (now - last)
        )

    def _predicted(self) -> Doubles:
        """The latents of the next pass."""
        at = self._pass
        step = Step.between(*self._sigmas[at : at + 2])
        now = self._found[-1]
        base = step.shrunk * self._latents + step.gain * now
        if len(self._found) == 1 or at == len(self._sigmas) - 2:
            return base
        return base + step.gain * 0.5 / self._reach(at, step.h) * (self._found[0] - now)

    def _reach(self, at: int, h: float) -> float:
        """Where the pass before `at` lies, in steps of `h` from it: below 0."""
        return (_lambda(self._sigmas[at - 1]) - _lambda(self._sigmas[at])) / h


def _lambda(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma else math.inf
