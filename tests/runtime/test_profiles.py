"""Which phases share an optimization profile, and what engines' records say of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import ALL, Policy, load_policy
from forcingkv.runtime.kv.profiles import MOST_PROFILES, Shape, _starts, of_unlike_phases, profiles_of
from tests.conftest import headmap_of, roles, small_spec


def framewise(policy: Policy | None = None, attended: int = 21) -> CachePlan:
    """A plan whose chunks have a frame each: under `full` a phase for each frame that is attended to."""
    spec = small_spec(frames_per_chunk=1, attended_frames=attended)
    headmap = headmap_of(spec, [[0]] * spec.layers)
    return build_plan(spec, spec.geometry(), policy or load_policy("full"), headmap)


def phases_of(plan: CachePlan) -> list[list[int]]:
    return [list(profile.phases) for profile in profiles_of(plan)]


def policy(sink: int, recent: int) -> Policy:
    return Policy(f"{sink}+{recent}", "", {ALL: roles(sink, recent)})


def test_the_phases_of_a_frame_wise_model_under_full_come_into_three_profiles() -> None:
    plan = framewise()
    first, opening, steady = profiles_of(plan)
    assert (first.phases, opening.phases, steady.phases) == (range(1), range(1, 20), range(20, 21))
    keys, tokens = "cache.0.all.recent.keys", plan.frame_tokens

    def lengths(shapes: tuple[Shape, ...]) -> list[float]:
        return [shape[2] / tokens for shape in shapes]

    assert lengths(first.shapes[keys]) == [0, 0, 0]
    assert lengths(opening.shapes[keys]) == [1, 19, 19]
    assert lengths(steady.shapes[keys]) == [20, 20, 20]


def test_what_is_empty_in_one_phase_and_not_in_the_next_is_not_of_one_profile() -> None:
    """A sink, then frames that come one by one: nothing, the sink alone, some, all."""
    assert phases_of(framewise(policy(1, 10))) == [[0], [1], [*range(2, 11)], [11]]
    assert phases_of(framewise(policy(0, 8))) == [[0], [*range(1, 8)], [8]]
    collected = framewise(load_policy("window"))  # a sink of three frames, one a chunk
    assert phases_of(collected) == [[0], [1], [2], [3], [4, 5, 6, 7, 8], [9]]


@pytest.mark.parametrize(("frames", "phases"), [(3, 7), (1, 8)])
def test_up_to_eight_phases_have_a_profile_each(frames: int, phases: int) -> None:
    """As every engine had before: the builder is asked for the same shapes in the same order."""
    plan = framewise(attended=8)
    if frames == 3:
        spec = small_spec(attended_frames=21)
        plan = build_plan(spec, spec.geometry(), load_policy("full"))
    profiles = profiles_of(plan)
    assert len(plan.phases) == len(profiles) == phases
    for number, (profile, phase) in enumerate(zip(profiles, plan.phases, strict=True)):
        assert profile.phases == range(number, number + 1)
        assert profile.shapes == {name: (shape,) * 3 for name, shape in plan.phase_shapes(phase).items()}


def test_a_policy_of_few_phases_stays_as_it_is_on_a_frame_wise_model() -> None:
    plan = framewise(load_policy("forcing-kv"))
    assert phases_of(plan) == [[number] for number in range(len(plan.phases))]
    assert len(plan.phases) == 4


def test_phases_that_share_a_profile_for_want_of_others_are_named() -> None:
    """A sink collected frame by frame over five chunks has a profile for each of them, over six no longer."""
    assert of_unlike_phases(framewise(policy(5, 12))) is None
    assert of_unlike_phases(framewise(policy(1, 12))) is None
    assert phases_of(framewise(policy(6, 12)))[:2] == [[0], [1]]
    assert of_unlike_phases(framewise(policy(6, 12))) is not None


def test_lengths_of_what_is_told_in_each_chunk_may_vary_within_a_profile() -> None:
    spec, pyramid = small_spec(frames_per_chunk=3), load_policy("pyramid")
    row = ("wave", "anchor", "veil")
    headmap = HeadMap(ModelIdentity(spec.name, spec.layers, 3), (row,) * spec.layers, Rule("given"))
    plan = build_plan(spec, spec.geometry(), pyramid, headmap)
    assert phases_of(plan) == [[0], [1], [2], [3, 4, 5, 6, 7, 8], [9]]
    assert of_unlike_phases(plan) is None


@given(st.integers(0, 12), st.integers(0, 20))
def test_profiles_take_the_shapes_of_their_phases(sink: int, recent: int) -> None:
    plan = framewise(policy(sink, recent), attended=40)
    profiles = profiles_of(plan)
    assert [number for profile in profiles for number in profile.phases] == [*range(len(plan.phases))]
    assert len(profiles) <= MOST_PROFILES
    for profile in profiles:
        for number in profile.phases:
            shapes = plan.phase_shapes(plan.phases[number])
            assert shapes.keys() == profile.shapes.keys()
            for name, shape in shapes.items():
                least, usual, most = profile.shapes[name]
                assert all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
                assert number != profile.phases[-1] or shape == usual, "what kernels are chosen for"


@given(st.lists(st.sampled_from([frozenset(), frozenset("a"), frozenset("b"), frozenset("ab")]), min_size=1))
def test_any_phases_come_into_at_most_eight_profiles(empty: list[frozenset[str]]) -> None:
    starts, last = _starts(empty), len(empty) - 1
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] == last, "the phase that a video stays in is alone"
    assert len(starts) <= MOST_PROFILES
    runs = 1 + sum(empty[n] != empty[n - 1] for n in range(1, last))
    if len(empty) <= MOST_PROFILES:
        assert starts == [*range(len(empty))]
    elif runs < MOST_PROFILES:
        stops = [*starts[1:], len(empty)]
        assert all(len(set(empty[start:stop])) == 1 for start, stop in zip(starts, stops, strict=True))
        assert len(starts) == runs + 1, "and no more than that takes"
    else:
        assert len(starts) == MOST_PROFILES


def record(**changes: object) -> EngineRecord:
    numbers = ("layers", "plugin_layers", "weight_bytes", "activation_bytes", "scratch_bytes", "peak_bytes")
    values: dict[str, object] = dict.fromkeys(numbers, 1) | {"seconds": 1.0, "sm": 89, "phases": 21}
    values |= {"graph": "step", "flavour": "tensorrt-rtx", "version": "1.7.1", "file": "engines/step.engine"}
    return EngineRecord(**(values | {"needs_plugin": False} | changes))  # type: ignore[arg-type]


def test_a_record_says_which_profile_a_phase_runs_in() -> None:
    shared = record(profiles=(0, 1, 20))
    assert [shared.profile_of(phase) for phase in range(21)] == [0] + [1] * 19 + [2]
    assert (shared.sharing, list(shared.starts)) == ("0, 1-19, 20", [0, 1, 20])
    assert from_data(EngineRecord, to_data(shared), "it") == shared


def test_a_record_from_before_has_a_profile_for_each_phase() -> None:
    old = record()
    assert "profiles" not in to_data(old)
    assert from_data(EngineRecord, to_data(old), "it") == old
    assert [old.profile_of(phase) for phase in range(21)] == list(old.starts) == [*range(21)]
    assert old.sharing is None


@pytest.mark.parametrize(
    "profiles", [(), (1, 20), (0, 20, 1), (0, 1, 1, 20), (0, 21), (0, -1), (0, True, 3), (0, 1.5)]
)
def test_a_record_whose_profiles_are_in_no_order_is_refused(profiles: tuple[int, ...]) -> None:
    data = to_data(record(profiles=(0, 1, 20))) | {"profiles": list(profiles)}
    with pytest.raises(InputError):
        from_data(EngineRecord, data, "it")
