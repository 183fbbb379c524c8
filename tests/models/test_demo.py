"""The demo model's data, judge and weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.commands.console import default_prompts
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo import data
from forcingkv.models.demo.judge import read_digits, verdict
from forcingkv.models.presets import load_spec
from forcingkv.runtime.text import encode_words

ROOT = Path(__file__).parents[2]


def test_no_scan_is_in_both_splits() -> None:
    train, held_out = data.digits("train")[0], data.digits("held-out")[0]
    assert (len(train), len(held_out)) == (1437, 360)
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in held_out)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(3, 21))
def test_digits_set_out_as_prompted_and_bounce_inside_their_halves(seed: int, frames: int) -> None:
    clip = data.make_clip(np.random.default_rng(seed), frames, "train")
    assert data.moves_of(clip.prompt) == clip.moves
    for mover in clip.movers:
        places = np.array([mover.place(frame) for frame in range(frames)])
        assert (places >= 0).all()
        assert (places + data.SIDE <= (data.HEIGHT, data.HALF)).all()
        steps = np.diff(places, axis=0)
        assert (np.abs(steps).sum(1) <= mover.speed).all()
        first = np.array(data.DIRECTIONS[mover.direction]) * mover.speed
        assert (steps[: data.STRAIGHT_FRAMES - 1] == first).all()


def test_every_shipped_prompt_is_understood() -> None:
    spec, prompts = load_spec("demo"), default_prompts("demo")
    assert len(prompts) == 64
    for prompt in prompts:
        assert data.prompt_of(data.moves_of(prompt)) == prompt
        assert encode_words(spec, prompt).sum() == 2 * len(prompt.split())


def test_the_judge_reads_real_held_out_clips() -> None:
    """Its own accuracy, on scans that it was not trained on: the documentation says 98% of digits."""
    rng = np.random.default_rng(1)
    clips = [data.make_clip(rng, 18, "held-out") for _ in range(100)]
    verdicts = [verdict(clip.frames, clip.moves, 3, 5) for clip in clips]
    assert np.mean([v.digits for v in verdicts]) >= 0.94
    assert np.mean([v.directions for v in verdicts]) == 1


def test_the_judge_can_say_no() -> None:
    clip = data.make_clip(np.random.default_rng(3), 18, "held-out")
    (digit, way), right = clip.moves
    axis = {"left": "up", "right": "up", "up": "left", "down": "left"}[way]
    wrong = (((digit + 1) % 10, axis), right)
    seen = verdict(clip.frames, wrong, 3, 5)
    assert (seen.digits[0], seen.directions[0]) == (False, False)
    empty = verdict(np.full_like(clip.frames, -1), clip.moves, 3, 5)
    assert empty.digits == empty.directions == (False, False)


def video_of(clip: data.Clip) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    levels = ((clip.frames + 1) * 127.5).round().astype(np.uint8)
    return np.repeat(levels[..., None], 3, 3)


def test_real_digits_are_read_and_others_are_not() -> None:
    rng, right, wrong = np.random.default_rng(0), [], []
    clips = [data.make_clip(rng, 21, "held-out") for _ in range(30)]
    for clip, other in zip(clips, clips[1:] + clips[:1], strict=True):
        right.append(read_digits(video_of(clip), clip.prompt, 3))
        wrong.append(read_digits(video_of(clip), other.prompt, 3))
    assert np.mean(np.array(right, float), 0).min() > 0.9
    assert np.mean(np.array(wrong, float), 0).max() < 0.5


def test_what_cannot_be_read() -> None:
    clip = data.make_clip(np.random.default_rng(0), 21, "held-out")
    assert read_digits(video_of(clip), "a dog on the beach", 3) == (None, None)
    assert read_digits(video_of(clip)[:17], clip.prompt, 3) == (None, None)


def test_the_shipped_weights_are_small_and_fit_the_spec() -> None:
    path = ROOT / "models" / "demo" / "weights.safetensors"
    assert path.stat().st_size <= 12e6
    spec = load_spec("demo")
    weights = load_weights(spec)
    assert 1e6 <= sum(tensor.numel() for tensor in weights.values()) <= 4e6
    assert spec.layers >= 6
    assert spec.layers * spec.heads >= 24
    assert spec.geometry().frame_tokens == 96
