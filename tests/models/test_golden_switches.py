"""Switches of the prompt against public implementations: whole videos of sessions on the backend torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from forcingkv.export import export_bundle
from forcingkv.models.decoders.taehv import TaehvDecoder
from forcingkv.models.kv import HALVES
from forcingkv.runtime import Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.roles import Retained
from forcingkv.runtime.spec import Decoder, ModelSpec, Recache, Schedule, TextEncoder
from tests.conftest import headmap_of

TOLERANCE = 1e-5
"""Relative, a chunk; the files' README has why."""
HOW: dict[str, Recache] = {
    "no_recache": "none",
    "keep_sink": "keep-sink",
    "empty_sink": "empty-sink",
}


class Golden:
    """A golden file, and a session on its model."""

    def __init__(self, path: Path, folder: Path) -> None:
        with safe_open(path, "np") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.said = json.loads(file.metadata()["spec"])
        policy, static = self.said.get("policy"), None
        spec = self._spec(policy)
        if policy:
            static = headmap_of(spec, policy["static_heads"])
        weights = {
            name.removeprefix("model."): torch.from_numpy(tensor)
            for name, tensor in self.tensors.items()
            if name.startswith("model.")
        }
        export_bundle(
            spec,
            weights,
            load_policy("forcing-kv" if policy else "full"),
            folder,
            headmap=static,
            decoder=TaehvDecoder(widths=(8, 8, 8, 8), latent_channels=spec.latent_channels).eval(),
            target="torch",
        )
        self.session = Session.open(folder, backend="torch")

    def _spec(self, policy: dict[str, Any] | None) -> ModelSpec:
        said = self.said
        return ModelSpec(
            name="golden",
            layers=said["layers"],
            heads=said["heads"],
            head_dim=said["head_dim"],
            ffn_width=said["ffn"],
            latent_channels=said["channels"],
            patch=2,
            text_width=said["text_dim"],
            text_length=said["text_len"],
            time_width=said["freq_dim"],
            frames_per_chunk=said["frames_per_chunk"],
            attended_frames=said["window_frames"],
            sink_frames=(policy or said)["sink_frames"],
            ar_start=policy["ar_start"] if policy else 0,
            fps=16.0,
            width=8 * said["latent_w"],
            height=8 * said["latent_h"],
            schedule=Schedule((1000.0, 750.0, 500.0, 250.0), warp=True, shift=5.0),
            decoder=Decoder("taehv", 8, 4),
            text=TextEncoder("umt5"),
        )

    def check(self, variant: str) -> None:
        """Each chunk of a variant, and the segments that were chosen in it."""
        noise, wanted = self.tensors["noise"], self.tensors[f"{variant}.latents"]
        indices = self.tensors.get(f"{variant}.indices")

        def given(chunk: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
            return noise[chunk, step] if step < noise.shape[1] else np.zeros(shape, np.float32)

        with chosen_segments() as chosen:
            chunks = self.said["chunks"]
            video = self.session.generate(self.tensors["text"][None], seed=0, chunks=chunks, noise=given)
            if variant in HOW:
                video.switch(
                    self.tensors["text2"][None], recache=HOW[variant], at=self.said["switch_at_chunk"]
                )
            for chunk, latents in zip(video, wanted, strict=True):
                difference = np.linalg.norm(chunk.latents - latents) / np.linalg.norm(latents)
                assert difference < TOLERANCE, f"{variant}, chunk {chunk.index}: {difference:.1e}"
                if indices is not None:
                    found = chosen.pop() if chosen else [-1] * indices.shape[1]
                    assert found == indices[chunk.index].tolist(), f"{variant}, chunk {chunk.index}"


@contextmanager
def chosen_segments() -> Iterator[list[list[int]]]:
    """What clean passes choose while it is open: the newest choice, until it is taken out."""
    found: list[list[int]] = []
    half = HALVES[Retained.name]

    class Watched(type(half)):  # type: ignore[misc]
        def advance(self, role: Any, done: Any) -> Any:
            made = super().advance(role, done)
            if done.chosen:
                found[:] = [done.chosen[0].tolist()]
            return made

    HALVES[Retained.name] = Watched()
    try:
        yield found
    finally:
        HALVES[Retained.name] = half


@pytest.fixture(scope="module")
def longlive(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = tmp_path_factory.mktemp("longlive") / "bundle"
    return Golden(data / "golden" / "longlive_switch.safetensors", folder)


@pytest.fixture(scope="module")
def forcing_kv(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = tmp_path_factory.mktemp("forcing-kv") / "bundle"
    return Golden(data / "golden" / "switch_keep_sink.safetensors", folder)


@pytest.mark.parametrize("variant", ["keep_sink", "empty_sink"])
def test_a_switch_of_longlive(longlive: Golden, variant: str) -> None:
    longlive.check(variant)


@pytest.mark.parametrize("variant", ["no_switch", "no_recache", "keep_sink", "empty_sink"])
def test_a_switch_of_forcing_kv(forcing_kv: Golden, variant: str) -> None:
    forcing_kv.check(variant)
