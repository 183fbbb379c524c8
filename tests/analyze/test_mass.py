"""Attention statistics against a naive softmax in float64, exact and from sampled rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forcingkv.analyze import recorder
from forcingkv.analyze.recorder import AttentionStatistics, KeyRun, attention_statistics


class Case(NamedTuple):
    """Queries, keys by run, and where the keys lie."""

    queries: Tensor
    keys: list[Tensor]
    slots: list[int]
    offsets: list[int]
    tokens: int


def case(
    heads: int, query_frames: int, key_frames: int, tokens: int, width: int, scale: float, seed: int
) -> Case:
    """Whole frames, and a half of the last one once more, in a slot of its own: a retained segment."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, query_frames, tokens, width, generator=generator) * scale
    keys = [torch.randn(heads, tokens, width, generator=generator) for _ in range(key_frames)]
    half = tokens // 2
    if half:
        keys.append(torch.randn(heads, half, width, generator=generator))
    offsets = [0] * key_frames + [tokens - half] * bool(half)
    return Case(queries, keys, list(range(len(keys))), offsets, tokens)


def measured(found: Case, places: Tensor | None = None) -> AttentionStatistics:
    if places is None:
        places = torch.arange(found.tokens).expand(found.queries.shape[1], -1)
        queries = found.queries
    else:
        queries = torch.stack([found.queries[:, f, p] for f, p in enumerate(places)], 1)
    runs = [KeyRun(*parts) for parts in zip(found.keys, found.slots, found.offsets, strict=True)]
    return attention_statistics(queries, runs, places, len(set(found.slots)), found.tokens)


class Naive(NamedTuple):
    """(heads, query frames, rows, ...) in float64, row by row."""

    mass: Tensor
    entropy: Tensor
    same_position: Tensor


def naive(found: Case) -> Naive:
    queries = found.queries.double()
    keys = torch.cat(found.keys, 1).double()
    logits = torch.einsum("hfrd,hkd->hfrk", queries, keys) / math.sqrt(queries.shape[-1])
    attention = logits.softmax(-1)
    owner = torch.cat([torch.full((k.shape[1],), s) for k, s in zip(found.keys, found.slots, strict=True)])
    place = torch.cat([o + torch.arange(k.shape[1]) for k, o in zip(found.keys, found.offsets, strict=True)])
    mass = torch.stack([attention[..., owner == slot].sum(-1) for slot in found.slots], -1)
    own = place == torch.arange(found.tokens)[:, None]
    entropy = -torch.special.xlogy(attention, attention).sum(-1)
    return Naive(mass, entropy, (attention * own).sum(-1))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(0.1, 3),
    st.integers(0, 2**31),
)
def test_exact_statistics_equal_the_full_softmax(
    heads: int, query_frames: int, key_frames: int, tokens: int, width: int, scale: float, seed: int
) -> None:
    found = case(heads, query_frames, key_frames, tokens, width, scale, seed)
    exact, wanted = measured(found), naive(found)
    torch.testing.assert_close(exact.mass, wanted.mass.mean(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.same_position, wanted.same_position.mean(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.entropy, wanted.entropy.mean(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        exact.mass.sum(-1), torch.ones(heads, query_frames).double(), atol=1e-6, rtol=0
    )
    for error in (exact.mass_error, exact.entropy_error, exact.same_position_error):
        assert (error == 0).all(), "all rows were measured"


@settings(deadline=None, max_examples=30)
@given(st.floats(3, 200), st.integers(0, 2**31))
def test_double_precision_stays_double(scale: float, seed: int) -> None:
    """Sharp attention, whose logits float32 cannot hold to 1e-6: in float64 nothing is lost."""
    found = case(2, 2, 4, 7, 16, scale, seed)
    found = found._replace(queries=found.queries.double(), keys=[keys.double() for keys in found.keys])
    exact, wanted = measured(found), naive(found)
    torch.testing.assert_close(exact.mass, wanted.mass.mean(2), atol=1e-12, rtol=0)
    torch.testing.assert_close(exact.entropy, wanted.entropy.mean(2), atol=1e-10, rtol=0)


def test_half_precision_is_measured_in_single() -> None:
    found = case(2, 3, 3, 8, 16, 1.0, 0)
    rounded = found._replace(queries=found.queries.bfloat16(), keys=[keys.bfloat16() for keys in found.keys])
    torch.testing.assert_close(measured(rounded).mass, naive(rounded).mass.mean(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("block", "logits"), [(3, 40), (5, 1), (64, 10**6)])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, block: int, logits: int) -> None:
    found = case(3, 2, 4, 11, 8, 2.0, 7)
    whole = measured(found)
    monkeypatch.setattr(recorder, "KEY_BLOCK", block)
    monkeypatch.setattr(recorder, "LOGITS", logits)
    for name, part in whole._asdict().items():
        torch.testing.assert_close(getattr(measured(found), name), part, atol=1e-6, rtol=0)


def test_runs_of_one_slot_add_up() -> None:
    """Two segments of a frame are one key frame, with the error of their sum."""
    found = case(2, 2, 4, 12, 8, 2.0, 3)
    joined = found._replace(slots=[0, 1, 2, 2, 0])
    places = torch.tensor([[0, 3, 4, 8, 11], [1, 2, 5, 6, 7]])
    apart, together = measured(found, places), measured(joined, places)
    torch.testing.assert_close(together.mass[..., 1], apart.mass[..., 1])
    torch.testing.assert_close(together.mass[..., 0], apart.mass[..., 0] + apart.mass[..., 4])
    rows = torch.stack([naive(found).mass[:, f, p] for f, p in enumerate(places)], 1)
    total = rows[..., 2] + rows[..., 3]
    wanted = total.std(-1) / math.sqrt(5) * math.sqrt(1 - 5 / 12)
    torch.testing.assert_close(together.mass_error[..., 2], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_interval_of_sampled_rows_holds_the_true_value_as_often_as_it_says(scale: float) -> None:
    """400 draws of 60 of 300 rows: the 95% interval holds the mass of all rows in 93 to 97%."""
    found = case(2, 1, 4, 300, 16, scale, 11)._replace(slots=[0, 1, 2, 3, 3])
    truth = naive(found)
    truths = {
        "mass": torch.stack([truth.mass[..., s].mean(2) for s in range(3)], -1),
        "entropy": truth.entropy.mean(2),
        "same_position": truth.same_position.mean(2),
    }
    generator = np.random.default_rng(0)
    draws = 400
    inside = dict.fromkeys(truths, 0.0)
    for _ in range(draws):
        places = torch.from_numpy(np.sort(generator.choice(300, (1, 60), replace=False)))
        sampled = measured(found, places)
        for name, true in truths.items():
            mean, error = getattr(sampled, name), getattr(sampled, f"{name}_error")
            if name == "mass":
                mean, error = mean[..., :3], error[..., :3]
            inside[name] += float(((mean - true).abs() <= 1.96 * error).double().mean()) / draws
    for name in ("mass", "entropy"):
        assert 0.93 <= inside[name] <= 0.97, inside
    # With sharp attention a few rows have nearly all own-place mass: 60 of them are too few for a normal
    # interval, as `attention_statistics` says.
    assert inside["same_position"] >= (0.9 if scale == 1 else 0.7), inside
