"""Classes of heads found anew for a video, on torch (Dummy Forcing): against attention written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.kv import Cache
from forcingkv.models.wan import Attend, KeysValues, WanModel
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.backends import LaneOptions
from forcingkv.runtime.backends.torch_classes import check_classes
from forcingkv.runtime.kv.classes import dummy_classes, labels_of
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import CLEAN_PASS
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.conftest import small_bundle
from tests.runtime.lanes import TORCH
from tests.runtime.videos import OTHER, PROMPT, video_of

GIVEN = (("sink", "neighbour", "dummy"), ("neighbour",) * 3)
"""What bundles are baked with: of no meaning to what is found."""


def bundle_of(ar_start: int, policy: str = "dummy-forcing", **options: object) -> Path:
    spec = small_spec(layers=2, ar_start=ar_start)
    headmap = HeadMap(ModelIdentity(spec.name, 2, 3), GIVEN, Rule("given"))
    weights = random_model(spec).state_dict()
    return shared_bundle(spec, weights, load_policy(policy), headmap=headmap, target="torch", **options)


def written_out(ar_start: int) -> tuple[tuple[str, ...], ...]:
    """The classes by the loop, in the model's own order of heads: the attention of every query row that
    counts, in the clean pass of the last chunk in which heads see alike."""
    spec = small_spec(layers=2, ar_start=ar_start)
    uniform = HeadMap(ModelIdentity(spec.name, 2, 3), (("neighbour",) * 3,) * 2, Rule("given"))
    plan = build_plan(spec, spec.geometry(), load_policy("dummy-forcing"), uniform)
    size, own = plan.frame_tokens, plan.chunk_tokens
    mass = np.zeros((2, 2, 3))

    def watch(chunk: int, step: int, cache: Cache, attend: Attend) -> Attend:
        def seen(layer: int, queries: torch.Tensor, current: KeysValues) -> torch.Tensor:
            if (chunk, step) == (ar_start, CLEAN_PASS):
                held = [kv.keys for kv in cache[layer][0].values()]
                keys = torch.cat([*held, current.keys], 2)[0].double()
                count = size // 3
                rows = queries[0].double()[:, [row * own // count for row in range(count)]]
                share = (rows @ keys.mT / spec.head_dim**0.5).softmax(-1).mean(1).numpy()
                first = size if ar_start == 1 else own
                mass[0, layer] = share[:, :first].sum(1)
                mass[1, layer] = share[:, first:-own].sum(1)
            return attend(layer, queries, current)

        return seen

    text = torch.from_numpy(encode_words(spec, PROMPT))
    list(generate(random_model(spec), plan, text, seeded_noise(plan, 7), ar_start + 1, watch))
    return labels_of(dummy_classes(mass, 3))


@pytest.mark.parametrize("ar_start", [1, 2])
def test_classes_are_those_of_attention_and_the_video_is_theirs(ar_start: int) -> None:
    bundle = bundle_of(ar_start)
    with Session.open(bundle, backend="torch") as session:
        other = session.classified(PROMPT, seed=7)
    with other:
        headmap = other.bundle.headmap
        assert headmap is not None
        assert headmap.labels == written_out(ar_start)
        assert headmap.rule == Rule("dummy", sink_frames=1, dummy_heads=3)
        made = video_of(other)
    spec, policy = other.spec, other.plan.policy
    weights = random_model(spec).state_dict()
    model = WanModel(spec).eval()
    model.load_state_dict(permute_heads(weights, spec, head_orders(spec, policy, headmap)))
    text = torch.from_numpy(encode_words(spec, PROMPT))
    plan = build_plan(spec, spec.geometry(), policy, headmap)
    for chunk, wanted in zip(made, generate(model, plan, text, seeded_noise(plan, 7), 7), strict=True):
        np.testing.assert_allclose(chunk.latents, wanted.latents.numpy(), atol=1e-5)


def test_each_video_has_its_own_and_the_session_stays_as_it_was() -> None:
    with TORCH.open(bundle_of(1)) as session:
        before = video_of(session, 4)
        same, again = (session.classified(PROMPT, seed=7) for _ in range(2))
        with same, again:
            assert same.bundle.digest == again.bundle.digest != session.bundle.digest
            counted = sum(same.plan.joined_bytes_by_role("float32").values())
            assert same._memory().cache.nbytes == counted
            differing = {session.classified(OTHER, seed=seed).bundle.digest for seed in range(4)}
            assert len(differing | {same.bundle.digest}) > 1
        for one, other in zip(video_of(session, 4), before, strict=True):
            np.testing.assert_array_equal(one.latents, other.latents)


def test_where_no_classes_can_be_found_it_is_refused() -> None:
    with TORCH.open(bundle_of(0)) as session, pytest.raises(InputError, match="ar_start is 0"):
        session.classified(PROMPT, seed=7)
    spec = small_spec(layers=2)
    plain = shared_bundle(spec, random_model(spec).state_dict(), load_policy("window"), target="torch")
    with TORCH.open(plain) as session, pytest.raises(InputError, match="groups all; expected sink neighbour"):
        session.classified(PROMPT, seed=7)
    plan = Bundle.open(bundle_of(1)).plan
    for asked in ({"compiled": True}, {"cuda_graphs": True}):
        with pytest.raises(InputError, match=f"{next(iter(asked))} is asked for"):
            check_classes(plan, LaneOptions("torch", **asked))


def test_graphs_have_their_groups_baked_in() -> None:
    with (
        Session.open(small_bundle("dummy-forcing"), backend="onnxruntime") as session,
        pytest.raises(
            InputError, match="backend that finds classes of heads 'onnxruntime'; expected one of torch"
        ),
    ):
        session.classified(PROMPT, seed=7)
