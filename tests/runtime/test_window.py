"""Positions relative to the window: where chunks begin, what moves, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.models.presets import load_spec
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.window import first_position, moved_by
from forcingkv.runtime.spec import ModelSpec
from tests.conftest import headmap_of, roles, small_spec


def plan_of(policy: Policy, **changes: object) -> CachePlan:
    spec = small_spec(positions="relative", **changes)
    headmap = headmap_of(spec, [[0]] * spec.layers) if policy.needs_headmap else None
    return build_plan(spec, spec.geometry(), policy, headmap)


def window(sink: int, recent: int, **changes: object) -> CachePlan:
    return plan_of(Policy("any", "", {"all": roles(sink, recent)}), **changes)


def begins(plan: CachePlan, chunks: int = 7) -> list[int]:
    return [first_position(plan, chunk, chunk) for chunk in range(chunks)]


def seen(plan: CachePlan, group: HeadGroup, chunk: int) -> list[int]:
    """Positions of the frames that a chunk sees, in the order of the cache, its own last.

    Each frame has its own when its chunk is made. From then on it moves as its role says.
    """
    frames = plan.spec.frames_per_chunk
    candidates = range(plan.choice.kept) if plan.choice else None
    found = []
    for role in group.roles:
        for span in role.spans(plan, group, chunk, candidates):
            made = span.frame // frames
            moved = sum(moved_by(plan, n) for n in range(made, chunk)) if role.moves else 0
            found.append(first_position(plan, made, made) + span.frame % frames + moved)
    own = first_position(plan, chunk, chunk)
    return [*found, *range(own, own + frames)]


@pytest.mark.parametrize(("sink", "recent"), [(3, 6), (1, 5), (0, 6), (3, 5), (2, 0), (0, 0), (5, 4), (7, 0)])
def test_frames_have_the_positions_of_their_order_in_the_cache(sink: int, recent: int) -> None:
    plan = window(sink, recent)
    assert plan.window_frames == sink + recent + 3
    for chunk in range(8):
        size = min(3 * chunk + 3, plan.window_frames)
        assert seen(plan, plan.layers[0][0], chunk) == list(range(size))


def test_within_the_first_window_positions_are_those_of_the_video() -> None:
    assert begins(window(3, 6)) == [0, 3, 6, 9, 9, 9, 9]
    assert begins(window(3, 5)) == [0, 3, 6, 8, 8, 8, 8], "a window that is not whole chunks"
    assert [moved_by(window(3, 5), n) for n in range(5)] == [0, 0, -1, -3, -3]
    absolute = window(3, 6)
    absolute = build_plan(replace(absolute.spec, positions="absolute"), absolute.geometry, absolute.policy)
    assert begins(absolute) == [0, 3, 6, 9, 12, 15, 18]
    assert {moved_by(absolute, n) for n in range(9)} == {0}


def test_the_window_is_that_of_the_group_that_sees_farthest() -> None:
    forcing = plan_of(load_policy("forcing-kv"))
    # Sink, the frames that segments come from (the chunk before and the transition frame it had), the chunk.
    assert forcing.window_frames == 1 + (3 + 1) + 3
    static, dynamic = forcing.layers[1]
    assert seen(forcing, static, 9) == [0, 4, 5, 6, 7]
    kept = [1] * 6  # all of the oldest frame, the transition frame of the chunk before
    assert seen(forcing, dynamic, 9) == [0, *kept, 4, 5, 6, 7]
    assert plan_of(load_policy("full"), attended_frames=12, sink_frames=3).window_frames == 12
    mixed = Policy("any", "", {"static": roles(1, 4), "dynamic": roles(3, 1)})
    assert plan_of(mixed).window_frames == 5 + 3


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    frames = draw(st.integers(1, 5))
    retained = Retained(2, 0.5, draw(st.integers(0, 1))) if draw(st.booleans()) else None
    sinks = st.integers(0, 2 * frames)
    static = roles(draw(sinks), draw(st.integers(0, 9)))
    dynamic = roles(draw(sinks), draw(st.integers(1 if retained else 0, 9)), retained)
    policy = Policy("any", "", {"static": static, "dynamic": dynamic})
    sizes = {"frames_per_chunk": frames, "attended_frames": 4 * frames, "ar_start": draw(st.integers(0, 2))}
    return plan_of(policy, layers=2, **sizes)


@given(plans())
def test_every_frame_that_moves_keeps_its_distance_to_the_chunk(plan: CachePlan) -> None:
    frames = plan.spec.frames_per_chunk
    for group, _ in plan.kinds:
        for chunk in range(plan.phases[-1].first_chunk + 4):
            own = first_position(plan, chunk, chunk)
            spans = [
                (role, span.frame)
                for role in group.roles
                for span in role.spans(plan, group, chunk, range(plan.choice.kept) if plan.choice else None)
            ]
            positions = seen(plan, group, chunk)
            assert positions[len(spans) :] == list(range(own, own + frames)), "then the chunk's own"
            for (role, frame), position in zip(spans, positions[: len(spans)], strict=True):
                assert position == (own - (chunk * frames - frame) if role.moves else frame)
                assert 0 <= position < own, "after the sink, and before the chunk"


def test_a_cache_that_was_made_anew_counts_anew() -> None:
    plan = window(3, 6)
    assert [first_position(plan, passes, 70 + passes) for passes in range(5)] == [0, 3, 6, 9, 9]


@pytest.mark.parametrize("frames", [-3, -1, 0, 5])
def test_turned_keys_are_those_of_the_other_position(frames: int) -> None:
    spec = small_spec(head_dim=24)
    raw = np.random.default_rng(0).standard_normal((spec.geometry().frame_tokens, 24))

    def at(position: int) -> np.ndarray:
        cosines, sines = positions.rotary(spec, spec.geometry(), position, 1)
        even, odd = raw[:, ::2], raw[:, 1::2]
        return np.stack((even * cosines - odd * sines, even * sines + odd * cosines), -1).reshape(raw.shape)

    cosines, sines = positions.turn(spec, frames)
    before = at(7)
    swapped = before.reshape(-1, 12, 2)[..., ::-1].reshape(raw.shape)
    np.testing.assert_allclose(before * cosines + swapped * sines, at(7 + frames), atol=1e-6)
    of_time = 2 * spec.rotary_pairs[0]
    assert (cosines[of_time:] == 1).all()
    assert not sines[of_time:].any(), "rows and columns stay to the bit"


def test_what_a_model_and_a_policy_may_say(tmp_path: Path) -> None:
    spec, policy = small_spec(), load_policy("full")
    said = {
        (of_model, of_policy): build_plan(
            replace(spec, positions=of_model), spec.geometry(), replace(policy, positions=of_policy)
        ).relative
        for of_model in ("absolute", "relative")
        for of_policy in (None, "absolute", "relative")
    }
    assert [key for key, relative in said.items() if relative] == [
        ("absolute", "relative"),
        ("relative", None),
        ("relative", "relative"),
    ]
    assert spec.positions == "absolute"
    file = tmp_path / "endless.toml"
    file.write_text('base = "window"\npositions = "relative"\n')
    assert load_policy(str(file)).positions == "relative"
    file.write_text('base = "longlive"\npositions = "relative"\n')
    assert load_spec(str(file)).positions == "relative"


@pytest.mark.parametrize("value", ['"endless"', '"Relative"', "true", "3", "[]"])
def test_another_word_is_refused(value: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for base, load in (("window", load_policy), ("longlive", load_spec)):
        file.write_text(f'base = "{base}"\npositions = {value}\n')
        with pytest.raises(InputError, match=r"positions is .*; expected 'absolute' or 'relative'"):
            load(str(file))


def test_a_window_too_short_for_sink_and_chunk_is_refused() -> None:
    with pytest.raises(InputError, match="sink_frames is 2; expected 0 to 0: of 3 attended frames 3"):
        plan_of(load_policy("full"), attended_frames=3, sink_frames=2)
    with pytest.raises(
        InputError, match="attends to 15 frames; expected at least 16, those of the chunk and"
    ):
        window(13, 0)


def test_manifests_of_before_have_positions_of_the_video() -> None:
    spec, policy = small_spec(), load_policy("window")
    old = {name: value for name, value in to_data(spec).items() if name != "positions"}
    assert from_data(ModelSpec, old, "manifest") == spec
    assert "positions" not in to_data(policy)
    relative = replace(policy, positions="relative")
    assert from_data(Policy, to_data(relative), "manifest") == relative
