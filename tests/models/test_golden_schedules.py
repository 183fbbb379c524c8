"""Whole videos of the public implementations whose chunks have other steps, or another solver."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from forcingkv.models.generate import generate
from forcingkv.models.wan import WanModel
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.spec import Decoder, ModelSpec, TextEncoder

TOLERANCE = 1e-5
"""Relative, in every chunk: a wrong rule is 1.5e-4 off or more."""


class Golden:
    """A file of golden outputs: its sizes and tensors, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.said: dict[str, Any] = json.loads(self.file.metadata()["spec"])

    def model(self, spec: ModelSpec) -> WanModel:
        names = [name for name in self.file.keys() if name.startswith("model.")]  # noqa: SIM118
        model = WanModel(spec)
        model.load_state_dict({name.removeprefix("model."): self.file.get_tensor(name) for name in names})
        return model.eval()

    def spec(self, schedule: Schedule, **changes: Any) -> ModelSpec:
        said = self.said
        sizes: dict[str, Any] = {
            "name": "golden",
            "layers": said["layers"],
            "heads": said["heads"],
            "head_dim": said["head_dim"],
            "ffn_width": said["ffn"],
            "latent_channels": said["channels"],
            "patch": 2,
            "text_width": said["text_dim"],
            "text_length": said["text_len"],
            "time_width": said["freq_dim"],
            "ar_start": 1,
            "fps": 16.0,
            "width": said["latent_w"],
            "height": said["latent_h"],
            "schedule": schedule,
            "decoder": Decoder("wan-vae"),
            "text": TextEncoder("umt5"),
        }
        return ModelSpec(**(sizes | changes))

    def differences(
        self, spec: ModelSpec, text: str, noise: str, wanted: str, start: str | None = None
    ) -> list[float]:
        """How far each chunk of a video under the policy `full` is off, relative."""
        plan, given = build_plan(spec, spec.geometry(), load_policy("full")), self.file.get_tensor(noise)
        latents = self.file.get_tensor(wanted)
        nothing = torch.zeros_like(given[0, 0])
        made = generate(
            self.model(spec),
            plan,
            self.file.get_tensor(text)[None],
            lambda chunk, step: given[chunk, step] if step < given.shape[1] else nothing,
            len(latents),
            start=self.file.get_tensor(start) if start else None,
        )
        return [float((c.latents - w).norm() / w.norm()) for c, w in zip(made, latents, strict=True)]


def schedule_of(first: Mapping[str, Any], others: Mapping[str, Any], shift: float) -> Schedule:
    """As the file has it: lists to be warped, and levels from the table."""
    own = None if first == others else tuple(map(float, first["step_list"]))
    steps = tuple(map(float, others["step_list"]))
    return Schedule(steps, warp=True, shift=shift, first=own, noise_levels="table")


@pytest.mark.parametrize(
    "name", ["two_step", "one_step", "one_step_without_first_list", "chunkwise_one_step"]
)
def test_the_first_chunk_has_its_own_steps(data: Path, name: str) -> None:
    golden = Golden(data / "golden" / "first_chunk_schedule.safetensors")
    variant = golden.said["variants"][name]
    schedule = schedule_of(variant["first_chunk"], variant["other_chunks"], golden.said["schedule"]["shift"])
    for chunk, kind in enumerate(("first_chunk", "other_chunks")):
        found = schedule.of_chunk(chunk)
        assert found.timesteps == pytest.approx(variant[kind]["timesteps"], rel=1e-6)
        assert found.sigmas[:-1] == pytest.approx(variant[kind]["sigmas"], rel=1e-6)
    frames = variant["frames_per_chunk"]
    window = golden.said["policy"]["window_frames"]
    spec = golden.spec(schedule, frames_per_chunk=frames, attended_frames=window)
    found = golden.differences(spec, "text", variant["noise"], f"{name}.latents")
    assert len(found) == variant["chunks"]
    assert max(found) < TOLERANCE, found


def test_noise_levels_of_krea_are_those_that_its_code_looks_up(data: Path) -> None:
    golden = Golden(data / "golden" / "krea_released.safetensors")
    for variant in golden.said["variants"].values():
        steps = tuple(map(float, variant["timesteps"]))
        found = Schedule(steps, shift=golden.said["schedule"]["shift"], noise_levels="table").later
        assert list(found.sigmas) == [*variant["sigmas"], 0.0]


def unipc(count: int, shift: float, **changes: Any) -> Schedule:
    """LongLive 2's: levels from 0.999 down in equal steps, then shifted; the model is told them without their
    fraction."""
    steps = tuple(999 * (1 - step / count) for step in range(count))
    return Schedule(
        steps,
        warp=True,
        shift=shift,
        whole_timesteps=True,
        renoise="predicted",
        solver="unipc",
        **changes,
    )


def test_unipc_makes_the_video_of_longlive_2(data: Path) -> None:
    golden = Golden(data / "golden" / "longlive2.safetensors")
    said, variant = golden.said["schedule"], golden.said["variants"]["absolute"]
    schedule = unipc(variant["steps"], said["shift"])
    assert list(schedule.later.timesteps) == said["by_variant"]["absolute"]["timesteps"]
    assert schedule.later.sigmas == pytest.approx(said["by_variant"]["absolute"]["sigmas"], rel=1e-6)
    spec = golden.spec(
        schedule,
        frames_per_chunk=golden.said["frames_per_chunk"],
        attended_frames=variant["window"],
        sink_frames=variant["sink"],
    )
    found = golden.differences(spec, "text0", "noise", "absolute.latents")
    assert len(found) == golden.said["chunks"]
    assert max(found) < TOLERANCE, found


@pytest.mark.parametrize("name", ["absolute", "two_steps"])
def test_a_start_frame_is_held_while_its_chunk_is_made(data: Path, name: str) -> None:
    golden = Golden(data / "golden" / "longlive2_start_frame.safetensors")
    variant = golden.said["variants"][name]
    schedule = unipc(variant["steps"], 5.0, by_frame=True)
    assert list(schedule.later.timesteps) == variant["timesteps"]
    spec = golden.spec(
        schedule,
        frames_per_chunk=golden.said["frames_per_chunk"],
        attended_frames=variant["window"],
        sink_frames=variant["sink"],
    )
    found = golden.differences(spec, "text0", "noise", f"{name}.latents", "start")
    assert len(found) == golden.said["chunks"]
    assert max(found) < TOLERANCE, found
