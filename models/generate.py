"""Chunked generation in torch: one loop for every policy and model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.models.context import FirstFrame, attend_alone, cache_of_context, context_rotary
from forcingkv.models.kv import Cache, advance, attend_cache, empty_cache, noting, turn_of
from forcingkv.models.wan import Attend, KeysValues, WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.given import GivenNoise
from forcingkv.runtime.graph_records import latent_shape as latent_shape
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.window import first_position, scene_shift
from forcingkv.runtime.schedule import CLEAN_PASS, Renoise
from forcingkv.runtime.unipc import UniPC

Noise = Callable[[int, int], Tensor]
"""(chunk, step) -> noise shaped as the chunk's latents."""

Watch = Callable[[int, int, Cache, Attend], Attend]
"""(chunk, step, cache, attend) -> attend; lets analysis see the attention of every pass. The clean
pass, which reads the same cache as the denoising passes before it, is the step `CLEAN_PASS`."""

Level = Tensor | float
"""A noise level, sigma."""


@dataclass(frozen=True)
class GeneratedChunk:
    """A finished chunk."""

    index: int
    latents: Tensor
    """(batch, latent_channels, frames, height, width)."""
    indices: Tensor | None
    """Segments retained in the pass that fills the cache, if any were chosen (see `kv.advance`)."""


def seeded_noise(plan: CachePlan, seed: int, given: GivenNoise | None = None) -> Noise:
    """The noise the runtime draws for that seed, or has of a file (of the seed what that does not have)."""
    shape = latent_shape(plan)
    if given:
        return lambda chunk, step: torch.from_numpy(given.draw(seed, chunk, step, chunk, shape).copy())
    return lambda chunk, step: torch.from_numpy(positions.chunk_noise(seed, chunk, step, shape))


@torch.no_grad()
def generate(
    model: WanModel,
    plan: CachePlan,
    text: Tensor,
    noise: Noise,
    chunks: int,
    watch: Watch | None = None,
    start: Tensor | None = None,
    scenes: Mapping[int, Tensor] | None = None,
    first_frame: FirstFrame | None = None,
) -> Iterator[GeneratedChunk]:
    """Generate chunk by chunk.

    Args:
        model: a model whose heads lie as the plan groups them (see `models.heads`).
        plan: the cache plan.
        text: (batch, text_length, text_width), on the model's device and in its dtype.
        noise: where noise comes from; latents stay in its dtype between passes.
        chunks: how many to make, those of `start` among them.
        watch: sees the attention of each pass, the clean pass included, where there is one.
        start: latents (batch, latent_channels, frames, height, width) that the video begins with. Whole
            chunks go through a clean pass alone. Fewer frames than a chunk has are held at timestep 0
            while the rest of chunk 0 is made, where the schedule can (`Schedule.by_frame`).
        scenes: chunk -> the text of the scene that begins with it; `text` is that of the first.
        first_frame: makes the first frame of each context of the chunk before, for models that pass it
            through the VAE again (`ModelSpec.context_first`).

    Raises InputError for another number of given frames, and where such a model has no `first_frame`.
    """
    reencodes = plan.spec.context_first == "encoded"
    if reencodes and first_frame is None:
        what = f"is not given, and {plan.spec.name} passes the first frame of each context through the VAE"
        raise InputError(what, where="first_frame", expected="models.context.FirstFrame")
    prompt = model.prompt(text)
    cache: Cache = empty_cache(plan, text, text.shape[0])
    schedule, frames = plan.spec.schedule, plan.spec.frames_per_chunk
    given, held = _given(plan, start)
    cuts = sorted(scenes or ())

    def run(
        latents: Tensor, timesteps: list[float], rotary: tuple[Tensor, Tensor], attend: Attend
    ) -> tuple[Tensor, list[KeysValues]]:
        features = positions.time_features(plan.spec, np.array([timesteps]))
        time = torch.from_numpy(features).to(text).expand(len(latents), -1, -1)
        flow, new = model(latents.to(text), time, rotary, prompt, attend)
        return flow.to(latents), new

    def noted(attend: Attend) -> tuple[Attend, list[Tensor]]:
        """With the list that takes a pass's queries, where roles choose by those of the one that fills."""
        queries: list[Tensor] = []
        return (noting(attend, queries) if plan.reads_queries else attend), queries

    newest: Tensor | None = None
    for chunk in range(chunks):
        begun = cuts[: bisect_right(cuts, chunk)]
        if scenes and chunk in scenes:
            prompt = model.prompt(scenes[chunk])
        if newest is not None:
            _, seen_alone = run(newest, [schedule.context_timestep], context_rotary(plan, text), attend_alone)
            cache = cache_of_context(plan, seen_alone)
        first = first_position(plan, chunk, chunk) + scene_shift(plan, len(begun))
        tables = positions.rotary(plan.spec, plan.geometry, first, frames)
        rotary = torch.from_numpy(tables[0]).to(text.device), torch.from_numpy(tables[1]).to(text.device)
        attend = attend_cache(plan, cache)
        is_given, front = chunk < len(given), held if chunk == 0 else None
        count = 0 if front is None else front.shape[2]
        latents = _with((given[chunk] if is_given else noise(chunk, 0)).to(text.device), front)
        steps = schedule.of_chunk(chunk, len(given))
        unipc = schedule.solver == "unipc"
        solver = UniPC(steps.sigmas, latents.cpu().double().numpy()) if unipc else None
        new, queries = list[KeysValues](), list[Tensor]()
        for step, timestep in enumerate(() if is_given else steps.timesteps):
            seen, queries = noted(watch(chunk, step, cache, attend) if watch else attend)
            timesteps = [0.0] * count + [timestep] * (frames - count) if count else [timestep]
            flow, new = run(latents, timesteps, rotary, seen)
            fresh = noise(chunk, step + 1).to(text.device) if schedule.renoise == "fresh" else None
            sigma, following = steps.sigmas[step : step + 2]
            if solver is None:
                latents = next_latents(schedule.renoise, latents, flow, sigma, following, fresh)
            else:
                x0 = next_latents(schedule.renoise, latents, flow, sigma, 0.0, None)
                latents = torch.from_numpy(solver.following(x0.cpu().double().numpy())).to(latents)
            latents = _with(latents, front)
        if plan.recomputes:
            newest = latents[:, :, -plan.spec.context_frames :]
            again = first_frame(latents) if reencodes and first_frame else None
            if again is not None and (chunk + 1) * frames > plan.spec.context_frames:
                newest = _with(newest, again)
            yield GeneratedChunk(chunk, latents, None)
            continue
        if is_given or schedule.clean_passes:
            seen, queries = noted(watch(chunk, CLEAN_PASS, cache, attend) if watch else attend)
            _, new = run(latents, [schedule.context_timestep], rotary, seen)
        turn = turn_of(plan, chunk, text.device)
        cache, indices = advance(
            plan, cache, new, chunk=chunk, turn=turn, cuts=begun, rotary=rotary, queries=queries
        )
        yield GeneratedChunk(chunk, latents, indices)


def _with(latents: Tensor, given: Tensor | None) -> Tensor:
    """Latents with given first frames in the place of theirs."""
    return latents if given is None else torch.cat([given.to(latents), latents[:, :, given.shape[2] :]], 2)


def level_of_frames(level: Tensor) -> Tensor:
    """Noise levels (frames,) as they meet latents (..., frames, height, width); (1,) meets all as it is."""
    return level if len(level) == 1 else level.view(-1, 1, 1)


def _given(plan: CachePlan, start: Tensor | None) -> tuple[Sequence[Tensor], Tensor | None]:
    """Given latents as whole chunks, or as the frames that are held in chunk 0."""
    if start is None:
        return (), None
    frames, by_frame = plan.spec.frames_per_chunk, plan.spec.schedule.by_frame
    if start.shape[2] and start.shape[2] % frames == 0:
        return start.split(frames, 2), None
    if by_frame and 1 <= start.shape[2] < frames:
        return (), start
    fewer = f", or 1 to {frames - 1}, held while their chunk is made" if by_frame and frames > 1 else ""
    raise InputError(
        f"{start.shape[2]} latent frames are given",
        where="start",
        expected=f"a multiple of {frames}, whole chunks{fewer}",
    )


def next_latents(
    renoise: Renoise, latents: Tensor, flow: Tensor, sigma: Level, following: Level, noise: Tensor | None
) -> Tensor:
    """Latents for the next pass: x0 = latents - sigma * flow, mixed with noise at the level `following`.

    With "fresh" the noise is drawn anew (`docs/method.md`, "Schedule and renoising"); with "predicted" it is
    the model's own, which makes the pass an Euler step.
    """
    if renoise == "predicted":
        return latents + (following - sigma) * flow
    assert noise is not None, "fresh noise is needed"
    return (1 - following) * (latents - sigma * flow) + following * noise
