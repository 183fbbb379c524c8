"""Bytes that the planner says, against what sessions ask for, what torch holds and engines reported."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import HeadMap, read_headmap
from forcingkv.headmaps.headmap import ModelIdentity, Rule
from forcingkv.measure.nominal import plan_for
from forcingkv.measure.planner.decoding import decoder_costs
from forcingkv.measure.planner.gpus import gpu_names, load_gpu
from forcingkv.measure.planner.session_memory import (
    RESERVE_BYTES,
    engine_activations,
    parameters,
    session_memory,
)
from forcingkv.models.decoders import load_decoder
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime.kv.buffers import CacheBuffers
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy, policy_names
from forcingkv.runtime.shipped import shipped_names
from forcingkv.runtime.spec import ModelSpec
from tests.conftest import small_spec
from tests.measure.counting_lane import CountingLane

ROOT = Path(__file__).parents[2]


def mixed(spec: ModelSpec, policy: Policy) -> HeadMap | None:
    """A map in which each layer has another number of heads of each label."""
    if not policy.needs_headmap:
        return None
    labels = list(policy.groups)
    rows = tuple(
        tuple(labels[(head * head + layer) // 2 % len(labels)] for head in range(spec.heads))
        for layer in range(spec.layers)
    )
    return HeadMap(ModelIdentity(spec.name, spec.layers, spec.heads), rows, Rule("given"))


def kv(parts: dict[str, int]) -> int:
    return sum(size for name, size in parts.items() if name.startswith("kv_"))


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("model", ["self-forcing", "longlive", "krea-14b"])
@pytest.mark.parametrize("resolution", ["480p", "720p", "1080p", "576x336"])
def test_keys_and_values_are_what_a_session_asks_for_to_the_byte(
    policy: str, model: str, resolution: str
) -> None:
    spec, chosen = load_spec(model), load_policy(policy)
    plan = build_plan(spec, spec.geometry(resolution), chosen, mixed(spec, chosen))
    lane = CountingLane()
    held = CacheBuffers(plan, lane, "bfloat16").nbytes  # type: ignore[arg-type]
    assert kv(session_memory(plan).parts) == held == lane.state_bytes > 0


@pytest.mark.parametrize("model", shipped_names("forcingkv.models.presets"))
def test_every_parameter_is_counted(model: str) -> None:
    spec = load_spec(model)
    with torch.device("meta"):
        torch_model = WanModel(spec)
    assert parameters(spec) == sum(p.numel() for p in torch_model.parameters())


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("kind", ["wan-vae", "taehv", "lighttae"])
def test_decoders_hold_what_the_file_says(kind: str, channels: int) -> None:
    with torch.device("meta"):
        decoder = load_decoder(kind, channels=channels)
    costs = decoder_costs(kind, channels)
    shapes = decoder.state_shapes(6, 10).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 60 * costs.cached
    assert sum(tensor.numel() for tensor in decoder.state_dict().values()) == costs.parameters


def built_engines() -> list[tuple[str, str, float, float]]:
    """(resolution, policy, activations of step, of decode, in GB) of the engines in docs/engines.md."""
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \d+x\d+ \|", line)]
    return [(row[0].strip(), row[1].strip(), float(row[7]), float(row[8])) for row in rows]


def test_activations_are_near_those_of_engines_that_were_built(data: Path) -> None:
    """The document's figures have two or three digits."""
    spec = load_spec("self-forcing")
    released = read_headmap(data / "headmaps" / "forcingkv_heads_selfforcing.json")
    rows = built_engines()
    assert len(rows) == 6
    for resolution, policy, step, decode in rows:
        plan, _ = plan_for(spec, spec.geometry(resolution), load_policy(policy), (released, "released"))
        assert engine_activations(plan, "bfloat16") / 1e9 == pytest.approx(step, rel=0.03), (
            resolution,
            policy,
        )
        parts = session_memory(plan, decode_strips=1).parts
        assert parts["decode_activations"] / 1e9 == pytest.approx(decode, rel=0.005)


def test_a_gpu_fits_if_the_reserve_stays_free() -> None:
    spec = small_spec()
    memory = session_memory(build_plan(spec, spec.geometry(), load_policy("full")))
    assert memory.missing(memory.total + RESERVE_BYTES) == 0
    assert memory.missing(memory.total + RESERVE_BYTES - 7) == 7


def test_what_is_not_known_is_said() -> None:
    spec = load_spec("self-forcing")
    tiny = replace(spec, decoder=replace(spec.decoder, kind="taehv"))
    plans = [build_plan(one, one.geometry(), load_policy("full")) for one in (spec, tiny)]
    known, unknown = map(session_memory, plans)
    assert not any("taehv" in text for text in known.unknown)
    assert any("activations of the decoder taehv" in text for text in unknown.unknown)
    assert unknown.parts["decoder_caches"] * 28 < known.parts["decoder_caches"]


def test_gpus_are_those_that_were_asked_for() -> None:
    names = ["a100", "h100", "h200", "b200", "rtx-4090", "rtx-5090", "rtx-pro-6000"]
    assert gpu_names() == names
    by_memory = sorted(names, key=lambda name: load_gpu(name).memory_bytes)
    assert by_memory == ["rtx-4090", "rtx-5090", "h100", "a100", "rtx-pro-6000", "h200", "b200"]


def plan_at(side: int, attended: int, policy: str) -> CachePlan:
    spec = small_spec(attended_frames=attended, width=4 * side, height=4 * side)
    chosen = load_policy(policy)
    return build_plan(spec, spec.geometry(f"{4 * side}x{4 * side}"), chosen, mixed(spec, chosen))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(4, 12), st.integers(0, 4))
def test_memory_grows_with_the_resolution_and_the_history(
    half: int, more: int, chunks: int, longer: int
) -> None:
    small = session_memory(plan_at(6 * half, 3 * chunks, "full"))
    wide = session_memory(plan_at(6 * (half + more), 3 * chunks, "full"))
    long = session_memory(plan_at(6 * half, 3 * (chunks + longer), "full"))
    assert small.total < wide.total
    assert small.total <= long.total
    assert (small.total < long.total) == (longer > 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(4, 12))
def test_a_window_takes_more_than_static_and_dynamic_heads_and_less_than_all(half: int, chunks: int) -> None:
    window, full, forcing = (
        kv(session_memory(plan_at(6 * half, 3 * chunks, name)).parts)
        for name in ("window", "full", "forcing-kv")
    )
    assert forcing < window < full
