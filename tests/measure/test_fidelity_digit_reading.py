"""The reader of digits on real clips, where the truth is known."""

from __future__ import annotations

import numpy as np

from forcingkv.models.demo.data import Clip, make_clip
from forcingkv.models.demo.judge import read_digits


def video_of(clip: Clip) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    levels = ((clip.frames + 1) * 127.5).round().astype(np.uint8)
    return np.repeat(levels[..., None], 3, 3)


def test_real_digits_are_read_and_others_are_not() -> None:
    rng, right, wrong = np.random.default_rng(0), [], []
    clips = [make_clip(rng, 21, "held-out") for _ in range(30)]
    for clip, other in zip(clips, clips[1:] + clips[:1], strict=True):
        right.append(read_digits(video_of(clip), clip.prompt, 3))
        wrong.append(read_digits(video_of(clip), other.prompt, 3))
    assert np.mean(np.array(right, float), 0).min() > 0.9
    assert np.mean(np.array(wrong, float), 0).max() < 0.5


def test_what_cannot_be_read() -> None:
    clip = make_clip(np.random.default_rng(0), 21, "held-out")
    assert read_digits(video_of(clip), "a dog on the beach", 3) == (None, None)
    assert read_digits(video_of(clip)[:17], clip.prompt, 3) == (None, None)
