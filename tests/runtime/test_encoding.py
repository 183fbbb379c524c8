"""Which frames one pass encodes after a switch, and where the cache stands then: plans, without a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.rebuild import Encoding, encoding, kept_chunks, newest_frames, replayed, rows_of
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.spec import ModelSpec
from tests.conftest import headmap_of, roles, small_spec
from tests.runtime.test_recache import plans


def plan_of(policy: Policy | str, **changes: Any) -> CachePlan:
    spec = small_spec(layers=2, **changes)
    policy = load_policy(policy) if isinstance(policy, str) else policy
    return build_plan(spec, spec.geometry(), policy, headmap_of(spec, [[0], [1]]))


LONGLIVE = plan_of("full", attended_frames=12, sink_frames=3)
FORCING_KV = plan_of("forcing-kv", ar_start=2)


@pytest.mark.parametrize(
    ("made", "keep", "wanted"),
    [
        (1, True, Encoding(0, 3, False, 1)),
        (2, True, Encoding(0, 6, False, 2)),
        (4, True, Encoding(0, 12, False, 3)),
        (5, True, Encoding(6, 9, True, 3)),
        (6, True, Encoding(9, 9, True, 3)),
        (40, True, Encoding(111, 9, True, 3)),
        (4, False, Encoding(0, 12, False, 3)),
        (6, False, Encoding(6, 12, False, 3)),
    ],
)
def test_longlive_encodes_its_window(made: int, keep: bool, wanted: Encoding) -> None:
    """12 frames, its own chunk and a sink of 3 among them. The sink stays once it has left these frames."""
    assert encoding(LONGLIVE, made, keep_sink=keep) == wanted


@pytest.mark.parametrize(
    ("made", "keep", "wanted"),
    [
        (1, True, Encoding(2, 1, True, 3)),
        (6, True, Encoding(17, 1, True, 3)),
        (6, False, Encoding(17, 1, False, 3, hollow=True)),
    ],
)
def test_forcing_kv_encodes_one_frame(made: int, keep: bool, wanted: Encoding) -> None:
    """The cache stands as before the first chunk after which segments are chosen, however few were made."""
    assert encoding(FORCING_KV, made, keep_sink=keep) == wanted
    assert FORCING_KV.chooses(wanted.passes)
    assert not FORCING_KV.chooses(wanted.passes - 1)


@pytest.mark.parametrize(
    ("static", "dynamic", "frames"),
    [
        (roles(1, 1), roles(1, 1, Retained(6, 0.66, 1)), 2),
        (roles(3, 1), roles(3, 1, Retained(6, 0.33, 1)), 3),
        (roles(1, 2), roles(1, 3, Retained(6, 0.33, 1)), 3),
        (roles(0, 1), roles(0, 1), 1),
    ],
)
def test_as_many_as_the_role_that_caches_most(
    static: tuple[Role, ...], dynamic: tuple[Role, ...], frames: int
) -> None:
    assert newest_frames(plan_of(Policy("any", "", {"static": static, "dynamic": dynamic}))) == frames


@given(plans(), st.integers(1, 20))
def test_what_is_encoded_fills_the_cache(plan: CachePlan, made: int) -> None:
    """For any plan: the newest frames come into each role, at the lengths of a point of the video."""
    frames = made * plan.spec.frames_per_chunk
    lengths = [
        [plan.tokens(e.group, e.role, n) for e in plan.entries if not e.role.chooses]
        for n in (made, *(chunk for chunk in range(30) if plan.chooses(chunk)))
    ]
    if plan.choice and lengths[0] != lengths[1] and not made <= next(c for c in range(30) if plan.chooses(c)):
        with pytest.raises(InputError, match="never has its newest frames without segments"):
            encoding(plan, made, keep_sink=True)
        return
    one = encoding(plan, made, keep_sink=True)
    assert one.first + one.frames == frames
    assert {*range(one.first // plan.spec.frames_per_chunk, made)} <= {*kept_chunks(plan, made)}, (
        "their latents are kept"
    )
    taken = rows_of(plan, one)
    for entry in plan.entries:
        name = f"{entry.role.name}_rows.{entry.group.label}"
        rows = taken.get(name, np.arange(0))
        if isinstance(entry.role, Recent):
            held = [span.frame for span in entry.role.spans(plan, entry.group, made, None)]
            again = [one.first + row // plan.frame_tokens for row in rows[:: plan.frame_tokens]]
            assert again == held, "those that it held, encoded anew"
            assert len(rows) == plan.tokens(entry.group, entry.role, one.passes)
        elif isinstance(entry.role, Sink):
            assert name not in taken, "it stays"
            assert plan.tokens(entry.group, entry.role, one.passes) == plan.tokens(
                entry.group, entry.role, made
            )
        else:
            assert plan.tokens(entry.group, entry.role, one.passes) == 0


@given(plans())
def test_kept_latents_do_not_grow(plan: CachePlan) -> None:
    most = len(kept_chunks(plan, 1000))
    for made in range(20):
        assert {*kept_chunks(plan, made + 1)} <= {*kept_chunks(plan, made), made}
        assert {*replayed(plan, made)} <= {*kept_chunks(plan, made)}
        assert len(kept_chunks(plan, made)) <= most


def test_a_sink_made_anew_is_the_first_of_the_frames() -> None:
    one = encoding(LONGLIVE, 6, keep_sink=False)
    rows, tokens = rows_of(LONGLIVE, one), LONGLIVE.frame_tokens
    np.testing.assert_array_equal(rows["sink_rows.all"], np.arange(3 * tokens))
    np.testing.assert_array_equal(rows["recent_rows.all"], np.arange(6 * tokens, 12 * tokens))
    hollow = rows_of(FORCING_KV, encoding(FORCING_KV, 6, keep_sink=False))
    assert {name: len(made) for name, made in hollow.items()} == {
        "sink_rows.static": FORCING_KV.frame_tokens,
        "sink_rows.dynamic": FORCING_KV.frame_tokens,
        "recent_rows.static": 0,
        "recent_rows.dynamic": 0,
        "retained_rows.dynamic": 0,
    }


class _Odd(Recent):
    name = "odd"
    encoded_rows = Role.encoded_rows


class _Coded(Recent):
    read_as_cached = False


@pytest.mark.parametrize(
    ("group", "keep", "message"),
    [
        ((_Odd(1),), True, "no pass over newest frames makes the role odd of the policy any"),
        ((_Coded(1),), True, "caches something else than keys and values as they are attended to"),
        (roles(1, 12, Retained(2, 0.34, 1)), True, "never has its newest frames without segments"),
        (roles(1, 3), False, "has other frames than the sink, some of which would be missing"),
    ],
)
def test_what_one_pass_cannot_make_is_refused(group: tuple[Role, ...], keep: bool, message: str) -> None:
    plan = plan_of(Policy("any", "", {"static": group, "dynamic": group}), attended_frames=18)
    with pytest.raises(InputError, match=message) as raised:
        encoding(plan, 9, keep_sink=keep)
    assert "recache replay or none" in str(raised.value)


def test_the_preset_of_longlive_was_trained_so() -> None:
    assert load_spec("longlive").recache == "keep-sink"
    assert load_spec("self-forcing").recache == "replay"
    with pytest.raises(InputError, match="recache is 'sometimes'; expected 'replay' or 'keep-sink' or"):
        from_data(ModelSpec, to_data(small_spec()) | {"recache": "sometimes"}, "spec.toml")
