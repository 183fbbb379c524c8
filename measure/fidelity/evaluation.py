"""Bundles side by side: the same prompts and seeds through each, measured, with intervals.

A video of a bundle and the reference's video of the same prompt and seed are a pair. Differences are taken
pair by pair: what is special about a prompt cancels.

Intervals are made by resampling prompts: videos of one prompt are alike, so prompts are what is drawn, each
with all its seeds (a cluster bootstrap: Davison and Hinkley, "Bootstrap methods and their application", 1997,
section 3.8), bias-corrected and accelerated. More seeds make each prompt better known; they do not stand in
for prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.fidelity.seams import ChunkLayout
from forcingkv.measure.fidelity.video_measures import METRICS, Values, measure_pair, measure_video
from forcingkv.models.demo.judge import read_digits, shows_digits
from forcingkv.resampling import CONFIDENCE, SEED
from forcingkv.runtime import Session, Video
from forcingkv.runtime.given import GivenNoise, LatentsWriter
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import Prompt

Frames = npt.NDArray[np.uint8]
VideoRow = dict[str, Any]
"""`policy`, `prompt` and `seed` of a video, and its `METRICS` by name; None where it has no value."""

LatentsFile: TypeAlias = Callable[[str, int, Session, Video], LatentsWriter]
"""(name of the session, index of the sample, session, video) -> the file that its latents are written to."""

FEW = 32
"""Videos below which intervals are known to be too narrow, and a result warns."""
RESAMPLES = 4000


@dataclass(frozen=True)
class SeededPrompt:
    """What a video is made from, whatever the policy: a prompt and the seed of its noise."""

    prompt: str
    seed: int
    embedded: Prompt | None = None
    """The prompt's embeddings, where a session is to be given them in place of the words."""


@dataclass(frozen=True)
class Estimate:
    """A mean over videos, and the interval that holds the mean over all such prompts."""

    mean: float | None
    """None where no video has a value."""
    low: float | None
    high: float | None
    """None for fewer than two prompts, and where all prompts have the same mean: resampling equal values
    cannot show how others would differ."""
    videos: int
    """How many have a value."""
    prompts: int
    """How many they are of."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def seeded_prompts(prompts: Sequence[tuple[str, Prompt | None]], seeds: int, seed: int) -> list[SeededPrompt]:
    """Every prompt, with its embeddings if it has any, with that many seeds of its own from `seed` on.

    Raises InputError for fewer than two prompts: they are what intervals are made from.
    """
    if len({prompt for prompt, _ in prompts}) < 2:
        raise InputError(
            "there is only one prompt",
            expected="two different ones or more, since intervals come from how prompts differ",
            hint=f"Give more with --prompts and --samples; {FEW} are enough for intervals to hold.",
        )
    return [
        SeededPrompt(prompt, seed + number * seeds + turn, embedded)
        for number, (prompt, embedded) in enumerate(prompts)
        for turn in range(seeds)
    ]


def evaluate_sessions(
    sessions: Mapping[str, Session],
    samples: Iterable[SeededPrompt],
    chunks: int,
    reference: str | None,
    progress: Callable[[], None] = lambda: None,
    noises: Sequence[GivenNoise] = (),
    latents: LatentsFile | None = None,
) -> list[VideoRow]:
    """Generate each sample with every session in turn, and measure each video.

    Only the reference's video is kept, until all others of its sample are measured.

    Args:
        sessions: by the names that rows have, all of one model and resolution.
        samples: prompts and seeds.
        chunks: length of the videos.
        reference: a name of `sessions`; None: nothing is compared frame by frame.
        progress: called after each video.
        noises: noise of each sample, of files; none: it is that of the seeds.
        latents: where the latents of a video are written to; None: nowhere.

    Raises InputError where sessions make videos of different kinds or a prompt cannot be used, SessionError
    where one cannot go on.
    """
    kinds = {name: (s.spec.name, s.bundle.manifest.frame_size) for name, s in sessions.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {model} at {w}x{h}" for name, (model, (w, h)) in kinds.items())
        raise InputError(
            f"cannot be compared: {listed}", where="bundles", expected="one model at one resolution"
        )
    order = sorted(sessions, key=lambda name: name != reference)  # the reference first
    rows = []
    for number, sample in enumerate(samples):
        kept: Frames | None = None
        noise = noises[number] if noises else None
        for name in order:
            session, text = sessions[name], sample.prompt if sample.embedded is None else sample.embedded
            made = session.generate(text, seed=sample.seed, chunks=chunks, noise=noise)
            frames = []
            with latents(name, number, session, made) if latents else nullcontext() as file:
                for chunk in made:
                    frames.append(chunk.frames)
                    if file:
                        file.write(chunk.latents)
            video = np.concatenate(frames)
            row = {"policy": name, "prompt": sample.prompt, "seed": sample.seed}
            rows.append(row | _metrics(name, session.spec, video, sample.prompt, kept))
            if name == reference:
                kept = video
            progress()
    return rows


def _metrics(name: str, spec: ModelSpec, video: Frames, prompt: str, reference: Frames | None) -> Values:
    values: Values = measure_video(video, ChunkLayout.of(spec), spec.fps, where=name)["values"]
    if reference is not None:
        values |= measure_pair(video, reference, where=name)["values"]
    if shows_digits(spec):
        digits, directions = read_digits(video, prompt, spec.frames_per_chunk)
        values |= {"digits_read": digits, "direction_right": directions}
    return values


def summarize(
    rows: Sequence[VideoRow], reference: str | None, bundles: Mapping[str, str], chunks: int
) -> dict[str, Any]:
    """Means over videos and differences to the reference, with intervals over prompts: for JSON.

    Args:
        rows: of `evaluate_sessions`.
        reference: the policy that others are compared with; None: there is none.
        bundles: folder of each policy.
        chunks: length of the videos.

    Returns:
        `policies`, each with the `metrics` that it has a value of: an `Estimate`, and as `difference` that of
        differences to the reference, pair by pair; None for the reference itself, and where only pairs have
        the metric. `warnings`: why intervals are narrower than they should be.
    """
    by_policy = defaultdict[str, list[VideoRow]](list)
    for row in rows:
        by_policy[row["policy"]].append(row)
    # Videos of all policies are in the same order, so those in one place are a pair.
    prompts, policies = [row["prompt"] for row in next(iter(by_policy.values()))], []
    for policy, bundle in bundles.items():
        metrics = {}
        for metric in METRICS:
            values = [row.get(metric) for row in by_policy[policy]]
            if all(value is None for value in values):
                continue
            difference = None
            if reference not in (None, policy):
                others = [row.get(metric) for row in by_policy[reference]]
                difference = estimate(differences(values, others), prompts)
            compared = vars(difference) if difference and difference.videos else None
            metrics[metric] = vars(estimate(values, prompts)) | {"difference": compared}
        policies.append({"policy": policy, "bundle": bundle, "metrics": metrics})
    videos, distinct, warnings = len(prompts), len(set(prompts)), []
    if videos < FEW:
        warnings = [f"{videos} videos of each policy: intervals of fewer than {FEW} are too narrow."]
    elif distinct < FEW // 2:
        warnings = [f"{distinct} prompts: intervals are too narrow, since seeds do not stand in for prompts."]
    return {
        "reference": reference,
        "videos": videos,
        "prompts": distinct,
        "chunks": chunks,
        "confidence": CONFIDENCE,
        "warnings": warnings,
        "policies": policies,
    }


def differences(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    """Of each pair; None where one of the two has no value."""
    pairs = zip(values, others, strict=True)
    return [None if value is None or other is None else value - other for value, other in pairs]


def estimate(values: Sequence[float | None], prompts: Sequence[str]) -> Estimate:
    """The mean of the values that are known, with its bootstrap interval.

    Each video has a value, or None, and a prompt; those of one prompt are drawn together.
    """
    groups = defaultdict[str, list[float]](list)
    for value, prompt in zip(values, prompts, strict=True):
        if value is not None:
            groups[prompt].append(value)
    videos = sum(map(len, groups.values()))
    if not groups:
        return Estimate(None, None, None, 0, 0)
    sums = np.array([sum(group) for group in groups.values()], np.float64)
    counts = np.array([len(group) for group in groups.values()], np.float64)
    mean, means = float(sums.sum() / counts.sum()), sums / counts
    if len(groups) < 2 or np.ptp(means) <= 1e-12 * max(1.0, float(np.abs(means).max())):
        return Estimate(mean, None, None, videos, len(groups))
    found = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(SEED),
    )
    low, high = map(float, found.confidence_interval)
    return Estimate(mean, low, high, videos, len(groups))
