"""The two test beds: which videos each takes, and what is measured of them.

`demo`: two digits that are always in view; videos of 10 chunks from their prompts alone, longer than the
window. `demo-occluded`: digits that go away and come back; videos that begin with a real clip, until the
digits come back, and go on by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from forcingkv.commands.console import default_prompts
from forcingkv.measure.fidelity.pairs import psnr, squared_error
from forcingkv.measure.fidelity.seams import ChunkLayout
from forcingkv.measure.fidelity.video_measures import measure_pair, measure_video
from forcingkv.models.demo.data import make_clip
from forcingkv.models.demo.judge import grey
from forcingkv.models.demo_occluded.data import CHUNK, MOST_AWAY
from forcingkv.models.demo_occluded.judge import judge_returns, judged_chunk
from forcingkv.models.presets import load_spec
from forcingkv.runtime.spec import Dtype
from studies.ablation.demo_scores import read_chunks
from studies.ablation.variant_scores import Measure
from studies.ablation.variant_videos import Sample, Video
from studies.occluded_bed import JUDGED, Asked, bed_clips, given_frames, seen_in_window

CHUNKS = 10
"""Of a video of `demo`."""
GOES_ON = 2
"""Chunks of a video of `demo-occluded` after the judged one, in which digits leave again."""
FIRST_SEED = 20000
DTYPE: Dtype = "bfloat16"
"""In which bytes are counted: public models are run in it. To models in float32, as these are, fewer bits are
twice the gain."""
LOOKS = ("chunk_discontinuity", "seam_jolt", "seam_residual", "sharpness_drift", "colour_drift_most")
"""What is measured of how any video looks (`measure/fidelity/video_measures.py`)."""

Values = dict[Measure, float | None]


@dataclass(frozen=True)
class Bed:
    """A test bed."""

    model: str
    samples: tuple[Sample, ...]
    names: tuple[str, ...]
    """Of the samples: what intervals are made over."""
    measure: Callable[[int, Video, Video], Values]
    """(number of the sample, its video, that of `full`) -> what is measured."""
    quality: Measure
    """What policies are compared by: a share."""
    measured_on: tuple[str, ...]
    """Prompts that heads are measured on, none of the samples'."""


def demo_bed(prompts: int, first_seed: int = FIRST_SEED) -> Bed:
    """The bed of `demo`: that many prompts that are none of those that ship."""
    known, drawn, rng = set(default_prompts("demo")), list[str](), np.random.default_rng(first_seed)
    while len(drawn) < prompts:
        prompt = make_clip(rng, 1, "held-out").prompt
        if prompt not in known:
            known.add(prompt)
            drawn.append(prompt)
    samples = tuple(Sample(prompt, first_seed + number, CHUNKS) for number, prompt in enumerate(drawn))
    layout, fps = _layout_and_rate("demo")

    def measure(number: int, video: Video, full: Video) -> Values:
        digits, directions = read_chunks(video, samples[number].prompt, CHUNK)
        found: Values = {"digits": float(digits.mean()), "directions": float(directions.mean())}
        found["digits_last"] = float(digits[-1].mean())
        return found | _looks(video, full, layout, fps)

    return Bed("demo", samples, tuple(drawn), measure, "digits", tuple(default_prompts("demo")))


def occluded_bed(clips: int, seed: int = 0, most_away: int = MOST_AWAY) -> Bed:
    """The bed of `demo-occluded`: that many clips, as many of every length of absence and entry."""
    each = clips // (2 * most_away)
    asked = [one for one in bed_clips(each, seed) if one.clip.timeline.away <= most_away]
    samples = tuple(
        Sample(one.clip.prompt, one.seed, judged_chunk(one.clip) + 1 + GOES_ON, given_frames(one.clip))
        for one in asked
    )
    layout, fps = _layout_and_rate("demo-occluded")

    def measure(number: int, video: Video, full: Video) -> Values:
        one, start = asked[number], samples[number].start
        made = 0 if start is None else len(start)
        return _returned(one, video) | _looks(video[made:], full[made:], layout, fps)

    names = tuple(one.name for one in asked)
    prompts = tuple(default_prompts("demo-occluded"))
    return Bed("demo-occluded", samples, names, measure, "right_in_window", prompts)


def _returned(asked: Asked, video: Video) -> Values:
    """What is right of the digits that came back, and how near the chunk is to the real clip's."""
    clip, away = asked.clip, asked.clip.timeline.away
    frames = slice(judged_chunk(clip) * CHUNK, (judged_chunk(clip) + 1) * CHUNK)
    seen = judge_returns(grey(video[frames]), clip)
    right = float(np.mean([all(getattr(one, name) for name in JUDGED) for one in seen]))
    real = ((clip.frames[frames] + 1) * 127.5).round().astype(np.uint8)
    return {
        "right": right,
        "right_in_window": right if seen_in_window(away) else None,
        **{name: float(np.mean([getattr(one, name) for one in seen])) for name in JUDGED},
        **{f"right_after_{length}": right if length == away else None for length in range(1, MOST_AWAY + 1)},
        "psnr_real": psnr(squared_error(video[frames], real[..., None].repeat(3, -1))),
    }


def _looks(video: Video, full: Video, layout: ChunkLayout, fps: float) -> Values:
    alone, pair = measure_video(video, layout, fps)["values"], measure_pair(video, full)["values"]
    return {**pair, **{name: alone[name] for name in LOOKS}}


def _layout_and_rate(model: str) -> tuple[ChunkLayout, float]:
    spec = load_spec(model)
    return ChunkLayout.of(spec), spec.fps


BEDS: Mapping[str, Callable[[int], Bed]] = {"demo": demo_bed, "demo-occluded": occluded_bed}
