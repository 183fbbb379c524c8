"""UniPC, the multistep solver between a chunk's passes: `UniPC` (`docs/method.md`, "Schedule and renoising").

Zhao, Bai, Rao, Zhou and Lu: UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models (2023). Of its kinds the one with order 2, B(h) = exp(h) - 1 ("bh2"), which predicts x0, on straight
paths: alpha = 1 - sigma. It is that of `diffusers.UniPCMultistepScheduler` and of LongLive 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

HIGHEST = 1 - 1e-6
"""Where pure noise lies for the solver, as in diffusers: at 1 the logarithm of alpha is infinite."""

KEPT = 3
"""x0 of so many passes: of this one and of the two before."""

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

    All of it is a sum of four arrays, the latents and the last three x0, with weights that follow from the
    noise levels. It is made in float64, on one thread, so its bits do not depend on the machine's.
    """

    def __init__(self, sigmas: Sequence[float], latents: npt.NDArray[Any]) -> None:
        """
        Args:
            sigmas: the noise levels of the passes, falling, then 0.
            latents: what the first pass reads.
        """
        self._sigmas = [min(float(sigma), HIGHEST) for sigma in sigmas]
        self._shape, self._pass = latents.shape, 0
        self._held = np.zeros((1 + KEPT, latents.size))
        """The latents that the last step began at, or the next one will; then x0 of the last passes."""
        self._held[0] = latents.reshape(-1)

    def following(self, x0: npt.NDArray[Any]) -> Doubles:
        """The latents for the next pass; after the last pass its x0.

        Args:
            x0: of this pass: latents - sigma * flow.
        """
        self._held[_row(self._pass)] = x0.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):  # a session says itself what is not finite
            if self._pass:
                self._held[0] = self._sum(self._corrector())
            predicted = self._sum(self._predictor())
        self._pass += 1
        return predicted.reshape(self._shape)

    def _sum(self, weights: Doubles) -> Doubles:
        summed: Doubles = np.einsum("k,kn->n", weights, self._held)
        return summed

    def _corrector(self) -> Doubles:
        """Weights of the latents of this pass, made from those of the last one and the x0 of both."""
        last = self._pass - 1
        step = Step.between(*self._sigmas[last : last + 2])
        if not last:
            return self._weights(step, last, {self._pass: 1 / 2})
        r = self._reach(last, step.h)
        b = math.expm1(-step.h)
        one = -b / step.h - 1
        two = -one / step.h - 1 / 2
        first, second = one / b, 2 * two / b
        of_before = (first - second) / (1 - r)
        return self._weights(step, last, {last - 1: of_before / r, self._pass: first - of_before})

    def _predictor(self) -> Doubles:
        """Weights of the latents of the next pass."""
        now = self._pass
        step = Step.between(*self._sigmas[now : now + 2])
        if not now or now == len(self._sigmas) - 2:
            return self._weights(step, now, {})
        return self._weights(step, now, {now - 1: 1 / 2 / self._reach(now, step.h)})

    def _weights(self, step: Step, of: int, bends: Mapping[int, float]) -> Doubles:
        """Of a step with the x0 of the pass `of`, bent by how far those of other passes are from it."""
        weights = np.zeros(1 + KEPT)
        weights[0], weights[_row(of)] = step.shrunk, step.gain
        for other, share in bends.items():
            weights[_row(other)] += step.gain * share
            weights[_row(of)] -= step.gain * share
        return weights

    def _reach(self, at: int, h: float) -> float:
        """Where the pass before `at` lies, in steps of `h` from it: below 0."""
        return (_lambda(self._sigmas[at - 1]) - _lambda(self._sigmas[at])) / h


def _row(number: int) -> int:
    """Where the x0 of a pass is held."""
    return 1 + number % KEPT


def _lambda(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma else math.inf
