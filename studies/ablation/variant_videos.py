"""Videos of a variant: every sample through the same torch code. Finished ones are kept in a folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import forcingkv
from forcingkv.headmaps import HeadMap
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.writing import write_bytes
from forcingkv.measure.fidelity.evaluation import SeededPrompt
from forcingkv.models.checkpoint import Weights, build_model
from forcingkv.models.decoders import to_frames
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from studies.ablation.variants import Variant

Videos = npt.NDArray[np.uint8]
"""(samples, frames, height, width, 3)."""


@dataclass(frozen=True)
class VariantVideos:
    """Makes the videos of one model, without a decoder, for the same samples under each variant."""

    spec: ModelSpec
    weights: Weights
    samples: Sequence[SeededPrompt]
    chunks: int
    folder: Path
    """Where finished videos are kept: one file a variant, by what it was made from."""

    def plan(self, variant: Variant, headmap: HeadMap) -> CachePlan:
        """The variant's cache plan."""
        return build_plan(self.spec, self.spec.geometry(), variant.policy, headmap)

    def videos(
        self, variant: Variant, headmap: HeadMap, progress: Callable[[int], None] = lambda done: None
    ) -> Videos:
        """The videos of all samples, in order: from the folder, if they are there, else made and kept."""
        file = self.folder / f"{self.digest(variant, headmap)}.npy"
        if file.is_file():
            return _coloured(np.load(file, allow_pickle=False))
        grey = self._made(variant, headmap, progress)
        content = io.BytesIO()
        np.save(content, grey, allow_pickle=False)
        write_bytes(file, content.getvalue())
        return _coloured(grey)

    def digest(self, variant: Variant, headmap: HeadMap) -> str:
        """SHA-256 of all that the videos depend on, versions of the code among it.

        Variants that differ in nothing but their names have the same.
        """
        policy = to_data(variant.policy) | {"name": "", "summary": ""}
        labels = [list(row) for row in headmap.labels] if variant.policy.needs_headmap else []
        if variant.policy.unsplit and labels:
            for layer in variant.policy.unsplit.layers:
                labels[layer] = []
        samples = [[sample.prompt, sample.seed] for sample in self.samples]
        versions = {module.__name__: module.__version__ for module in (forcingkv, np, torch)}
        made_from = [versions, to_data(self.spec), self.weights.digest, policy, labels, samples, self.chunks]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def _made(
        self, variant: Variant, headmap: HeadMap, progress: Callable[[int], None]
    ) -> npt.NDArray[np.uint8]:
        plan = self.plan(variant, headmap)
        orders = head_orders(self.spec, variant.policy, headmap)
        model = build_model(self.spec, permute_heads(self.weights, self.spec, orders))
        videos = []
        # One at a time: the retained segments are those of the first of a batch.
        for done, sample in enumerate(self.samples, 1):
            text = torch.from_numpy(encode_words(self.spec, sample.prompt))
            made = generate(model, plan, text, seeded_noise(plan, sample.seed), self.chunks)
            frames = torch.cat([to_frames(chunk.latents) for chunk in made])
            videos.append(frames[..., 0].numpy())
            progress(done)
        return np.stack(videos)


def _coloured(grey: npt.NDArray[np.uint8]) -> Videos:
    """Grey is kept in one channel: a third of the bytes."""
    return grey[..., None].repeat(3, -1)
