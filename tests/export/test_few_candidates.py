"""First chunks that have fewer segments than are kept: a frame a chunk, or a ratio near 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.export import export_bundle
from forcingkv.models.checkpoint import build_model
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Schedule
from forcingkv.runtime.text import encode_words
from tests.conftest import choosing, headmap_of, random_model, small_spec


@pytest.mark.long
@pytest.mark.parametrize(
    ("frames", "ratio", "width"), [(1, 1 / 3, 10), pytest.param(2, 0.75, 12, marks=pytest.mark.long)]
)
def test_bundles_give_the_video_of_torch(frames: int, ratio: float, width: int, tmp_path: Path) -> None:
    sizes = {"layers": 2, "width": width, "frames_per_chunk": frames, "attended_frames": 5 * frames}
    spec = small_spec(schedule=Schedule((1000.0,)), **sizes)
    policy, headmap = choosing(load_policy("forcing-kv"), ratio=ratio), headmap_of(spec, [[0], [1]])
    weights, chunks = random_model(spec).state_dict(), 5 if frames == 1 else 4
    made = export_bundle(spec, weights, policy, tmp_path / "b", headmap=headmap)
    assert max(made.verification.values()) <= 1e-5
    model = build_model(spec, permute_heads(weights, spec, head_orders(spec, policy, headmap)))
    text = torch.from_numpy(encode_words(spec, "b a d"))
    with Session.open(tmp_path / "b") as session:
        assert session.plan.choice
        assert session.plan.choice.kept > session.plan.choice.candidates - 6
        found = [chunk.latents for chunk in session.generate("b a d", seed=3, chunks=chunks)]
        wanted = generate(model, session.plan, text, seeded_noise(session.plan, 3), chunks)
        for latents, chunk in zip(found, wanted, strict=True):
            np.testing.assert_allclose(latents, chunk.latents.numpy(), atol=1e-4)
