"""Sessions with tokens by a score: against torch, saved, counted, switched."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.analyze.recorder import record_sample
from forcingkv.headmaps import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.wan import WanModel
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent, Sink
from forcingkv.runtime.kv.tokens import Tokens
from forcingkv.runtime.spec import ModelSpec, Positions
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model
from tests.exported import shared_bundle
from tests.models.query_statistics import made_up
from tests.runtime.lanes import On
from tests.runtime.videos import (
    ONE_LAYER,
    OTHER,
    PROMPT,
    TWO_LAYERS,
    assert_goes_on,
    assert_same,
    counted_parts,
    differ,
    near_and_far,
    video_of,
)

SPEC = ONE_LAYER
MAP = near_and_far(SPEC)
CHUNKS = 10
STATISTICS = made_up(SPEC)
POSITIONS: tuple[Positions, ...] = ("absolute", "relative")


def policy_of(positions: Positions) -> Policy:
    """One of heads together, one of each by itself; and all scores."""
    near = Tokens(0.5, "similarity" if positions == "relative" else "statistics"), Recent(1)
    far = Sink(3), Tokens(2, "queries", together=positions == "relative"), Recent(2)
    return Policy("budgets", "two of them", {"near": near, "far": far}, positions=positions)


def budget_bundle(positions: Positions, spec: ModelSpec = SPEC) -> Path:
    """Whole videos are compared below; every phase is in tests/export/test_token_bundles.py."""
    weights, policy = random_model(spec).state_dict(), policy_of(positions)
    headmap, scores = near_and_far(spec), made_up(spec)
    return shared_bundle(spec, weights, policy, headmap=headmap, statistics=scores, verify=False)


@pytest.fixture(
    scope="module",
    params=[(POSITIONS[0], SPEC), pytest.param((POSITIONS[1], TWO_LAYERS), marks=pytest.mark.long)],
    ids=POSITIONS,
)
def bundle(request: pytest.FixtureRequest) -> Path:
    """Of one layer; the long case is of two, whose heads differ, and of the other positions."""
    return budget_bundle(*request.param)


def test_a_session_makes_the_video_that_torch_makes(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        made = video_of(session, CHUNKS)
        again = video_of(session, CHUNKS)
        plan = session.plan
    spec = plan.spec
    model, text = WanModel(spec), torch.from_numpy(encode_words(spec, PROMPT))
    orders = head_orders(spec, plan.policy, near_and_far(spec))
    model.load_state_dict(permute_heads(random_model(spec).state_dict(), spec, orders))
    for chunk, known in zip(made, generate(model, plan, text, seeded_noise(plan, 7), CHUNKS), strict=True):
        np.testing.assert_allclose(chunk.latents, known.latents.numpy(), atol=2e-5, rtol=0)
    assert_same(again, made)


def test_it_goes_on_to_the_bit_when_restored(bundle: Path, on: On, tmp_path: Path) -> None:
    with on.open(bundle) as session:
        assert_goes_on(session, tmp_path, (1, 6))


def test_bytes_are_counted(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        parts = counted_parts(session)
        plan = session.plan
    size = plan.frame_tokens
    # A token's worth is a number, of which a hidden token has as many as a head is wide.
    hidden = -(-size // 2 // SPEC.head_dim)
    # Two heads near, one far, in each layer.
    seen, cached = 2 * (size // 2) + 2 * size, 2 * (size // 2 + hidden) + 2 * size
    a_token = 2 * 4 * SPEC.head_dim * plan.spec.layers
    assert plan.kv_bytes_by_role()["tokens"] == a_token * seen
    of_torch = seen + 2 * (size // 2 + hidden)  # what has hidden tokens lies apart from what is attended to
    assert parts["kv_tokens"] == a_token * (of_torch if on.name == "torch" else 2 * cached)


def test_a_switch_fills_it_anew(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        plain = video_of(session, 8)
        video = session.generate(PROMPT, seed=7, chunks=8)
        first = list(islice(video, 6))
        with pytest.raises(InputError, match=r"makes the role tokens of the policy budgets|has no graph"):
            video.switch(OTHER, recache="keep-sink")
        video.switch(OTHER, recache="replay")
        rest = list(video)
    assert_same(first, plain[:6])
    assert all(map(differ, rest, plain[6:]))
    assert all(np.isfinite(chunk.latents).all() for chunk in rest)


def test_attention_cannot_be_recorded_by_frames_that_are_not_known() -> None:
    model, plan = random_model(SPEC), build_plan(SPEC, SPEC.geometry(), policy_of("relative"), MAP)
    text = torch.from_numpy(encode_words(SPEC, PROMPT))
    with pytest.raises(InputError, match=r"which tokens the role tokens holds for chunk 1 depends on keys"):
        record_sample(model, plan, text, 1, 0, 4)
