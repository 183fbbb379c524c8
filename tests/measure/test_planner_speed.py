"""Seconds that the planner predicts, against the formula written out; traffic against what torch moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forcingkv.commands.plan import parse_counts
from forcingkv.headmaps.errors import InputError
from forcingkv.measure.nominal import Heads, plan_for, spread
from forcingkv.measure.planner.gpus import gpu_names, load_gpu
from forcingkv.measure.planner.published import efficiencies
from forcingkv.measure.planner.speed import (
    Work,
    elementwise_bytes,
    pass_seconds,
    pass_work,
    predict,
    turn_bytes,
    video_work,
)
from forcingkv.models.kv_roles import Turn, turned
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.spec import ModelSpec

COUNTS = {"static": 134, "dynamic": 226}
PRODUCTS = {"addmm", "mm"}
VIEWS = {
    "_unsafe_view",
    "alias",
    "detach",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


def _heads(spec: ModelSpec) -> Heads:
    return spread(spec, COUNTS)


def plan_of(policy: str, resolution: str = "480p", model: str = "self-forcing") -> CachePlan:
    spec = load_spec(model)
    return plan_for(spec, spec.geometry(resolution), load_policy(policy), _heads(spec))[0]


def test_bytes_count_where_there_are_more_of_them() -> None:
    gpu = load_gpu("a100")
    works = {"computed": Work(312 * 10**12, 0), "moved": Work(1, 2039 * 10**9)}
    assert pass_seconds(works, gpu, 0.5) == pytest.approx({"computed": 2.0, "moved": 1.0})


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, products with weights left out. Nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name not in VIEWS | PRODUCTS:
            self.moved[name] += sum(map(_bytes, tree_leaves((args, kwargs, made))))
        return made


def _bytes(thing: object) -> int:
    """Of memory behind a tensor: what is repeated is read once."""
    if not isinstance(thing, Tensor):
        return 0
    sides = [size for size, step in zip(thing.shape, thing.stride(), strict=True) if step]
    return torch.Size(sides).numel() * thing.element_size()


def moved(spec: ModelSpec) -> int:
    """Bytes of a pass in bfloat16, its attentions left out."""
    geometry = spec.geometry()
    latents = (1, spec.latent_channels, spec.frames_per_chunk, geometry.latent_height, geometry.latent_width)
    tokens = spec.frames_per_chunk * geometry.frame_tokens
    with torch.device("meta"):
        model = WanModel(spec).to(torch.bfloat16)
        like = torch.empty(0, dtype=torch.bfloat16)
    prompt = [KeysValues(*(like.new_empty(1, spec.heads, 8, spec.head_dim),) * 2)] * spec.layers
    rotary = (like.new_empty((tokens, spec.head_dim // 2), dtype=torch.float32),) * 2
    time = like.new_empty(1, 1, spec.time_width)
    with Traffic() as traffic, torch.no_grad():
        model(like.new_empty(latents), time, rotary, prompt, lambda layer, queries, current: queries)
    return traffic.moved.total()


def test_a_block_moves_what_torch_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference that one more block makes; what it reads beside tensors of tokens is below 1%."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda queries, keys, values: queries)
    spec = load_spec("self-forcing")
    one, two = (moved(replace(spec, layers=layers)) for layers in (1, 2))
    assert elementwise_bytes(plan_of("full")) == pytest.approx(two - one, rel=0.01)


def test_a_video_is_its_chunks_one_after_another() -> None:
    """30 s: every chunk by itself, four denoising passes and a clean one, 12 frames each."""
    plan, gpu, chunks = plan_of("forcing-kv", model="longlive"), load_gpu("h100"), 40
    seconds = sum(5 * sum(pass_seconds(pass_work(plan, chunk), gpu, 0.3).values()) for chunk in range(chunks))
    found = predict(video_work(plan, chunks), gpu, 0.3)
    assert found["fps"] == pytest.approx(12 * chunks / seconds)
    assert found["mean_chunk_seconds"] == pytest.approx(seconds / chunks)
    last = 5 * sum(pass_seconds(pass_work(plan, 39), gpu, 0.3).values())
    assert found["chunk_seconds"] == pytest.approx(last)
    assert found["mean_chunk_seconds"] < found["chunk_seconds"], "the first chunks see less"
    assert 0 < found["attention_time_share"] < 1
    flops = pass_flops(plan)
    assert found["attention_flop_share"] == pytest.approx(flops.attention / flops.total)


def test_first_chunks_count_with_the_passes_they_take() -> None:
    """Five and three passes, the clean ones included, then two: in shorter videos and a longer one."""
    gpu, plan = load_gpu("h200"), plan_of("forcing-kv")
    schedule = Schedule((1000.0,), by_chunk=((1000.0, 750.0, 500.0, 250.0), (1000.0, 500.0)))
    plan = replace(plan, spec=replace(plan.spec, schedule=schedule))
    passes = [5, 3, *[2] * 38]
    for chunks in (1, 2, 40):
        seconds = sum(
            count * sum(pass_seconds(pass_work(plan, chunk), gpu, 0.3).values())
            for chunk, count in enumerate(passes[:chunks])
        )
        found = predict(video_work(plan, chunks), gpu, 0.3)
        assert found["mean_chunk_seconds"] == pytest.approx(seconds / chunks)
        assert found["fps"] == pytest.approx(12 * chunks / seconds)
        assert found["chunk_seconds"] == pytest.approx(2 * found["pass_seconds"]), "of a later chunk"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["full", "window", "forcing-kv"]),
    st.integers(1, 12),
    st.integers(0, 12),
    st.sampled_from(gpu_names()),
    st.floats(0.05, 0.95),
    st.integers(1, 40),
)
def test_time_grows_with_resolution_and_length_and_falls_with_efficiency(
    policy: str, size: int, more: int, gpu: str, efficiency: float, chunks: int
) -> None:
    spec = load_spec("self-forcing")

    def seconds(side: int, count: int, reached: float) -> float:
        geometry = spec.geometry(f"{96 * side}x{64 * side}")
        plan, _ = plan_for(spec, geometry, load_policy(policy), _heads(spec))
        seconds: float = predict(video_work(plan, count), load_gpu(gpu), reached)["mean_chunk_seconds"]
        return seconds

    base = seconds(size, chunks, efficiency)
    assert (seconds(size + more, chunks, efficiency) > base) == (more > 0)
    assert seconds(size, chunks + more, efficiency) >= base
    assert seconds(size, chunks, efficiency + 0.04) <= base


@pytest.mark.parametrize("model", ["self-forcing", "krea-14b"])
@pytest.mark.parametrize("resolution", ["480p", "720p", "1080p"])
@pytest.mark.parametrize("gpu", gpu_names())
def test_a_window_is_faster_than_all_and_slower_than_static_and_dynamic_heads(
    model: str, resolution: str, gpu: str
) -> None:
    spec = load_spec(model)
    heads = spread(spec, {"static": 100, "dynamic": spec.layers * spec.heads - 100})
    rates = [
        predict(
            video_work(plan_for(spec, spec.geometry(resolution), load_policy(name), heads)[0], 40),
            load_gpu(gpu),
            0.3,
        )["fps"]
        for name in ("full", "window", "forcing-kv")
    ]
    assert rates == sorted(rates)
    assert len(set(rates)) == 3


def test_counts_that_are_given_have_to_be_those_of_the_model() -> None:
    spec = load_spec("self-forcing")
    counts = {"sink": 90, "neighbour": 91, "dummy": 179}
    assert spread(spec, counts)[0].counts() == counts
    with pytest.raises(
        InputError, match=r"359 heads are given; expected 360 in all, 12 in each of 30 layers"
    ):
        spread(spec, {"static": 134, "dynamic": 225})


@pytest.mark.parametrize("text", ["static", "static=x", "=3", "static=1,static=2", "static=-1"])
def test_counts_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--heads"):
        parse_counts(text)


def test_without_labels_that_fit_published_counts_are_taken_and_said() -> None:
    spec, policy = load_spec("self-forcing"), load_policy("forcing-kv")
    plan, words = plan_for(spec, spec.geometry(), policy)
    assert words == "134 static, 226 dynamic as published, spread evenly over the layers"
    assert plan == plan_for(spec, spec.geometry(), policy, _heads(spec))[0]
    _, words = plan_for(spec, spec.geometry(), load_policy("dummy-forcing"), _heads(spec))
    assert words == (
        "90 sink, 90 neighbour, 180 dummy in published shares, spread evenly over the layers"
        " (that as many are sink as neighbour is assumed)"
    )


def test_the_map_that_ships_comes_before_counts_and_what_is_given_before_it() -> None:
    spec, policy = load_spec("demo"), load_policy("forcing-kv")
    _, words = plan_for(spec, spec.geometry(), policy)
    assert words == "7 static, 17 dynamic: the map that ships"
    _, words = plan_for(spec, spec.geometry(), policy, spread(spec, {"static": 12, "dynamic": 12}))
    assert words == "12 static, 12 dynamic, spread evenly over the layers"


def test_where_nothing_is_published_the_costliest_is_assumed_and_said() -> None:
    spec = replace(load_spec("self-forcing"), name="mine")
    plan, words = plan_for(spec, spec.geometry(), load_policy("forcing-kv"))
    assert words == "assumed: every head dynamic, which takes most"
    assert plan.layers[1][0].label == "dynamic"


def test_every_gpu_has_a_class_and_a_source() -> None:
    for name in gpu_names():
        gpu = load_gpu(name)
        assert gpu.source
        assert gpu.family in efficiencies()
    carried = {one["carried_from"] for one in efficiencies().values()} - {None}
    assert carried <= set(efficiencies())


def test_moving_keys_takes_what_torch_moves() -> None:
    keys = torch.empty(1, 3, 512, 128, dtype=torch.bfloat16, device="meta")
    turn = Turn(*(torch.empty(128, device="meta") for _ in range(2)))
    with Traffic() as traffic, torch.no_grad():
        turned(keys, turn)
    assert traffic.moved.total() == pytest.approx(keys.numel() * turn_bytes(2), rel=0.01)


def test_relative_positions_cost_what_moves_the_keys_that_are_not_the_sinks() -> None:
    absolute = plan_of("full", model="longlive")
    relative = replace(absolute, spec=replace(absolute.spec, positions="relative"))
    one, other = (pass_work(plan) for plan in (absolute, relative))
    assert {kind for kind in one if one[kind] != other[kind]} == {"cache"}
    numbers = 30 * 12 * 128 * 6 * 1560  # layers, heads, head_dim, frames, tokens
    assert other["cache"].bytes - one["cache"].bytes == numbers * (2 * 2 + 11 * 4)
