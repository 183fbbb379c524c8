"""Bundles that decode a frame strip by strip: the frames, states and memory of sessions on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forcingkv.models.decoders import wan_vae
from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import random_model
from tests.export.test_decode import spec_with
from tests.exported import shared_bundle
from tests.models.test_decoders import small_vae

CHUNKS = 3
SIZE = "46x62"
"""Computed at 48x64."""
COUNTS = [1, 2, 4, 7]


def bundle_of(count: int, **options: str) -> Path:
    spec = spec_with("wan-vae")
    weights, decoder = random_model(spec).state_dict(), WanVaeDecoder(small_vae())
    policy = load_policy("window")
    return shared_bundle(spec, weights, policy, decoder=decoder, strips=count, resolution=SIZE, **options)


def video(folder: Path, **options: str) -> tuple[np.ndarray, np.ndarray]:
    with Session.open(folder, **options) as session:
        chunks = list(session.generate("a b c", seed=3, chunks=CHUNKS))
    assert [chunk.frames.shape for chunk in chunks] == [(n, 62, 46, 3) for n in (9, 12, 12)]
    return tuple(
        np.concatenate([getattr(c, n) for c in chunks], a) for n, a in (("frames", 0), ("latents", 2))
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend torch makes a decoder of the real width, whatever the weights are of."""
    monkeypatch.setattr(wan_vae, "AutoencoderKLWan", small_vae)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("count", COUNTS[1:])
def test_frames_are_those_of_whole_frames(count: int, backend: str) -> None:
    whole, latents = video(bundle_of(1), backend=backend)
    strips, same = video(bundle_of(count), backend=backend)
    np.testing.assert_array_equal(latents, same)
    difference = np.abs(whole.astype(int) - strips)
    assert difference.max() <= 1, "rounded the other way at most"
    assert (difference > 0).mean() < 1e-4
