"""Keys and values in fewer bits: what codes are, that they are written once, and what is refused."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from forcingkv.headmaps import InputError
from forcingkv.models.kv import advance, attend_cache, empty_cache
from forcingkv.models.kv_codes import CodedKeysValues, as_attended, as_cached, decoded, encoded
from forcingkv.models.wan import KeysValues
from forcingkv.prune.reference import prune_score
from forcingkv.runtime.kv.bank import Bank
from forcingkv.runtime.kv.codes import CODINGS, FewerBits
from forcingkv.runtime.kv.ema import Ema
from forcingkv.runtime.kv.merged import Merged
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.retained import Retained
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.kv.scenes import Scene
from forcingkv.runtime.kv.strided import Strided
from tests.conftest import small_spec

ALL: tuple[FewerBits, ...] = get_args(FewerBits)
LEVELS = {"int8": 127, "int4": 7}
SPEC = small_spec(layers=1, attended_frames=12)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(*shape[:-1], 1, generator=generator) * 4
    return (torch.randn(*shape, generator=generator) * sizes).to(dtype)


def plan_of(*roles: Role, positions: str = "absolute", **changes: object) -> CachePlan:
    spec = small_spec(**({"layers": 1, "attended_frames": 12, "positions": positions} | changes))
    return build_plan(spec, spec.geometry(), Policy("tried", "", {"all": roles}))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("width", [64, 96, 12])
def test_whole_numbers_are_rounded_half_to_even_by_the_largest_of_a_group(
    name: FewerBits, width: int
) -> None:
    x, coding = numbers(1, 3, 50, width), CODINGS[name]
    found = decoded(*encoded(x, coding), coding, x.dtype).numpy()
    group = 32 if name == "int4" and width % 32 == 0 else width
    parts = x.numpy().reshape(1, 3, 50, -1, group)
    scales = np.abs(parts).max(-1, keepdims=True) * np.float32(1 / LEVELS[name])
    wanted = np.rint(parts / scales) * scales
    np.testing.assert_array_equal(found, wanted.reshape(x.shape))
    assert np.abs(found - x.numpy()).max() <= scales.max() / 2 * 1.0001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_has_the_numbers_that_torch_rounds_to(dtype: torch.dtype) -> None:
    x, coding = numbers(1, 2, 500, 64, dtype=dtype), CODINGS["fp8"]
    x[0, 0, 0] = torch.cat([torch.zeros(24), 2.0 ** torch.arange(-24, 16)]).to(
        dtype
    )  # below its least number
    codes, scales = encoded(x, coding)
    steps = (x.float() / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(decoded(codes, scales, coding, dtype), steps * scales)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_read_is_exact_but_for_one_rounding(name: FewerBits, dtype: torch.dtype) -> None:
    coding = CODINGS[name]
    codes, scales = encoded(numbers(1, 2, 500, 64, dtype=dtype), coding)
    wide = decoded(codes, scales.float(), coding, torch.float32)
    assert torch.equal(decoded(codes, scales, coding, dtype), wide.to(dtype))


def test_two_codes_of_four_bits_lie_in_a_byte() -> None:
    pairs = torch.cartesian_prod(torch.arange(-7.0, 8), torch.arange(-7.0, 8))
    x = torch.stack([torch.cat([pairs[:, half], torch.tensor([7.0])]) for half in (0, 1)], -1)
    codes, scales = encoded(x, CODINGS["int4"])
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, (226, 1), (226, 1))
    assert torch.equal(
        codes[:, 0].unique(), torch.arange(-119, 120).to(torch.int8)[codes[:, 0].unique().long() + 119]
    )
    np.testing.assert_allclose(decoded(codes, scales, CODINGS["int4"], x.dtype), x, atol=1)
    full = torch.cat([x, torch.full_like(x, 7)], -1)[:, [0, 2, 1, 3]]
    assert torch.equal(decoded(*encoded(full, CODINGS["int4"]), CODINGS["int4"], x.dtype).round(), full)


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_nothing_at_all_are_read_as_they_are(name: FewerBits) -> None:
    coding = CODINGS[name]
    for dtype in (torch.float32, torch.float16):
        for tokens in (0, 3):
            x = torch.zeros(1, 2, tokens, 64, dtype=dtype)
            assert torch.equal(decoded(*encoded(x, coding), coding, dtype), x)


def passes(plan: CachePlan, chunks: int) -> tuple[list[KeysValues], list[dict[str, KeysValues]]]:
    """Keys and values of each chunk, and what the only group caches after it."""
    generator = torch.Generator().manual_seed(1)
    shape = 1, plan.spec.heads, plan.chunk_tokens, plan.spec.head_dim
    new = [KeysValues(*torch.randn(2, *shape, generator=generator)) for _ in range(chunks)]
    cache, held = empty_cache(plan, new[0].keys), []
    for chunk, kv in enumerate(new):
        cache, _ = advance(plan, cache, [kv], chunk=chunk)
        held.append(dict(cache[0][0]))
    return new, held


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("recent", [None, "int8", "same"])
def test_codes_are_written_once_and_carried_on(name: FewerBits, recent: FewerBits | None) -> None:
    """Also where frames were in these bits before they came to the role. Where they were in others, they are
    rounded a second time; the first frame of each chunk is in none, it leaves the recent ones at once."""
    before = name if recent == "same" else recent
    roles = Sink(1, dtype=name), Bank(2, 2, dtype=name), Strided(1, 3, dtype=name), Recent(2, dtype=before)
    plan = plan_of(*roles)
    exact = plan_of(*(type(role)(**{**vars(role), "dtype": None}) for role in roles))
    (new, held), (_, wanted) = passes(plan, 6), passes(exact, 6)
    joined = KeysValues(*(torch.cat(part, 2) for part in zip(*new, strict=True)))
    for made, alike in zip(held, wanted, strict=True):
        for role in roles:
            own, rounded = made[role.name], joined
            if role.dtype != before and role.name != "sink":
                waited = (torch.arange(18) % 3 > 0).repeat_interleave(plan.frame_tokens)[:, None]
                twice = as_attended(before, as_cached(before, joined), joined.keys)
                pairs = zip(twice, joined, strict=True)
                rounded = KeysValues(*(torch.where(waited, old, once) for old, once in pairs))
            assert isinstance(own, CodedKeysValues) == (role.dtype is not None)
            tokens = _tokens_of(alike[role.name].keys, joined.keys)
            if role.name == "bank" and before is not None:
                tokens = _tokens_of(as_attended(role.dtype, own, joined.keys).keys, joined.keys)
            coded = as_cached(role.dtype, KeysValues(*(part[:, :, tokens] for part in rounded)))
            for found, known in zip(own, coded, strict=True):
                assert torch.equal(found, known)


def _tokens_of(held: Tensor, joined: Tensor) -> Tensor:
    """Which tokens of a video are cached: those with the nearest keys."""
    return torch.cdist(held[0, 0], joined[0, 0]).argmin(1)


def test_segments_are_chosen_by_exact_keys_and_become_codes_then() -> None:
    plan = plan_of(Sink(1), Retained(3, 0.5, dtype="int4"), Recent(1))
    new, held = passes(plan, 4)
    split = plan.frame_tokens, 3, 4
    transition = KeysValues(*(part[:, :, -plan.frame_tokens :] for part in new[2]))
    *kept, _ = prune_score(*transition, *new[3], *split)
    for found, known in zip(held[3]["retained"], as_cached("int4", KeysValues(*kept)), strict=True):
        assert torch.equal(found, known)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("fp8", 0.05), ("int4", 0.2)])
def test_attention_hardly_sees_the_difference(name: FewerBits, most: float) -> None:
    exact = plan_of(Sink(1), Recent(8))
    plan = plan_of(Sink(1, dtype=name), Recent(8, dtype=name))
    queries = torch.randn(1, SPEC.heads, plan.chunk_tokens, SPEC.head_dim)
    seen = []
    for one in (exact, plan):
        new, held = passes(one, 3)
        seen.append(attend_cache(one, [[held[-1]]])(0, queries, new[0]))
    error = (seen[1] - seen[0]).norm() / seen[0].norm()
    assert 0 < error < most


def test_a_scene_keeps_the_dtype_of_its_frames() -> None:
    plan = plan_of(Sink(1), Recent(8, dtype="int8"), scene_frames=3, scene_offset=2)
    assert plan.groups[0].roles[1] == Scene(8, dtype="int8")


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        ((Ema((0.1,), dtype="int8"), Recent(1)), "the role ema has the dtype int8: an average goes on from"),
        (
            (Merged(2, 1, 1, dtype="int4"), Recent(1)),
            "the role merged has the dtype int4: a block is summed up",
        ),
    ],
)
def test_a_role_that_computes_with_what_it_caches_is_refused(roles: tuple[Role, ...], why: str) -> None:
    with pytest.raises(InputError, match=why):
        plan_of(*roles)


def test_keys_that_turn_with_the_window_are_refused() -> None:
    with pytest.raises(InputError, match="the role recent has the dtype int8, and positions are relative"):
        plan_of(Sink(1), Recent(2, dtype="int8"), positions="relative")
    plan = plan_of(Sink(1, dtype="int8"), Recent(2), positions="relative")
    assert plan.groups[0].coded
