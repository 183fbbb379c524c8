"""Golden files of VAEs: their clips through the product's encoder, a latent frame a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.golden.decoders import TOLERANCES, Array, published, scale_of
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.product import Runner

FIRST_ALONE = "encoded_first_frame"
"""The tensor that is of the clip's first frame alone, a picture."""


def encoded(file: GoldenFile, variant: str, runner: Runner) -> tuple[list[float], float]:
    """The largest difference in each latent frame, and the tolerance.

    Raises GoldenError for what is not understood, and for graphs: they take frames in whole levels of 0 to
    255, which the clips of the files are not (tests/export/test_encode.py compares graphs).
    """
    if runner == "onnxruntime":
        raise GoldenError(
            "the graph takes frames of whole levels, which the clip is not: take --backend torch"
        )
    clip, reference = file.tensor("clip"), file.tensor(variant)
    frames = clip[:, :, :1] if variant == FIRST_ALONE else clip
    found = _by_torch(file, frames)
    if found.shape != reference.shape:
        raise GoldenError(f"its {variant} has the shape {reference.shape}, and the product's {found.shape}")
    difference = np.abs(found.astype(np.float64) - reference)
    return difference.max((0, 1, 3, 4)).tolist(), TOLERANCES["wan-vae"]


def _by_torch(file: GoldenFile, frames: Array) -> Array:
    from forcingkv.models.decoders.wan_files import load_wan_encoder  # imports diffusers, which takes seconds

    with published(file) as (path, kind):
        if kind != "wan-vae":
            raise GoldenError("its encoder is not the VAE's")
        encoder = load_wan_encoder(path, scale_of(file)).eval().requires_grad_(False)
    stride = encoder.temporal_stride
    if (frames.shape[2] - 1) % stride:
        raise GoldenError(f"its clip has {frames.shape[2]} frames, which are no whole latent frames")
    before = np.zeros_like(frames[:, :, :1]).repeat(stride - 1, 2)
    calls = torch.from_numpy(np.concatenate([before, frames], 2)).split(stride, 2)
    side = encoder.spatial_stride
    state: Any = encoder.empty_state(frames.shape[3] // side, frames.shape[4] // side)
    made = []
    with torch.no_grad():
        for number, call in enumerate(calls):
            latents, state = encoder(call, torch.tensor([float(number == 0)]), state)
            made.append(latents.numpy())
    return np.concatenate(made, 2)
