"""Sessions whose heads remember by averages and by a thinned history: against torch, saved, switched."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.analyze.recorder import record_sample
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.wan import WanModel
from forcingkv.runtime.kv.merged import Merged
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.roles import Recent, Sink
from forcingkv.runtime.kv.strided import Strided
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.lanes import On
from tests.runtime.videos import OTHER, PROMPT, assert_goes_on, assert_same, counted_parts, differ, video_of

SPEC = small_spec(layers=2, attended_frames=12)
GROUPS = {
    "memrope": load_policy("memrope").groups["all"],
    "reward-forcing": load_policy("reward-forcing").groups["all"],
    "anchor": (Sink(3), Strided(every=6, frames=2), Recent(1)),
    "wave": (Sink(1), Strided(every=6, frames=2, cyclic=True), Recent(1)),
    "veil": (Sink(3), Merged(frames=4, patch=2, blocks=2), Recent(1)),
}
POLICY = Policy("all of them", "each in its own heads", GROUPS, positions="relative")
LABELS = (("memrope", "reward-forcing", "veil"), ("anchor", "wave", "memrope"))
MAP = HeadMap(ModelIdentity(SPEC.name, 2, 3), LABELS, Rule("given"))
CHUNKS = 10


def remembering_bundle() -> Path:
    """Whole videos are compared below; every phase is in tests/export/test_remembered.py."""
    return shared_bundle(SPEC, random_model(SPEC).state_dict(), POLICY, headmap=MAP, verify=False)


@pytest.fixture(scope="module")
def bundle() -> Path:
    return remembering_bundle()


def test_a_session_makes_the_video_that_torch_makes(bundle: Path, on: On) -> None:
    model, text = WanModel(SPEC), torch.from_numpy(encode_words(SPEC, PROMPT))
    orders = head_orders(SPEC, POLICY, MAP)
    model.load_state_dict(permute_heads(random_model(SPEC).state_dict(), SPEC, orders))
    with on.open(bundle) as session:
        made = video_of(session, CHUNKS)
        again = video_of(session, CHUNKS)
        plan = session.plan
    assert plan.window_frames == 3 + 1 + 12 + 3, "that of anchor heads"
    for chunk, known in zip(made, generate(model, plan, text, seeded_noise(plan, 7), CHUNKS), strict=True):
        np.testing.assert_allclose(chunk.latents, known.latents.numpy(), atol=2e-5, rtol=0)
    assert_same(again, made)  # what the last chunk was told is told anew


def test_it_goes_on_to_the_bit_when_restored(bundle: Path, on: On, tmp_path: Path) -> None:
    with on.open(bundle) as session:
        assert_goes_on(session, tmp_path, (2, 4, 6))


def test_bytes_are_counted(bundle: Path, on: On) -> None:
    """An average takes as much as a frame in float32; on torch what is read of it lies beside it."""
    with on.open(bundle) as session:
        parts = counted_parts(session)
    frame = 2 * 4 * SPEC.head_dim * session.plan.frame_tokens  # of a head
    assert parts["kv_ema"] == 2 * frame * (2 * 2 + 3)
    if on.name == "torch":  # what attention reads of it lies beside it, and what it does not read only once
        assert parts["kv_strided"] == frame * (2 + (4 + 2))
        assert parts["kv_merged"] == frame // 4 * (3 + 2)
    else:
        assert parts["kv_strided"] == 2 * frame * (2 + 4)
        assert parts["kv_merged"] == 2 * frame // 4 * 3
    seen = session.plan.kv_bytes_by_role()
    assert (seen["strided"], seen["merged"]) == (frame * 4, frame // 4 * 2)


def test_a_switch_makes_them_anew(bundle: Path, on: On) -> None:
    with on.open(bundle) as session:
        plain = video_of(session, 8)
        video = session.generate(PROMPT, seed=7, chunks=8)
        first = list(islice(video, 6))
        why = {"torch": "caches something else than keys and values"}.get(on.name, "has no graph")
        with pytest.raises(InputError, match=why):
            video.switch(OTHER, recache="keep-sink")
        video.switch(OTHER, recache="replay")
        rest = list(video)
    assert_same(first, plain[:6])
    assert all(map(differ, rest, plain[6:]))
    assert all(np.isfinite(chunk.latents).all() for chunk in rest)


def test_a_plan_says_when_averages_start() -> None:
    plan = build_plan(SPEC, SPEC.geometry(), POLICY, MAP)
    group = next(group for group in plan.groups if group.label == "memrope")
    lengths = [
        [n // plan.frame_tokens for label, _, n in plan.phase(c).tokens if label == "memrope"]
        for c in range(6)
    ]
    assert lengths == [[0, 0, 0], [3, 0, 0], [3, 2, 1], *[[3, 2, 4]] * 3]
    told = [plan.rows(chunk) for chunk in range(6)]
    assert [rows["ema_update.memrope"].tolist() for rows in told] == [[0], [0], [0], [1], [2], [2]]
    assert [rows["ema_update.reward-forcing"].tolist() for rows in told] == [[0], [0], [2], [2], [2], [2]]
    assert [s.frame for role in group.roles for s in role.spans(plan, group, 5, None)] == [
        0,
        1,
        2,
        3,
        4,
        11,
        12,
        13,
        14,
    ]


def test_the_recorder_names_the_frames_that_are_seen() -> None:
    """Of averages the frames whose places they have, of blocks those that they stand at."""
    plan = build_plan(SPEC, SPEC.geometry(), POLICY, MAP)
    model = WanModel(SPEC)
    orders = head_orders(SPEC, POLICY, MAP)
    model.load_state_dict(permute_heads(random_model(SPEC).state_dict(), SPEC, orders))
    text = torch.from_numpy(encode_words(SPEC, PROMPT))
    rows = record_sample(model, plan, text, 1, 0, 9)
    seen = {}
    for row in rows.filter(rows["chunk"] == 8).iter_rows(named=True):
        frames = zip(row["role"], row["key_frame"], strict=True)
        seen[row["layer"], row["head"]] = [frame for role, frame in frames if role != "current"]
        assert sum(row["mass"]) == pytest.approx(1, abs=1e-5)
    memrope = [0, 1, 2, 3, 4, 20, 21, 22, 23]
    assert [seen[0, head] for head in range(3)] == [memrope, [0, 1, 2, 21, 22, 23], [0, 1, 2, 13, 17, 23]]
    assert [seen[1, head] for head in range(3)] == [memrope, [0, 1, 2, 12, 18, 23], [0, 12, 18, 23]]
