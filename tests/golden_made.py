"""A golden file of the product's own making, for tests of what reads such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from forcingkv.models.generate import generate
from forcingkv.models.wan import WanModel
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import ALL, Policy
from forcingkv.runtime.kv.roles import Recent, Sink
from forcingkv.runtime.spec import Decoder, ModelSpec, Schedule, TextEncoder

CHUNKS, STEPS = 3, [1000.0, 500.0]


def golden_file(path: Path, *, changed: float = 0.0, **said: Any) -> Path:
    """Write a file of one variant, `plain`: chunks of 2 frames, a sink of 1, a window of 4.

    Args:
        path: where.
        changed: added to one number of the last chunk's latents.
        said: other fields of the spec; None: the field is left out.
    """
    spec = ModelSpec(
        name="made",
        layers=2,
        heads=2,
        head_dim=8,
        ffn_width=12,
        latent_channels=4,
        patch=2,
        text_width=6,
        text_length=5,
        time_width=8,
        frames_per_chunk=2,
        attended_frames=4,
        sink_frames=1,
        ar_start=0,
        fps=16.0,
        width=4 * 8,
        height=6 * 8,
        schedule=Schedule((1000.0, 500.0), noise_levels="table", shift=3.0),
        decoder=Decoder("taehv", 8, 4),
        text=TextEncoder("umt5"),
    )
    torch.manual_seed(5)
    model = WanModel(spec).eval().requires_grad_(False)
    plan = build_plan(spec, spec.geometry(), Policy("made", "", {ALL: (Sink(), Recent())}))
    drawn = np.random.default_rng(6).standard_normal((CHUNKS, 2, 1, 4, 2, 6, 4), np.float32)
    text = np.zeros((5, 6), np.float32)
    text[:3] = np.random.default_rng(7).standard_normal((3, 6))

    def noise(chunk: int, step: int) -> torch.Tensor:
        return torch.from_numpy(drawn[chunk, step]) if step < 2 else torch.zeros(1, 4, 2, 6, 4)

    made = generate(model, plan, torch.from_numpy(text)[None], noise, CHUNKS)
    latents = np.stack([chunk.latents.numpy() for chunk in made])
    latents[-1, 0, 0, 0, 0, 0] += changed
    sigmas = list(spec.schedule.of_chunk(0).sigmas[:-1])
    schedule = {"timesteps": STEPS, "sigmas": sigmas, "shift": 3.0, "clean_timestep": 0}
    content = {
        "format": 2,
        "dim": 16,
        "heads": 2,
        "head_dim": 8,
        "ffn": 12,
        "layers": 2,
        "freq_dim": 8,
        "channels": 4,
        "text_len": 5,
        "text_dim": 6,
        "text_tokens": 3,
        "latent_h": 6,
        "latent_w": 4,
        "frame_tokens": 6,
        "rope_split": [4, 2, 2],
        "frames_per_chunk": 2,
        "chunks": CHUNKS,
        "schedule": schedule,
        "variants": {"plain": {"sink_frames": 1, "window_frames": 4}},
    }
    content = {name: value for name, value in (content | said).items() if value is not None}
    tensors = {f"model.{name}": value.numpy() for name, value in model.state_dict().items()}
    tensors |= {"text": text, "noise": drawn, "plain.latents": latents}
    save_file(tensors, path, {"spec": json.dumps(content)})
    return path
