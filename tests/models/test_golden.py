"""The model and the cache rules against outputs of the public implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.models.kv import advance, attend_cache, empty_cache
from forcingkv.models.wan import WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Decoder, ModelSpec, Schedule, TextEncoder
from tests.conftest import headmap_of

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden(data: Path) -> dict[str, Any]:
    with safe_open(data / "golden" / "causal_wan_reference.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {"sizes": json.loads(file.metadata()["spec"]), **tensors}


def spec_of(sizes: dict[str, Any], chunks: int) -> ModelSpec:
    return ModelSpec(
        name="golden",
        layers=sizes["layers"],
        heads=sizes["heads"],
        head_dim=sizes["dim"] // sizes["heads"],
        ffn_width=sizes["ffn"],
        latent_channels=16,
        patch=2,
        text_width=sizes["text_dim"],
        text_length=sizes["text_len"],
        time_width=sizes["freq_dim"],
        frames_per_chunk=3,
        attended_frames=3 * chunks,
        ar_start=sizes["ar_start"],
        fps=16.0,
        width=sizes["latent_w"],
        height=sizes["latent_h"],
        schedule=Schedule(tuple(sizes["timesteps"][:-1]), context_timestep=sizes["timesteps"][-1]),
        decoder=Decoder("wan-vae"),
        text=TextEncoder("umt5"),
    )


@pytest.mark.parametrize("policy", ["full", "forcing-kv"])
def test_every_pass_equals_the_public_implementation(golden: dict[str, Any], policy: str) -> None:
    sizes, inputs = golden["sizes"], golden["x"]
    expected = golden[f"{policy.replace('-', '_')}.flow"]
    chunks, passes = inputs.shape[:2]
    spec = spec_of(sizes, chunks)
    headmap = headmap_of(spec, sizes["static_heads"])
    plan = build_plan(spec, spec.geometry(), load_policy(policy), headmap)
    state = {
        name.removeprefix("model."): tensor for name, tensor in golden.items() if name.startswith("model.")
    }
    model = WanModel(spec)
    model.load_state_dict(permute_heads(state, spec, head_orders(spec, plan.policy, headmap)))

    cache = empty_cache(plan, inputs)
    differences, indices = [], []
    with torch.no_grad():
        prompt = model.prompt(golden["text"][None])
        for chunk in range(chunks):
            rotary = tuple(
                torch.from_numpy(table) for table in positions.rotary(spec, plan.geometry, 3 * chunk, 3)
            )
            for step, timestep in enumerate(sizes["timesteps"]):
                time = torch.from_numpy(positions.time_features(spec, np.array([[timestep]])))
                attend = attend_cache(plan, cache)
                flow, new = model(inputs[chunk, step], time, rotary, prompt, attend)
                differences.append(float((flow - expected[chunk, step]).abs().max()))
            cache, chosen = advance(plan, cache, new, chunk=chunk)
            indices.append([-1] * 6 if chosen is None else chosen.tolist())

    assert max(differences) <= TOLERANCE, [f"{d:.1e}" for d in differences]
    assert len(differences) == chunks * passes
    if policy == "forcing-kv":
        assert indices == golden["forcing_kv.indices"].tolist()
