"""The demo model where memory matters: its clips and their judge."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.commands.console import default_prompts
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.demo.data import DIRECTIONS, HALF, HEIGHT, SIDE, WIDTH
from forcingkv.models.demo.judge import halves
from forcingkv.models.demo_occluded.data import (
    CHUNK,
    EXITS,
    KINDS,
    MOST_AWAY,
    PLACES,
    SPEED,
    Clip,
    Timeline,
    make_clip,
    prompt_of,
    render,
)
from forcingkv.models.demo_occluded.judge import FAR, given_chunks, judge_returns, judged_chunk, without_bar
from forcingkv.models.presets import load_spec, shipped_file
from forcingkv.runtime.text import encode_words

TIMELINES = st.builds(Timeline, st.integers(0, 3), st.integers(1, MOST_AWAY))
SEEDS = st.integers(0, 2**32)


def real(seed: int, timeline: Timeline) -> Clip:
    return make_clip(np.random.default_rng(seed), timeline, timeline.returns + 2, "held-out")


def chunk_of(clip: Clip, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return clip.frames[index * CHUNK : (index + 1) * CHUNK]


@settings(deadline=None, max_examples=40)
@given(SEEDS, TIMELINES)
def test_while_digits_are_away_nothing_tells_them(seed: int, timeline: Timeline) -> None:
    """Two clips of the same bars and timeline are equal to the bit then, whatever is hidden where."""
    clip, other = real(seed, timeline), real(seed + 1, timeline)
    movers = tuple(
        replace(mover, kind=one.kind, direction=one.direction)
        if one.kind == "bar"
        else replace(mover, kind="side")
        for mover, one in zip(other.movers, clip.movers, strict=True)
    )
    other = render((movers[0], movers[1]), timeline, timeline.returns + 2)
    for index in range(timeline.leaves, timeline.returns):
        np.testing.assert_array_equal(chunk_of(clip, index), chunk_of(other, index))
    assert clip.prompt == other.prompt


@settings(deadline=None, max_examples=40)
@given(SEEDS, TIMELINES)
def test_the_newest_frame_says_how_long_to_wait(seed: int, timeline: Timeline) -> None:
    clip = real(seed, timeline)
    waits = [*range(timeline.away, 0, -1)]
    for index, left in zip(range(timeline.leaves, timeline.returns), waits, strict=True):
        for mover, half in zip(clip.movers, halves(chunk_of(clip, index)), strict=True):
            assert [int((frame == 1).sum()) for frame in without_bar(half, mover)] == [4 * left] * CHUNK
    assert [left for _, left in islice(timeline.chunks(), timeline.late)] == [*range(timeline.late, 0, -1)]


@settings(deadline=None, max_examples=40)
@given(SEEDS, TIMELINES)
def test_digits_move_by_whole_tokens_and_come_back_by_the_way_they_went(
    seed: int, timeline: Timeline
) -> None:
    clip = real(seed, timeline)
    for mover in clip.movers:
        assert (mover.kind, mover.direction) in EXITS[mover.half]
        corners = np.array([mover.corner(inside) for inside in (24, 20, 16, 12, 8, 4)])
        step = np.array(DIRECTIONS[mover.direction]) * SPEED
        assert (np.diff(corners, axis=0) == step).all()
        assert corners.min() >= -SIDE
        assert (corners % SPEED == 0).all()
        whole = np.array(mover.corner(24))
        assert (whole >= 0).all()
        assert (whole + SIDE <= (HEIGHT, HALF)).all()
        assert not set(range(whole[0], whole[0] + SIDE)) & set(range(HEIGHT)[mover.bar_rows])
    before, after = chunk_of(clip, timeline.seen_whole), chunk_of(clip, timeline.returns + 1)
    np.testing.assert_array_equal(before, after[::-1])


def test_a_place_is_far_from_the_next() -> None:
    assert min(np.diff(places).min() for places in PLACES.values()) >= 2 * FAR


@pytest.mark.parametrize(("away", "within"), [(1, True), (4, True), (5, False), (8, False)])
def test_absences_within_the_window(away: int, within: bool) -> None:
    """The chunk in which digits come back attends to six chunks before it, the last whole view among them."""
    timeline = Timeline(2, away)
    seen = range(timeline.returns - load_spec("demo-occluded").chunks_to_fill + 1, timeline.returns)
    assert (timeline.seen_whole in seen) is within
    chunks = list(islice(timeline.chunks(), timeline.returns + 2))
    assert [min(inside) >= SIDE for inside, _ in chunks][timeline.seen_whole : timeline.returns + 2] == [
        True,
        *[False] * (away + 2),
        True,
    ]


def test_a_clip_returns_as_often_as_it_is_long() -> None:
    assert Timeline(0, 1).returns_within(14) == [3, 8, 13]
    assert Timeline(1, 2).returns_within(8) == [7]
    assert Timeline(2, 8).returns_within(9) == []


def test_the_judge_reads_real_held_out_clips() -> None:
    seen = []
    for seed in range(100):
        clip = real(seed, Timeline(seed % 4, 1 + seed % MOST_AWAY))
        seen += [*judge_returns(chunk_of(clip, judged_chunk(clip)), clip)]
    assert np.mean([one.digit for one in seen]) >= 0.95
    assert np.mean([one.place for one in seen]) == np.mean([one.direction for one in seen]) == 1


def test_the_judge_can_say_no() -> None:
    clip = real(5, Timeline(0, 3))
    left, right = clip.movers
    index = judged_chunk(clip)
    assert all(
        not (one.digit or one.place or one.direction) for one in judge_returns(chunk_of(clip, 4), clip)
    )
    elsewhere = {"up": "down", "down": "up", "left": "up", "right": "up"}
    wrong = [
        replace(mover, direction=elsewhere[mover.direction], kind="side", place=8 if mover.place == 0 else 0)
        for mover in (left, right)
    ]
    moved = render((wrong[0], wrong[1]), clip.timeline, index + 1)
    assert [(one.place, one.direction) for one in judge_returns(chunk_of(moved, index), clip)] == [
        (False, False)
    ] * 2
    others = [real(seed, clip.timeline).movers for seed in range(30)]
    strangers = [
        judge_returns(
            chunk_of(render((replace(left, image=a.image), right), clip.timeline, index + 1), index), clip
        )
        for a, _ in others
    ]
    assert [left.digit == a.digit for a, _ in others] == [one.digit for one, _ in strangers]


def test_the_given_part_ends_before_the_return_or_with_the_first_marks() -> None:
    clip = real(2, Timeline(2, 6))
    assert (given_chunks(clip), given_chunks(clip, "made"), judged_chunk(clip)) == (12, 7, 13)
    assert clip.frames.shape == (14 * CHUNK, HEIGHT, WIDTH)


def test_prompts_are_known_words_and_name_no_digit_nor_way() -> None:
    spec = load_spec("demo-occluded")
    for seed in range(40):
        clip = real(seed, Timeline(seed % 4, 1 + seed % MOST_AWAY))
        kinds = [mover.kind for mover in clip.movers]
        wanted = f"{kinds[0]} and {kinds[1]} away {clip.timeline.away} late {clip.timeline.late}"
        assert clip.prompt == wanted
        encode_words(spec, clip.prompt)


def test_shipped_prompts_are_known_words_and_the_first_ones_see_a_return_early() -> None:
    """Head maps are measured on videos of few chunks, of the first prompts."""
    spec, prompts = load_spec("demo-occluded"), default_prompts("demo-occluded")
    assert len(prompts) == len(set(prompts)) == 64
    for number, prompt in enumerate(prompts):
        left, _, right, _, away, _, late = prompt.split()
        timeline = Timeline(int(late), int(away))
        assert {left, right} <= set(KINDS)
        assert prompt_of(left, right, timeline) == prompt  # type: ignore[arg-type]
        assert encode_words(spec, prompt).any()
        assert number >= 16 or timeline.returns < spec.chunks_to_fill


WEIGHTS = shipped_file("demo-occluded", "weights.safetensors")


def test_the_shipped_weights_are_small_and_fit_the_spec() -> None:
    assert WEIGHTS is not None
    assert WEIGHTS.stat().st_size <= 8e6
    spec = load_spec("demo-occluded")
    assert spec.geometry().frame_tokens == 96
    assert 1e6 <= sum(tensor.numel() for tensor in load_weights(spec).values()) <= 2e6
