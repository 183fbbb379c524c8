"""How segments are chosen: each choice against its formula written out, and what holds for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.kv import Cache, advance, empty_cache
from forcingkv.models.kv_roles import choose_ahead
from forcingkv.models.wan import KeysValues
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.retained import Retained
from tests.conftest import choosing, headmap_of, random_model, retained_in, small_spec

STATIC = [[0], [1, 2], [], [0]]
"""Heads of each layer; layer 0 is not split, so layers 1 to 3 retain."""


def plan_with(**changes: Any) -> CachePlan:
    """forcing-kv on the small model, with other parameters of its retained segments."""
    spec, policy = small_spec(), load_policy("forcing-kv")
    return build_plan(spec, spec.geometry(), choosing(policy, **changes), headmap_of(spec, STATIC))


def chunk_of_keys(plan: CachePlan, seed: int) -> list[KeysValues]:
    """Keys and values of a clean pass, for each layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = 1, plan.spec.heads, plan.chunk_tokens, plan.spec.head_dim

    def drawn() -> Tensor:
        return torch.randn(shape, generator=generator)

    return [KeysValues(drawn(), drawn()) for _ in range(plan.spec.layers)]


def advanced(plan: CachePlan, chunks: int = 4) -> tuple[Cache, Cache, list[KeysValues], Tensor]:
    """The caches before and after the last of some clean passes, its keys, and its indices."""
    before: Cache = empty_cache(plan, torch.zeros(1))
    for chunk in range(chunks):
        new = chunk_of_keys(plan, chunk)
        after, indices = advance(plan, before, new, chunk=chunk)
        if chunk + 1 == chunks:
            assert indices is not None
            return before, after, new, indices
        before = after
    raise AssertionError("no chunks")


def candidate_frames(plan: CachePlan, before: Cache, new: list[KeysValues], layer: int, part: str) -> Tensor:
    """(heads, frames, tokens, head_dim) of the dynamic heads: old transition frame, then the new ones."""
    at = next(i for i, group in enumerate(plan.layers[layer]) if group.label == "dynamic")
    group = plan.layers[layer][at]
    transition = getattr(before[layer][at]["recent"], part)[0]
    own = getattr(new[layer], part)[0, group.start : group.stop]
    return torch.cat([transition, own], 1).unflatten(1, (-1, plan.frame_tokens))


def scored(plan: CachePlan, before: Cache, new: list[KeysValues], layer: int) -> list[int]:
    """The k least similar segments by docs/method.md, a token at a time."""
    keys = candidate_frames(plan, before, new, layer, "keys")
    retain = retained_in(plan.policy)
    size, found = plan.frame_tokens // retain.segments, []
    for segment in range(retain.segments * plan.spec.frames_per_chunk):
        frame, place = divmod(segment, retain.segments)
        cosines = []
        for token in range(place * size, (place + 1) * size):
            here, there = keys[:, frame, token].flatten(), keys[:, frame + 1, token].flatten()
            cosines.append(float(here @ there / (here.norm() * there.norm())))
        found.append((sum(cosines) / size, segment))
    return sorted(segment for _, segment in sorted(found)[: retain.kept(plan.spec.frames_per_chunk)])


def collected(
    plan: CachePlan, before: Cache, new: list[KeysValues], layer: int, chosen: list[int], part: str
) -> Tensor:
    """The chosen segments, cut out one by one."""
    frames = candidate_frames(plan, before, new, layer, part)
    retain = retained_in(plan.policy)
    size, cut = plan.frame_tokens // retain.segments, []
    for segment in chosen:
        frame, place = divmod(segment, retain.segments)
        cut.append(frames[:, frame, place * size : (place + 1) * size])
    return torch.cat(cut, 1)[None]


def retained(plan: CachePlan, after: Cache) -> dict[int, KeysValues]:
    """What each layer that retains holds."""
    return {layer: held["retained"] for layer, row in enumerate(after) for held in row if "retained" in held}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared": False},
        {"choose": "uniform"},
        {"choose": "random", "seed": 5},
        {"choose": "random", "shared": False},
        {"segments": 4, "ratio": 0.5, "shared": False},
    ],
)
def test_each_layer_holds_the_segments_of_its_choice(changes: dict[str, Any]) -> None:
    plan = plan_with(**changes)
    before, after, new, indices = advanced(plan)
    retain = retained_in(plan.policy)
    layers = [1, 2, 3]
    rows = [indices.tolist()] * 3 if retain.shared else indices.tolist()
    for layer, row in zip(layers, rows, strict=True):
        if retain.choose == "least-similar":
            assert row == scored(plan, before, new, 1 if retain.shared else layer)
        kept = retained(plan, after)[layer]
        for part in KeysValues._fields:
            assert torch.equal(getattr(kept, part), collected(plan, before, new, layer, row, part))
    if not retain.shared:
        assert len({tuple(row) for row in rows}) > 1, "the layers differ, or nothing was tested"


@pytest.mark.parametrize("choose", ["uniform", "random"])
@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(0, 9),
    st.integers(0, 99),
)
def test_what_holds_for_choices_made_ahead(
    choose: Any, sizes: tuple[int, int], seed: int, chunk: int
) -> None:
    candidates, kept = sizes
    retain = Retained(1, 0.5, 1, choose=choose, seed=seed)
    chosen = choose_ahead(retain, candidates, kept, 1, chunk)
    assert chosen is not None
    assert len(chosen) == len(set(chosen)) == kept
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(candidates))
    assert chosen == choose_ahead(retain, candidates, kept, 1, chunk), "the same every time"


@pytest.mark.parametrize(
    ("candidates", "kept", "expected"),
    [
        (18, 6, [1, 4, 7, 10, 13, 16]),
        (18, 1, [9]),
        (3, 1, [1]),
        (4, 4, [0, 1, 2, 3]),
        (18, 4, [2, 6, 11, 15]),
    ],
)
def test_uniform_takes_the_middle_of_equal_parts(candidates: int, kept: int, expected: list[int]) -> None:
    assert choose_ahead(Retained(6, 0.33, 1, choose="uniform"), candidates, kept, 1, None) == expected
    middles = [int((place + 0.5) * candidates / kept) for place in range(kept)]
    assert expected == middles


def test_random_draws_anew_for_each_chunk_and_seed_and_evenly() -> None:
    def draw(seed: int, chunk: int, layer: int = 1) -> tuple[int, ...]:
        return tuple(
            choose_ahead(Retained(6, 0.33, 1, choose="random", seed=seed), 18, 6, layer, chunk) or ()
        )

    assert len({draw(0, chunk) for chunk in range(50)}) > 45
    assert len({draw(seed, 3) for seed in range(50)}) > 45
    assert draw(0, 3, layer=1) != draw(0, 3, layer=2)
    counts = torch.bincount(torch.tensor([draw(0, chunk) for chunk in range(600)]).flatten(), minlength=18)
    assert counts.min() > 150, "each is expected 200 times, with a standard deviation of 12"
    assert counts.max() < 250


def test_random_is_refused_without_the_chunk() -> None:
    with pytest.raises(ValueError, match="index of the chunk"):
        choose_ahead(Retained(6, 0.33, 1, choose="random"), 18, 6, 1, None)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("choose", ["uniform", "random"])
def test_at_ratio_1_all_choices_are_one(choose: str, shared: bool) -> None:
    everything = retained(plan_with(), advanced(plan_with(ratio=1.0))[1])
    other = retained(plan_with(), advanced(plan_with(ratio=1.0, choose=choose, shared=shared))[1])
    assert everything.keys() == other.keys() == {1, 2, 3}
    for layer, kv in everything.items():
        assert torch.equal(kv.keys, other[layer].keys)
        assert torch.equal(kv.values, other[layer].values)


@pytest.mark.parametrize("changes", [{"choose": "uniform"}, {"choose": "random"}, {"shared": False}])
def test_choices_are_generated_with_and_reproducible(changes: dict[str, Any]) -> None:
    plan = plan_with(**changes)
    model = random_model(plan.spec)
    text = torch.randn(1, plan.spec.text_length, plan.spec.text_width)
    runs = [list(generate(model, plan, text, seeded_noise(plan, 3), 5)) for _ in range(2)]
    default = list(generate(model, plan_with(), text, seeded_noise(plan, 3), 5))
    for one, again, usual in zip(*runs, default, strict=True):
        assert torch.equal(one.latents, again.latents)
        if not plan.chooses(one.index - 1):
            assert torch.equal(one.latents, usual.latents), "nothing is retained yet"
    assert not torch.equal(runs[0][-1].latents, default[-1].latents)
    retain = retained_in(plan.policy)
    for chunk in runs[0]:
        if chunk.indices is not None and retain.choose != "least-similar":
            assert chunk.indices.tolist() == choose_ahead(retain, 18, 6, 1, chunk.index)
