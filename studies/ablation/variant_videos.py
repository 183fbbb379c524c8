"""Videos of a variant: every sample through the same torch code. Finished ones are kept in a folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import forcingkv
from forcingkv.headmaps import HeadMap
from forcingkv.headmaps.fields import to_data
from forcingkv.headmaps.writing import write_bytes
from forcingkv.models.checkpoint import Weights, build_model
from forcingkv.models.decoders import to_frames
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.statistics import QueryStatistics
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.text import encode_words
from studies.ablation.variants import Variant

Video = npt.NDArray[np.uint8]
"""(frames, height, width, 3)."""
Grey = npt.NDArray[np.uint8]
"""(frames, height, width)."""


@dataclass(frozen=True)
class Sample:
    """What a video is made from, whatever the policy."""

    prompt: str
    seed: int
    """Of its noise."""
    chunks: int
    """How many it has, those of `start` among them."""
    start: Grey | None = None
    """Whole chunks that it begins with."""


@dataclass(frozen=True)
class VariantVideos:
    """Makes the videos of one model, without a decoder, for the same samples under each variant."""

    spec: ModelSpec
    weights: Weights
    samples: Sequence[Sample]
    folder: Path
    """Where finished videos are kept: one file a variant, by what it was made from."""

    def plan(
        self, variant: Variant, headmap: HeadMap, statistics: QueryStatistics | None = None
    ) -> CachePlan:
        """The variant's cache plan."""
        return build_plan(self.spec, self.spec.geometry(), variant.policy, headmap, statistics)

    def videos(
        self, variant: Variant, headmap: HeadMap, statistics: QueryStatistics | None = None
    ) -> list[Video]:
        """The videos of all samples, in order: from the folder, if they are there, else made and kept."""
        file = self.folder / f"{self.digest(variant, headmap, statistics)}.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as kept:
                return [_coloured(kept[str(number)]) for number in range(len(self.samples))]
        made = self._made(variant, headmap, statistics)
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **{str(number): grey for number, grey in enumerate(made)})
        write_bytes(file, content.getvalue())
        return [_coloured(grey) for grey in made]

    def digest(self, variant: Variant, headmap: HeadMap, statistics: QueryStatistics | None = None) -> str:
        """SHA-256 of all that the videos depend on, versions of the code among it.

        Variants that differ in nothing but their names have the same.
        """
        policy = to_data(variant.policy) | {"name": "", "summary": ""}
        labels = [list(row) for row in headmap.labels] if variant.policy.needs_headmap else []
        if variant.policy.unsplit and labels:
            for layer in variant.policy.unsplit.layers:
                labels[layer] = []
        samples = [[s.prompt, s.seed, s.chunks, _digest_of(s.start)] for s in self.samples]
        versions = {module.__name__: module.__version__ for module in (forcingkv, np, torch)}
        made_from = [versions, to_data(self.spec), self.weights.digest, policy, labels, samples]
        made_from += [statistics.digest] if statistics else []
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def _made(self, variant: Variant, headmap: HeadMap, statistics: QueryStatistics | None) -> list[Grey]:
        plan = self.plan(variant, headmap, statistics)
        orders = head_orders(self.spec, variant.policy, headmap)
        model = build_model(self.spec, permute_heads(self.weights, self.spec, orders))
        videos = []
        # One at a time: the retained segments are those of the first of a batch.
        for sample in self.samples:
            text = torch.from_numpy(encode_words(self.spec, sample.prompt))
            noise, start = seeded_noise(plan, sample.seed), _latents_of(sample.start)
            made = generate(model, plan, text, noise, sample.chunks, start=start)
            frames = torch.cat([to_frames(chunk.latents) for chunk in made])
            videos.append(frames[..., 0].numpy())
        return videos


def _digest_of(start: Grey | None) -> str | None:
    return None if start is None else hashlib.sha256(start.tobytes()).hexdigest()


def _latents_of(start: Grey | None) -> torch.Tensor | None:
    """(1, 1, frames, height, width) in [-1, 1]: frames of a model whose latents are pixels."""
    return None if start is None else torch.from_numpy(start.astype(np.float32) / 127.5 - 1)[None, None]


def _coloured(grey: Grey) -> Video:
    """Grey is kept in one channel: a third of the bytes."""
    return grey[..., None].repeat(3, -1)
