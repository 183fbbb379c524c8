"""Models that make their context anew before each chunk: sessions against the loop in torch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.context import FirstFrame
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.encoders import StreamingEncoder
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.spec import Decoder, ModelSpec
from forcingkv.runtime.text import encode_words
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.lanes import BACKENDS, ONNX, TORCH, Ahead, On
from tests.runtime.videos import OTHER, PROMPT, assert_same

CHUNKS = 4
RECOMPUTED: dict[str, object] = {
    "layers": 2,
    "attended_frames": 6,
    "positions": "relative",
    "recache": "none",
    "context": "recompute",
    "context_frames": 3,
    "schedule": Schedule((1000.0, 666.0, 0.0), warp=True, shift=5.0, noise_levels="table"),
}
VAE: dict[str, object] = {"width": 16, "height": 32, "decoder": Decoder("wan-vae", 8, 4)}
KINDS: dict[str, dict[str, object]] = {
    "kept": {},
    "two frames": {"attended_frames": 5, "context_frames": 2},
    "pixels again": {"context_first": "encoded"},
    "encoded": {"context_first": "encoded", **VAE},
}


def spec_of(kind: str) -> ModelSpec:
    return small_spec(**(RECOMPUTED | KINDS[kind]))


@cache
def vae_of(kind: str) -> tuple[StreamingDecoder | None, StreamingEncoder | None]:
    if spec_of(kind).decoder.kind == "pixels":
        return None, None
    pytest.importorskip("diffusers")
    from forcingkv.models.decoders.wan_vae import WanVaeDecoder
    from forcingkv.models.encoders.wan_vae import WanVaeEncoder
    from tests.models.test_decoders import small_vae

    return WanVaeDecoder(small_vae()), WanVaeEncoder(small_vae())


def recomputing(kind: str, target: str = "onnx") -> Path:
    spec, (decoder, encoder) = spec_of(kind), vae_of(kind)
    weights, policy = random_model(spec).state_dict(), load_policy("full")
    more: dict[str, Any] = {"target": target} if target != "onnx" else {"verify": kind in ("kept", "encoded")}
    return shared_bundle(spec, weights, policy, decoder=decoder, encoder=encoder, **more)


def plan_of(spec: ModelSpec) -> CachePlan:
    return build_plan(spec, spec.geometry(), load_policy("full"))


def in_torch(kind: str, **options: Any) -> list[torch.Tensor]:
    spec = spec_of(kind)
    text, plan = torch.from_numpy(encode_words(spec, PROMPT)), plan_of(spec)
    again = FirstFrame(plan, *vae_of(kind)) if spec.context_first == "encoded" else None
    made = generate(
        random_model(spec), plan, text, seeded_noise(plan, 7), CHUNKS, first_frame=again, **options
    )
    return [chunk.latents for chunk in made]


def relative(found: Any, wanted: torch.Tensor) -> float:
    return float((torch.from_numpy(found.latents) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_that_of_the_loop_in_torch(on: On, kind: str) -> None:
    with on.open(recomputing(kind)) as session:
        chunks = list(session.generate(PROMPT, seed=7, chunks=CHUNKS))
    differences = [relative(*pair) for pair in zip(chunks, in_torch(kind), strict=True)]
    print(differences)
    assert max(differences) < 1e-5
