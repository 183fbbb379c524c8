"""The recorder inside generation: every policy, against attention written out from the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forcingkv.analyze.recorder import Recorder, record_sample
from forcingkv.analyze.recording import COLUMNS
from forcingkv.headmaps import HeadMap
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.kv import Cache
from forcingkv.models.wan import Attend, KeysValues, WanModel
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import CLEAN_PASS
from forcingkv.runtime.text import encode_words
from tests.conftest import headmap_of, random_model, small_spec

SPEC = small_spec(width=24, height=12)
CHUNKS = 6
TEXT = torch.from_numpy(encode_words(SPEC, "a b"))
KEY = ["chunk", "step", "layer", "head", "query_frame"]


def headmap_for(policy: str) -> HeadMap | None:
    if policy == "forcing-kv":
        return headmap_of(SPEC, [[1], [0], [2], [1, 2]])
    if policy == "dummy-forcing":
        rows = (("sink", "neighbour", "dummy"), ("dummy", "sink", "sink")) * 2
        base = headmap_of(SPEC, [[]] * 4)
        return HeadMap(base.model, rows, base.rule)
    return None


def prepared(policy: str) -> tuple[WanModel, CachePlan, list[list[int]]]:
    """The model with heads ordered for the policy, its plan, and the order."""
    loaded, headmap = load_policy(policy), headmap_for(policy)
    orders = head_orders(SPEC, loaded, headmap)
    model = random_model(SPEC)
    model.load_state_dict(permute_heads(model.state_dict(), SPEC, orders))
    return model, build_plan(SPEC, SPEC.geometry(), loaded, headmap), orders


class Spy:
    """Keeps queries, and keys by role, of every pass, layer and group: what really was attended to."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.seen: dict[tuple[int, int, int], list[tuple[Tensor, dict[str, Tensor]]]] = {}

    def watch(self, chunk: int, step: int, cache: Cache, attend: Attend) -> Attend:
        def spied(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
            groups = zip(self.plan.layers[layer], cache[layer], strict=True)
            self.seen[chunk, step, layer] = [
                (
                    queries[0, group.start : group.stop],
                    {
                        **{role: kv.keys[0] for role, kv in held.items()},
                        "current": current.keys[0, group.start : group.stop],
                    },
                )
                for group, held in groups
            ]
            return attend(layer, queries, current)

        return spied


@pytest.mark.parametrize("policy", ["full", "window", "forcing-kv", "dummy-forcing"])
def test_what_is_recorded_is_what_attention_did(policy: str) -> None:
    model, plan, orders = prepared(policy)
    rows = record_sample(model, plan, TEXT, 3, 5, CHUNKS, orders=orders, passes="all")
    spy = Spy(plan)
    made = list(generate(model, plan, TEXT, seeded_noise(plan, 3), CHUNKS, spy.watch))
    assert rows.schema == COLUMNS
    assert set(rows["sample"]) == {5}
    assert rows.select(KEY).is_unique().all()
    passes = CHUNKS * (len(SPEC.schedule.later) + 1)
    assert len(spy.seen) == passes * SPEC.layers, "the clean pass too"
    assert set(rows["step"]) == {*range(len(SPEC.schedule.later)), CLEAN_PASS}
    assert len(rows) == passes * SPEC.layers * SPEC.heads * SPEC.frames_per_chunk

    indexed = {tuple(row[name] for name in KEY): row for row in rows.iter_rows(named=True)}
    for (chunk, step, layer), groups in spy.seen.items():
        frames = key_frames(plan, chunk, made[chunk - 1].indices if chunk else None)
        head = 0
        for queries, by_role in groups:
            for local in range(len(queries)):
                expected = written_out(queries[local], {r: k[local] for r, k in by_role.items()}, frames)
                for frame, (mass, entropy) in enumerate(expected):
                    row = indexed[chunk, step, layer, orders[layer][head], frame]
                    got = {
                        (role, f): m
                        for role, f, m in zip(row["role"], row["key_frame"], row["mass"], strict=True)
                    }
                    assert got.keys() == mass.keys()
                    np.testing.assert_allclose([got[k] for k in mass], list(mass.values()), atol=2e-6)
                    assert abs(row["entropy"] - entropy) < 1e-4
                    assert abs(row["sink"] - sum(m for (_, f), m in mass.items() if f == 0)) < 2e-6
                    assert row["keys"] == sum(keys.shape[1] for keys in by_role.values())
                head += 1


def key_frames(plan: CachePlan, chunk: int, indices: Tensor | None) -> dict[str, list[int]]:
    """For each role the latent frame of every token, as docs/method.md says it."""
    size, first = plan.frame_tokens, 3 * chunk
    opening = [token // size for token in range(3 * size)]
    segments = [] if indices is None else indices.tolist()
    return {
        "sink": opening,
        # Under dummy-forcing, in chunk 1 alone: frame 0; of the sink heads frames 1 and 2, of dummies 1.
        "opening": opening,
        "early": opening[size:],
        # candidates of the clean pass of the chunk before: its transition frame, its frames 0 and 1
        "retained": [
            frame
            for index in segments
            for frame in [[first - 4, first - 3, first - 2][index // 6]] * (size // 6)
        ],
        "recent": [first - 1 - token // size for token in range(first * size)][::-1],
        "current": [first + token // size for token in range(3 * size)],
    }


def written_out(
    queries: Tensor, keys: dict[str, Tensor], frames: dict[str, list[int]]
) -> list[tuple[dict[tuple[str, int], float], float]]:
    """For each query frame: mass by role and frame, and entropy. One head, float64."""
    owners: list[tuple[str, int]] = []
    for role, held in keys.items():
        count = len(held)
        owned = frames[role]
        owners += [(role, f) for f in (owned[len(owned) - count :] if role == "recent" else owned[:count])]
    stacked = torch.cat(list(keys.values())).double()
    attention = (queries.double() @ stacked.T / SPEC.head_dim**0.5).softmax(-1)
    found = []
    for part in attention.unflatten(0, (3, -1)):
        mean = part.mean(0)
        mass: dict[tuple[str, int], float] = {}
        for owner, value in zip(owners, mean.tolist(), strict=True):
            mass[owner] = mass.get(owner, 0.0) + value
        found.append((mass, float(-(part * part.log()).sum(-1).mean())))
    return found


def test_recording_does_not_change_the_video() -> None:
    model, plan, _ = prepared("forcing-kv")
    recorder = Recorder(plan, 0)
    plain = list(generate(model, plan, TEXT, seeded_noise(plan, 1), 3))
    watched = list(generate(model, plan, TEXT, seeded_noise(plan, 1), 3, recorder.watch))
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a.latents, b.latents)


def test_sampled_rows_are_the_same_every_time_and_near_the_exact_ones() -> None:
    model, plan, _ = prepared("full")
    exact = record_sample(model, plan, TEXT, 1, 0, 3)
    sampled = record_sample(model, plan, TEXT, 1, 0, 3, rows=12)
    assert sampled.equals(record_sample(model, plan, TEXT, 1, 0, 3, rows=12))
    assert not sampled.equals(record_sample(model, plan, TEXT, 2, 0, 3, rows=12))
    assert (exact["mass_error"].explode() == 0).all()
    error = sampled["mass_error"].explode().to_numpy()
    off = np.abs(sampled["mass"].explode().to_numpy() - exact["mass"].explode().to_numpy())
    assert (error > 0).mean() > 0.99
    # 4 of 18 rows a frame: Student's t with 3 degrees of freedom is wide, but not this wide.
    assert (off <= 6 * error + 1e-6).mean() > 0.95
    assert (off <= 1e-7).mean() < 0.05, "rows were really sampled"


def test_all_rows_asked_for_by_number_is_exact() -> None:
    model, plan, _ = prepared("full")
    assert record_sample(model, plan, TEXT, 1, 0, 3, rows=plan.chunk_tokens).equals(
        record_sample(model, plan, TEXT, 1, 0, 3)
    )


def test_bfloat16_generation_is_recorded_too() -> None:
    model, plan, _ = prepared("forcing-kv")
    rounded = record_sample(model.bfloat16(), plan, TEXT.bfloat16(), 1, 0, 4)
    exact = record_sample(model.float(), plan, TEXT, 1, 0, 4)
    first = pl.col("chunk") == 0
    off = (
        rounded.filter(first)["mass"].explode().to_numpy() - exact.filter(first)["mass"].explode().to_numpy()
    )
    assert np.abs(off).max() < 0.1
    assert np.abs(off).max() > 0


@pytest.mark.gpu
def test_a_gpu_records_what_a_cpu_does(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, plan, orders = prepared("forcing-kv")
    on_cpu = record_sample(model, plan, TEXT, 3, 0, CHUNKS, orders=orders)
    on_gpu = record_sample(model.cuda(), plan, TEXT.cuda(), 3, 0, CHUNKS, orders=orders)
    np.testing.assert_allclose(
        on_gpu["mass"].explode().to_numpy(), on_cpu["mass"].explode().to_numpy(), atol=1e-3
    )


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 on the meta device, as a GPU of Apple does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, f"{func} made float64"
        return made


def test_statistics_come_to_the_host_from_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for one; what is copied from there has no contents, so it is zeros here."""
    copied: list[torch.Size] = []

    def on_the_host(statistics: Tensor) -> Tensor:
        copied.append(statistics.shape)
        return torch.zeros(statistics.shape, dtype=statistics.dtype) if statistics.is_meta else statistics

    monkeypatch.setattr("forcingkv.analyze.recorder._on_the_host", on_the_host)
    monkeypatch.setattr("forcingkv.analyze.recorder.EXACT", ("cpu", "cuda"))
    _, plan, _ = prepared("full")
    with torch.device("meta"):
        model = WanModel(SPEC).eval()
    recorder = Recorder(plan, 0, rows=12)
    with WithoutFloat64():
        list(generate(model, plan, TEXT.to("meta"), seeded_noise(plan, 0), 2, recorder.watch))
    assert copied
    frame = recorder.frame()
    assert len(frame) == 2 * len(SPEC.schedule.later) * SPEC.layers * SPEC.heads * SPEC.frames_per_chunk
    assert frame["entropy"].to_list() == [0.0] * len(frame)


def test_statistics_of_a_device_without_float64_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, orders = prepared("full")
    rows = record_sample(model, plan, TEXT, 3, 0, 2, orders=orders)
    monkeypatch.setattr("forcingkv.analyze.recorder.EXACT", ())
    assert rows.equals(record_sample(model, plan, TEXT, 3, 0, 2, orders=orders))


@pytest.mark.parametrize("policy", ["full", "window"])
def test_everything_is_on_the_models_device(policy: str) -> None:
    """On the meta device, which like a GPU refuses to meet a tensor of the CPU."""
    _, plan, _ = prepared(policy)
    with torch.device("meta"):
        model = WanModel(SPEC).eval()
    recorder = Recorder(plan, 0, rows=12)
    made = list(generate(model, plan, TEXT.to("meta"), seeded_noise(plan, 0), 2, recorder.watch))
    assert {chunk.latents.device.type for chunk in made} == {"meta"}
