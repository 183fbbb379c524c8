"""Sessions with a bank of frames: against torch, saved, counted, switched."""

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
from forcingkv.runtime.kv.bank import Bank
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.roles import Recent, Sink
from forcingkv.runtime.spec import ModelSpec, Positions
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
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
POSITIONS: tuple[Positions, ...] = ("relative", "absolute")


def policy_of(positions: Positions) -> Policy:
    groups = {"near": (Bank(2), Recent(1)), "far": (Sink(3), Bank(2, 4), Recent(2))}
    return Policy("banks", "two of them", groups, positions=positions)


def banking_bundle(positions: Positions, spec: ModelSpec = SPEC) -> Path:
    """Whole videos are compared below; every phase is in tests/export/test_banks.py."""
    weights, headmap = random_model(spec).state_dict(), near_and_far(spec)
    return shared_bundle(spec, weights, policy_of(positions), headmap=headmap, verify=False)


@pytest.fixture(
    scope="module",
    params=[(POSITIONS[0], SPEC), pytest.param((POSITIONS[1], TWO_LAYERS), marks=pytest.mark.long)],
    ids=POSITIONS,
)
def bundle(request: pytest.FixtureRequest) -> Path:
    """Of one layer; the long case is of two, whose heads differ, and of the other positions."""
    return banking_bundle(*request.param)


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
        assert_goes_on(session, tmp_path, (2, 6))


def test_bytes_are_counted(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        parts = counted_parts(session)
    heads = 3 * session.plan.spec.layers
    frames = 2 * 4 * SPEC.head_dim * session.plan.frame_tokens * heads * 2  # 2 of each head
    assert parts["kv_bank"] == frames * (1 if on.name == "torch" else 2)
    assert session.plan.kv_bytes_by_role()["bank"] == frames


def test_a_switch_fills_it_anew_or_leaves_it(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        plain = video_of(session, 8)
        video = session.generate(PROMPT, seed=7, chunks=8)
        first = list(islice(video, 6))
        with pytest.raises(InputError, match=r"makes the role bank of the policy banks|has no graph"):
            video.switch(OTHER, recache="keep-sink")
        video.switch(OTHER, recache="replay")
        rest = list(video)
    assert_same(first, plain[:6])
    assert all(map(differ, rest, plain[6:]))
    assert all(np.isfinite(chunk.latents).all() for chunk in rest)


def test_attention_cannot_be_recorded_by_frames_that_are_not_known() -> None:
    model, plan = random_model(SPEC), build_plan(SPEC, SPEC.geometry(), policy_of("absolute"), MAP)
    text = torch.from_numpy(encode_words(SPEC, PROMPT))
    with pytest.raises(InputError, match=r"which frames the role bank holds for chunk 2 depends on keys"):
        record_sample(model, plan, text, 1, 0, 4)


def test_the_shipped_policy_fills_its_bank_by_known_numbers() -> None:
    spec = small_spec(layers=1)
    plan = build_plan(spec, spec.geometry(), load_policy("memflow"))
    group = plan.groups[0]
    bank = group.roles[1]
    held = [bank.tokens(plan, group, chunk) // plan.frame_tokens for chunk in range(16)]
    # Frame 9 leaves the 6 recent ones with the clean pass of chunk 5, frame 18 with that of chunk 8.
    assert held == [0] * 6 + [1] * 3 + [2] * 3 + [3] * 4
