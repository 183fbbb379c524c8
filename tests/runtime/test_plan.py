"""Cache plans: the numbers of docs/method.md, and what must hold for any plan."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.spec import Decoder, ModelSpec
from tests.conftest import headmap_of, roles, small_spec

RESOLUTIONS = {"480p": (832, 480), "720p": (1280, 720), "1080p": (1920, 1088)}


def wan(layers: int = 30, heads: int = 12) -> ModelSpec:
    return small_spec(
        layers=layers,
        heads=heads,
        head_dim=128,
        patch=2,
        attended_frames=21,
        decoder=Decoder("wan-vae", 8, 4),
        resolutions=RESOLUTIONS,
    )


@pytest.mark.parametrize(
    ("resolution", "tokens", "gib"), [("480p", 1560, 5.6), ("720p", 3600, 13.0), ("1080p", 8160, 29.4)]
)
def test_the_full_cache_has_the_published_size(resolution: str, tokens: int, gib: float) -> None:
    spec = wan()
    plan = build_plan(spec, spec.geometry(resolution), load_policy("full"))
    assert plan.frame_tokens == tokens
    assert round(plan.kv_bytes("bfloat16") / 2**30, 1) == gib


def test_forcing_kv_keeps_five_and_six_frames() -> None:
    spec = small_spec()
    plan = build_plan(spec, spec.geometry(), load_policy("forcing-kv"), headmap_of(spec, [[0]] * 4))
    frames = {
        label: [
            sum(n for name, _, n in phase.tokens if name == label) / plan.frame_tokens + 3
            for phase in plan.phases
        ]
        for label in ("static", "dynamic")
    }
    assert frames == {"static": [3, 5, 5], "dynamic": [3, 5, 6]}
    assert [phase.first_chunk for phase in plan.phases] == [0, 1, spec.ar_start + 2]
    assert [group.label for group in plan.layers[0]] == ["static"], "layer 0 is not split"
    assert plan.choice is not None
    assert plan.choice.layer == 1


def test_which_tokens_are_kept_of_uneven_segments() -> None:
    """35 tokens in 6 segments begin at 0, 5, 11, 17, 23 and 29; 5 of each are kept, whichever is chosen."""
    spec = small_spec(width=14, height=10)
    plan = build_plan(spec, spec.geometry(), load_policy("forcing-kv"), headmap_of(spec, [[0]] * 4))
    group = plan.layers[1][1]
    role = next(role for role in group.roles if isinstance(role, Retained))
    assert role.steady_tokens(plan, group) == 6 * 5
    assert role.tokens(plan, group, 3) == 6 * 5
    chosen = [0, 1, 5, 6, 9, 17]
    # The chunk of index 2 chose: of its transition frame, 5, and of its own frames 6 and 7.
    starts = {0: (5, 0), 1: (5, 5), 5: (5, 29), 6: (6, 0), 9: (6, 17), 17: (7, 29)}
    assert [(s.frame, s.offset, s.tokens) for s in role.spans(plan, group, 3, chosen)] == [
        (*starts[index], 5) for index in chosen
    ]


def test_a_sink_of_a_whole_chunk_is_not_attended_twice() -> None:
    """With a sink of 3 frames nothing but the sink is cached after chunk 0 (docs/method.md)."""
    spec = small_spec()
    plan = build_plan(spec, spec.geometry(), load_policy("window"))
    group = plan.layers[0][0]
    sink, recent = group.roles
    assert [plan.tokens(group, recent, chunk) // plan.frame_tokens for chunk in range(5)] == [
        0,
        0,
        3,
        6,
        6,
    ]
    assert [plan.tokens(group, sink, chunk) // plan.frame_tokens for chunk in range(3)] == [0, 3, 3]


def policies() -> st.SearchStrategy[Policy]:
    def make(sink: int, recent: int, segments: int) -> Policy:
        dynamic = roles(sink, recent, Retained(segments, 0.34, 1))
        return Policy("any", "", {"static": roles(sink, recent), "dynamic": dynamic})

    return st.builds(make, st.integers(0, 3), st.integers(1, 7), st.integers(1, 24))


@given(policies(), st.integers(0, 3), st.lists(st.lists(st.integers(0, 2)), min_size=4, max_size=4))
def test_what_holds_for_any_plan(policy: Policy, ar_start: int, static: list[list[int]]) -> None:
    spec = small_spec(ar_start=ar_start)
    plan = build_plan(spec, spec.geometry(), policy, headmap_of(spec, static))
    for groups in plan.layers:
        assert sum(group.heads for group in groups) == spec.heads
        assert [group.start for group in groups[1:]] == [group.stop for group in groups[:-1]]
    for chunk in range(plan.phases[-1].first_chunk + 3):
        for groups in plan.layers:
            for group in groups:
                check_lengths(plan, group.label, chunk)
    assert sum(plan.kv_bytes_by_role().values()) == plan.kv_bytes()
    buffers = CacheBuffers(plan, OnnxLane({}), "float32")
    read = plan.kv_bytes() - plan.kv_bytes_by_role()["current"]
    assert read <= buffers.nbytes <= 2 * read


def check_lengths(plan: CachePlan, label: str, chunk: int) -> None:
    phase = plan.phase(chunk)
    for groups in plan.layers:
        for group in groups:
            if group.label == label:
                lengths = {role.name: plan.tokens(group, role, chunk) for role in group.roles}
                frames = lengths.get("sink", 0) + lengths.get("recent", 0)
                assert frames <= chunk * plan.chunk_tokens
                assert all(phase.length(label, role) == n for role, n in lengths.items())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Policy("p", "", {"all": roles(13, 1)}),
            "groups.all: the model attends to 15 frames; expected at least 16, those of the chunk and the s",
        ),
        (
            Policy("p", "", {"all": roles(1, 1, Retained(25, 0.33, 1))}),
            "25 segments are asked of the 24",
        ),
        (Policy("p", "", {"all": roles(1, 1, Retained(6, 0.0, 1))}), "keeps none"),
        (Policy("p", "", {"all": roles(1, 0, Retained(6, 0.3, 1))}), "without a transition frame"),
        (load_policy("forcing-kv"), "needs a head map"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(policy: Policy, message: str) -> None:
    spec = small_spec()
    with pytest.raises(InputError, match=message):
        build_plan(spec, spec.geometry(), policy)
