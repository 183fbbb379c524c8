"""The three graphs of a bundle as torch modules with flat, named inputs and outputs.

`prompt` runs once a prompt, `step` once a pass, `decode` once a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from forcingkv.models.cache import Cache, advance, attend_cache
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.generate import latent_shape, next_latents
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.plan import CacheEntry, CachePlan

__all__ = ["Graph", "decode_graph", "prompt_graph", "step_graph"]


@dataclass(frozen=True)
class Graph:
    """A module to trace, with example inputs and the names of what goes in and out.

    Its parameters are those of its attribute `model`, where it has one.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, str]
    """Input name -> symbol of its token dimension (dimension 2), where that varies by phase."""


def _cross_names(layers: int) -> list[str]:
    return [f"cross.{layer}.{part}" for layer in range(layers) for part in KeysValues._fields]


class PromptModule(nn.Module):
    """text -> cross-attention keys and values of every layer."""

    def __init__(self, model: WanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor for kv in self.model.prompt(inputs["text"]) for tensor in kv)


class StepModule(nn.Module):
    """One pass: next latents, x0, and the cache as it is after a clean pass."""

    def __init__(self, model: WanModel, plan: CachePlan) -> None:
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        plan = self.plan
        cross = [inputs[name] for name in _cross_names(plan.spec.layers)]
        prompt = [KeysValues(*pair) for pair in zip(cross[::2], cross[1::2], strict=True)]
        cache = unflatten_cache(plan, [inputs[entry.name] for entry in plan.entries])
        rotary = inputs["cosines"], inputs["sines"]
        latents, sigma = inputs["latents"], inputs["sigma"]
        flow, new = self.model(latents, inputs["time"], rotary, prompt, attend_cache(plan, cache))
        # Every output is there in every phase; the session takes those the phase calls for.
        following, indices = advance(plan, cache, new, first=True, retain=True)
        x0 = latents - sigma * flow
        following_latents = next_latents(
            plan.spec.schedule.renoise, latents, flow, sigma, inputs["sigma_next"], inputs.get("noise")
        )
        out = (following_latents, x0, *flatten_cache(plan, following))
        return out if indices is None else (*out, indices)


class PixelDecodeModule(nn.Module):
    """Latents that are pixels already: (1, C, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3)."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return to_frames(inputs["latents"])


class StreamDecodeModule(nn.Module):
    """Latents and feature caches -> frames, the pixels they are rounded from, and the next caches."""

    def __init__(self, decoder: StreamingDecoder, state: list[str]) -> None:
        super().__init__()
        self.model, self.state = decoder, state

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        state = {name: inputs[name] for name in self.state}
        pixels, following = self.model(inputs["latents"], inputs["first"], state)
        return (to_frames(pixels), pixels, *(following[name] for name in self.state))


def to_frames(pixels: Tensor) -> Tensor:
    """(1, 1 or 3, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3)."""
    frames = ((pixels[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.expand(-1, -1, -1, 3) if frames.shape[-1] == 1 else frames


def unflatten_cache(plan: CachePlan, tensors: list[Tensor]) -> Cache:
    """Tensors in the order of `plan.entries` as a cache."""
    cache: list[list[dict[str, KeysValues]]] = [[{} for _ in groups] for groups in plan.layers]
    pairs = zip(plan.entries[::2], tensors[::2], tensors[1::2], strict=True)
    for entry, keys, values in pairs:
        place = plan.layers[entry.layer].index(entry.group)
        cache[entry.layer][place][entry.role] = KeysValues(keys, values)
    return cache


def flatten_cache(plan: CachePlan, cache: Cache) -> list[Tensor]:
    """A cache as tensors in the order of `plan.entries`."""
    return [
        getattr(cache[e.layer][plan.layers[e.layer].index(e.group)][e.role], e.part) for e in plan.entries
    ]


def prompt_graph(model: WanModel) -> Graph:
    """The graph `prompt`."""
    spec = model.spec
    text = torch.zeros(1, spec.text_length, spec.text_width)
    return Graph("prompt", PromptModule(model), {"text": text}, tuple(_cross_names(spec.layers)), {})


def step_graph(model: WanModel, plan: CachePlan) -> Graph:
    """The graph `step`. Its example inputs are those of the first pass of a chunk in the last phase."""
    spec = plan.spec
    first_frame = plan.phases[-1].first_chunk * spec.frames_per_chunk
    tables = positions.rotary(spec, plan.geometry, first_frame, spec.frames_per_chunk)
    cosines, sines = (torch.from_numpy(table) for table in tables)
    sigma, sigma_next = spec.schedule.sigmas[:2]
    time = positions.time_features(spec, np.array([[spec.schedule.timesteps[0]]]))
    cross = (1, spec.heads, spec.text_length, spec.head_dim)
    inputs = {
        "latents": torch.zeros(latent_shape(plan)),
        **({"noise": torch.zeros(latent_shape(plan))} if spec.schedule.renoise == "fresh" else {}),
        "sigma": torch.tensor([sigma]),
        "sigma_next": torch.tensor([sigma_next]),
        "time": torch.from_numpy(time),
        "cosines": cosines,
        "sines": sines,
        # One tensor each: the tracer would take one object given twice for one input.
        **{name: torch.zeros(cross) for name in _cross_names(spec.layers)},
        **{entry.name: _example(plan, entry) for entry in plan.entries},
    }
    outputs = ("next_latents", "x0", *(f"next.{entry.name}" for entry in plan.entries))
    if plan.score_layer is not None:
        outputs += ("retained_indices",)
    dynamic = {entry.name: f"{entry.group.label}_{entry.role}_tokens" for entry in plan.entries}
    return Graph("step", StepModule(model, plan), inputs, outputs, dynamic)


def decode_graph(plan: CachePlan, decoder: StreamingDecoder | None = None) -> Graph:
    """The graph `decode`: of a chunk whose latents are pixels, or of one latent frame with a decoder.

    A latent frame at a time, since a decoder's activations are many times its latents.
    """
    batch, channels, _, height, width = latent_shape(plan)
    if decoder is None:
        latents = torch.zeros(latent_shape(plan))
        return Graph("decode", PixelDecodeModule(), {"latents": latents}, ("frames",), {})
    state = {name: torch.zeros(shape) for name, shape in decoder.state_shapes(height, width).items()}
    inputs = {
        "latents": torch.zeros(batch, channels, 1, height, width),
        "first": torch.ones(1),
        **state,
    }
    outputs = ("frames", "pixels", *(f"next.{name}" for name in state))
    return Graph("decode", StreamDecodeModule(decoder, list(state)), inputs, outputs, {})


def _example(plan: CachePlan, entry: CacheEntry) -> Tensor:
    tokens = plan.tokens(entry.group, entry.role, plan.phases[-1].first_chunk)
    return torch.zeros(1, entry.group.heads, tokens, plan.spec.head_dim)
