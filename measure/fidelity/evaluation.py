"""Bundles side by side: the same prompts and seeds through each, measured, with intervals.

A video of a bundle and the reference's video of the same prompt and seed are a pair. Differences are taken
pair by pair: what is special about a prompt cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.fidelity.digit_reading import read_digits, shows_digits
from forcingkv.measure.fidelity.intervals import FEW, Estimate, estimate
from forcingkv.measure.fidelity.seams import ChunkLayout
from forcingkv.measure.fidelity.video_measures import METRICS, Values, measure_pair, measure_video
from forcingkv.runtime import Session
from forcingkv.runtime.text import Prompt

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SeededPrompt:
    """What a video is made from, whatever the policy: a prompt and the seed of its noise."""

    prompt: str
    seed: int
    embedded: Prompt | None = None
    """The prompt's embeddings, where a session is to be given them in place of the words."""


@dataclass(frozen=True)
class VideoRow:
    """The numbers of one video."""

    policy: str
    prompt: str
    seed: int
    values: Values


@dataclass(frozen=True)
class MetricResult:
    """One metric of one policy."""

    policy: str
    metric: str
    value: Estimate
    difference: Estimate | None
    """To the reference, pair by pair; None for the reference itself, and where only pairs have the metric."""


@dataclass(frozen=True)
class EvaluationSummary:
    """What an evaluation found."""

    reference: str | None
    results: tuple[MetricResult, ...]
    videos: int
    """Of each policy."""
    prompts: int
    warnings: tuple[str, ...]


def seeded_prompts(prompts: Sequence[tuple[str, Prompt | None]], seeds: int, seed: int) -> list[SeededPrompt]:
    """Every prompt, with its embeddings if it has any, with that many seeds of its own from `seed` on.

    Raises InputError for fewer than two prompts: they are what intervals are made from.
    """
    distinct = len({prompt for prompt, _ in prompts})
    if distinct < 2:
        raise InputError(
            f"are {distinct}",
            where="prompts",
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
) -> list[VideoRow]:
    """Generate each sample with every session in turn, and measure each video.

    Only the reference's video is kept, until all others of its sample are measured.

    Args:
        sessions: by the names that rows have, all of one model and resolution.
        samples: prompts and seeds.
        chunks: length of the videos.
        reference: a name of `sessions`; None: nothing is compared frame by frame.
        progress: called after each video.

    Raises:
        InputError: the sessions make videos of different kinds, or a prompt cannot be used.
        SessionError: a session could not go on.
    """
    _comparable(sessions)
    order = sorted(sessions, key=lambda name: name != reference)  # the reference first
    rows = []
    for sample in samples:
        kept: Frames | None = None
        for name in order:
            video = _generated(sessions[name], sample, chunks)
            if name == reference:
                kept = video
            rows.append(_row_of(name, sessions[name], sample, video, None if name == reference else kept))
            progress()
    return rows


def summarize(rows: Sequence[VideoRow], reference: str | None) -> EvaluationSummary:
    """Means over videos and differences to the reference, with intervals over prompts."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    by_pair = {(row.policy, row.prompt, row.seed): row.values for row in rows}
    results = []
    for policy in policies:
        own = [row for row in rows if row.policy == policy]
        prompts = [row.prompt for row in own]
        for metric in METRICS:
            values = [row.values.get(metric) for row in own]
            if all(value is None for value in values):
                continue
            difference = None
            if reference not in (None, policy):
                others = [by_pair[reference, row.prompt, row.seed].get(metric) for row in own]
                apart = [_minus(*pair) for pair in zip(values, others, strict=True)]
                difference = estimate(apart, prompts)
            compared = difference if difference and difference.videos else None
            results.append(MetricResult(policy, metric, estimate(values, prompts), compared))
    videos = len(rows) // len(policies)
    prompts_seen = len({row.prompt for row in rows})
    return EvaluationSummary(reference, tuple(results), videos, prompts_seen, _warnings(videos, prompts_seen))


def _warnings(videos: int, prompts: int) -> tuple[str, ...]:
    found = []
    if videos < FEW:
        found.append(f"{videos} videos of each policy: intervals of fewer than {FEW} are too narrow.")
    elif prompts < FEW // 2:
        found.append(f"{prompts} prompts: intervals are too narrow, since seeds do not stand in for prompts.")
    return tuple(found)


def _comparable(sessions: Mapping[str, Session]) -> None:
    kinds = {name: (s.spec.name, s.bundle.manifest.resolution) for name, s in sessions.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {model} at {w}x{h}" for name, (model, (w, h)) in kinds.items())
        raise InputError(
            f"cannot be compared: {listed}", where="bundles", expected="one model at one resolution"
        )


def _generated(session: Session, sample: SeededPrompt, chunks: int) -> Frames:
    text = sample.prompt if sample.embedded is None else sample.embedded
    made = session.generate(text, seed=sample.seed, chunks=chunks)
    return np.concatenate([chunk.frames for chunk in made])


def _row_of(
    name: str, session: Session, sample: SeededPrompt, video: Frames, other: Frames | None
) -> VideoRow:
    spec = session.spec
    values = dict(measure_video(video, ChunkLayout.of(spec), spec.fps, where=name).values)
    if other is not None:
        values |= measure_pair(video, other, where=name).values
    if shows_digits(spec):
        digits, directions = read_digits(video, sample.prompt, spec.frames_per_chunk)
        values |= {"digits_read": digits, "direction_right": directions}
    return VideoRow(name, sample.prompt, sample.seed, values)


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other
