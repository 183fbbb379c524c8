"""Latents that the public VAE made (not in the repository): read, and streamed as other latents are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forcingkv.models.decoders import decoder_for
from forcingkv.models.presets import load_spec
from forcingkv.runtime.tensors import read_arrays, read_header


@pytest.fixture(scope="module")
def real(data: Path) -> Path:
    return data / "latents" / "taehv_test_latents_wan.safetensors"


def test_their_numbers_are_those_of_a_video(real: Path) -> None:
    stored, _ = read_header(real)
    assert {name: (one.dtype, one.shape) for name, one in stored.items()} == {
        "latents": ("BF16", (1, 16, 16, 40, 64))
    }
    latents = read_arrays(real)["latents"]
    assert latents.dtype == np.float32
    spec = load_spec("self-forcing")
    assert latents.shape[1] == spec.latent_channels
    assert spec.geometry("512x320").latent_height == latents.shape[3]
    # As a diffusion model has them: about 1 large, and little changes from frame to frame.
    assert latents.std() == pytest.approx(0.94, abs=0.01)
    assert np.abs(np.diff(latents, axis=2)).mean() == pytest.approx(0.12, abs=0.01)


def test_a_stream_of_them_is_the_video_at_once(real: Path) -> None:
    """A corner of them, through a TAEHV of public size with random weights."""
    torch.manual_seed(0)
    spec, decoder = decoder_for(load_spec("self-forcing"), "taehv", None, random=True)
    assert decoder is not None
    latents = torch.from_numpy(read_arrays(real)["latents"])[:, :, :4, :4, :6]
    videos = []
    for split in ([4], [1, 3], [1, 1, 1, 1]):
        state = {name: torch.zeros(shape) for name, shape in decoder.state_shapes(4, 6).items()}
        parts = []
        for call, part in enumerate(latents.split(split, 2)):
            with torch.no_grad():
                pixels, state = decoder(part, torch.tensor([float(call == 0)]), state)
            parts.append(pixels)
        videos.append(torch.cat(parts, 2))
    assert videos[0].shape == (1, 3, 16, 4 * spec.decoder.spatial_stride, 6 * spec.decoder.spatial_stride)
    assert videos[0].std() > 1e-3
    for other in videos[1:]:
        torch.testing.assert_close(other, videos[0], rtol=0, atol=1e-4)
