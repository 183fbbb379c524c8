"""How often a 95% bootstrap interval over few samples holds the true mean score.

    python benchmarks/interval_coverage.py

Prints JSON: samples -> share of simulated runs whose interval (`analyze.stability`) holds the mean. A run
draws its samples' scores from a beta distribution with parameters 8 and 2: skewed, as scores of static heads.
"""

from __future__ import annotations

import json

import numpy as np

from forcingkv.analyze.labels import Decision
from forcingkv.analyze.scores import FEATURES, Observations
from forcingkv.analyze.stability import judge_stability
from forcingkv.headmaps import Rule

RUNS = 4000
SAMPLES = (4, 8, 16, 30, 100)
A, B = 8.0, 2.0


def coverage(samples: int) -> float:
    """Every head of one layer is a run of its own."""
    scores = np.random.default_rng(samples).beta(A, B, (samples, 1, 1, 1, RUNS))
    values = np.repeat(scores[..., None], len(FEATURES), -1)
    decision = Decision(Rule("threshold", alpha=0.8), lambda features: features[..., 0] - 0.8)
    interval = judge_stability(Observations(values, tuple(range(samples)), (0,), 1), decision).interval
    mean = A / (A + B)
    return float(((interval.low <= mean) & (mean <= interval.high)).mean())


if __name__ == "__main__":
    print(json.dumps({samples: round(coverage(samples), 3) for samples in SAMPLES}, indent=1))
