"""The graphs of a bundle in torch, with flat, named inputs and outputs.

`prompt` runs once a prompt, `step` once a pass, `decode` once a latent frame. Not every bundle has others:
`decode_strip` runs once a strip of a latent frame where frames are decoded in strips, `recache` once a switch
of the prompt that encodes newest frames anew, `encode` once a latent frame of given frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from forcingkv.models.decoders import StreamingDecoder, frames_of, to_frames
from forcingkv.models.decoders.strips import StripShapes, begin_frame, finish_strip
from forcingkv.models.encoders import StreamingEncoder, pixels_of
from forcingkv.models.generate import level_of_frames, next_latents
from forcingkv.models.kv import (
    Cache,
    advance,
    attend_cache,
    cached_parts,
    encode_group,
    heads_of,
    noting,
    part_layouts,
)
from forcingkv.models.kv_roles import Turn
from forcingkv.models.wan import KeysValues, WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.bundle import next_name
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.graph_records import (
    FEATURES,
    FIRST,
    GIVEN_FRAMES,
    TOP,
    TURN,
    encoded_lengths,
    latent_shape,
    symbol_of,
    tokens_symbol,
)
from forcingkv.runtime.kv.codes import parts_of
from forcingkv.runtime.kv.plan import CacheEntry, CachePlan, told_name
from forcingkv.runtime.kv.rebuild import Encoding, encodings, most_encoded, rows_names, seen_entries
from forcingkv.runtime.kv.roles import Role
from forcingkv.runtime.kv.window import first_position, moved_by


@dataclass(frozen=True)
class Graph:
    """What to trace, with example inputs and the names of what goes in and out."""

    model: nn.Module | None
    """Has the parameters."""
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Input name -> the dimension that varies, and its symbol, or a multiple of one: `24*frames`."""
    clean_outputs: tuple[tuple[str, ...], ...] = ()
    """Outputs that only a clean pass is asked for, those together that are made together."""
    passes: tuple[Encoding, ...] = ()
    """Passes over newest frames that it is verified in: those that take most, with a sink that stays and with
    one that is made anew, and the least."""


def prompt_graph(model: WanModel) -> Graph:
    """The graph `prompt`: text -> cross-attention keys and values of every layer."""
    spec = model.spec

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        text = inputs["text"].to(compute_dtype(model))
        return tuple(tensor for kv in model.prompt(text) for tensor in kv)

    text = torch.zeros(1, spec.text_length, spec.text_width)
    return Graph(model, run, {"text": text}, tuple(_cross_names(spec.layers)))


def step_graph(model: WanModel, plan: CachePlan) -> Graph:
    """The graph `step`, one pass: next latents, x0, and the cache as it is after a clean pass.

    Its example inputs are those of the first pass of a chunk in the last phase, each cached tensor as long as
    it ever is: one that is empty by then would be so for good.
    """
    spec, kind = plan.spec, compute_dtype(model)

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        cross = [inputs[name] for name in _cross_names(spec.layers)]
        prompt = [KeysValues(*pair) for pair in zip(cross[::2], cross[1::2], strict=True)]
        cache = _unflatten_cache(plan, [inputs[entry.name] for entry in plan.entries])
        rotary = inputs["cosines"], inputs["sines"]
        latents = inputs["latents"]
        sigma, sigma_next = (level_of_frames(inputs[name]) for name in ("sigma", "sigma_next"))
        queries: list[Tensor] = []
        attend = attend_cache(plan, cache)
        attend = noting(attend, queries) if plan.reads_queries else attend
        flow, new = model(latents.to(kind), inputs["time"].to(kind), rotary, prompt, attend)
        flow = flow.to(latents)
        # Every output is there in every phase; the session takes those the phase calls for.
        rows = {name: inputs[name] for name in plan.rows(0)}
        turn = Turn(*(inputs[name] for name in TURN)) if plan.relative else None
        following, indices = advance(
            plan, cache, new, chunk=None, rows=rows, turn=turn, rotary=rotary, queries=queries
        )
        x0 = latents - sigma * flow
        following_latents = next_latents(
            spec.schedule.renoise, latents, flow, sigma, sigma_next, inputs.get("noise")
        )
        flat = (tensor for groups in following for held in groups for kv in held.values() for tensor in kv)
        out = (following_latents, x0, *flat)
        return out if indices is None else (*out, indices)

    last = plan.phases[-1].first_chunk
    tables = positions.rotary(spec, plan.geometry, first_position(plan, last, last), spec.frames_per_chunk)
    turn = zip(TURN, positions.turn(spec, moved_by(plan, last)), strict=True)
    cosines, sines = (torch.from_numpy(table) for table in tables)
    steps = spec.schedule.later
    # By frame all but the last are held, so that each number of the inputs shows in the outputs.
    held = spec.frames_per_chunk - 1 if spec.schedule.by_frame else 0
    sigma, sigma_next = (torch.tensor([*[0.0] * held, level]) for level in steps.sigmas[:2])
    time = positions.time_features(spec, np.array([[*[0.0] * held, steps.timesteps[0]]]))
    cross = (1, spec.heads, spec.text_length, spec.head_dim)
    inputs = {
        "latents": torch.zeros(latent_shape(plan)),
        **({"noise": torch.zeros(latent_shape(plan))} if spec.schedule.renoise == "fresh" else {}),
        "sigma": sigma,
        "sigma_next": sigma_next,
        "time": torch.from_numpy(time),
        "cosines": cosines,
        "sines": sines,
        **({name: torch.from_numpy(table) for name, table in turn} if plan.relative else {}),
        # One tensor each: the tracer would take one object given twice for one input.
        **{name: torch.zeros(cross, dtype=kind) for name in _cross_names(spec.layers)},
        **_largest(plan, plan.entries, kind),
        # In the steady phase no token goes to the sink; the tracer wants a length of at least 2.
        **{name: torch.arange(length or 2, dtype=torch.int32) for name, length in plan.told_lengths.items()},
    }
    outputs = ["next_latents", "x0", *(next_name(entry.name) for entry in plan.entries)]
    by_layer: list[list[str]] = [[] for _ in plan.layers]
    for entry in plan.entries:
        by_layer[entry.layer].append(next_name(entry.name))
    if plan.choice:
        outputs.append("retained_indices")
        by_layer[plan.choice.layer].append("retained_indices")
    dynamic = {entry.name: (2, tokens_symbol(entry)) for entry in plan.entries}
    dynamic |= {name: (0, symbol_of(name)) for name, length in plan.told_lengths.items() if not length}
    clean = tuple(tuple(names) for names in by_layer if names)
    return Graph(model, run, inputs, tuple(outputs), dynamic, clean)


def recache_graph(model: WanModel, plan: CachePlan) -> Graph:
    """The graph `recache`: newest frames in one pass -> the cache that follows (docs/decisions/0041).

    The number of frames varies. A role that stays is seen as it is cached, and takes none of their tokens;
    one that is made anew has no tokens to be seen, and takes those that its rows say. Its example inputs are
    those of the most frames, beside all that may stay.
    """
    spec, kind = plan.spec, compute_dtype(model)
    seen = seen_entries(plan)

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        cross = [inputs[name] for name in _cross_names(spec.layers)]
        prompt = [KeysValues(*pair) for pair in zip(cross[::2], cross[1::2], strict=True)]
        turn = Turn(*(inputs[name] for name in TURN)) if plan.relative else None
        made: list[Tensor] = []  # in the order of `plan.entries`

        def attend(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
            out = []
            for group in plan.layers[layer]:
                names = {
                    role: [CacheEntry(layer, group, role, part).name for part in parts_of(role)]
                    for role in group.roles
                }
                held = {
                    role.name: cached_parts([inputs[name] for name in of])
                    for role, of in names.items()
                    if of[0] in inputs
                }
                rows = {role.name: inputs[told_name(group, role)] for role in group.roles}
                attended, taken = encode_group(group, queries, heads_of(current, group), held, rows, turn)
                out.append(attended)
                for role in group.roles:
                    dtypes = (dtype for dtype, _ in part_layouts(spec, role, kind))
                    made.extend(map(Tensor.to, taken[role.name], dtypes))
            return out[0] if len(out) == 1 else torch.cat(out, 1)

        rotary = inputs["cosines"], inputs["sines"]
        model.flow(inputs["latents"].to(kind), inputs["time"].to(kind), rotary, prompt, attend)
        return tuple(made)

    frames = most_encoded(plan)
    cosines, sines = map(torch.from_numpy, positions.rotary(spec, plan.geometry, 0, frames))
    turn = zip(TURN, positions.turn(spec, moved_by(plan, plan.phases[-1].first_chunk)), strict=True)
    clean = np.array([[spec.schedule.context_timestep]])
    cross_shape = (1, spec.heads, spec.text_length, spec.head_dim)
    inputs = {
        "latents": torch.zeros(latent_shape(plan, frames)),
        "time": torch.from_numpy(positions.time_features(spec, clean)),
        "cosines": cosines,
        "sines": sines,
        **({name: torch.from_numpy(table) for name, table in turn} if plan.relative else {}),
        **{name: torch.zeros(cross_shape, dtype=kind) for name in _cross_names(spec.layers)},
        **_largest(plan, seen, kind),
        **{name: torch.arange(2, dtype=torch.int32) for name in rows_names(plan)},
    }
    dynamic = {entry.name: (2, tokens_symbol(entry)) for entry in seen}
    dynamic |= {name: (0, symbol_of(name)) for name in rows_names(plan)}
    frames_symbol, encoded_symbol = encoded_lengths(plan)
    if isinstance(frames_symbol, str):
        dynamic["latents"] = 2, frames_symbol
        dynamic |= {name: (0, str(encoded_symbol)) for name in ("cosines", "sines")}
    outputs = tuple(next_name(entry.name) for entry in plan.entries)
    by_frames = sorted(encodings(plan), key=lambda one: -one.frames)
    most = [next((o for o in by_frames if o.keeps_sink is kept), None) for kept in (True, False)]
    verified = dict.fromkeys(one for one in (*most, by_frames[-1]) if one)
    return Graph(model, run, inputs, outputs, dynamic, passes=tuple(verified))


def decode_graph(
    plan: CachePlan,
    decoder: StreamingDecoder | None = None,
    *,
    pixels: bool = True,
    strips: Strips | None = None,
) -> Graph:
    """The graph `decode`: of a chunk whose latents are pixels, or of one latent frame with a decoder.

    With a decoder: latents and feature caches -> frames, the pixels they are rounded from, and the next
    caches. A latent frame at a time, since a decoder's activations are many times its latents. `pixels` are
    for comparing with torch, none of them cropped. They take time and memory in every call, so graphs for
    TensorRT have none. With `strips` it makes the features that `decode_strip` makes frames of.
    """
    batch, channels, _, height, width = latent_shape(plan)

    if decoder is None:
        latents = torch.zeros(latent_shape(plan))
        return Graph(
            None,
            lambda inputs: (frames_of(inputs["latents"], plan.geometry),),
            {"latents": latents},
            ("frames",),
        )
    kind = compute_dtype(decoder)
    latents, first = torch.zeros(batch, channels, 1, height, width), torch.ones(1)
    state = decoder.empty_state(height, width)
    if strips:
        state = dict(list(state.items())[: decoder.begun])

        def begin(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            held = {name: inputs[name] for name in state}
            given = inputs["latents"].to(kind), inputs[FIRST].to(kind)
            features, following = begin_frame(decoder, *given, held)
            return (features, *(following[name] for name in state))

        inputs = {"latents": latents, FIRST: first, **state}
        return Graph(decoder, begin, inputs, (FEATURES, *map(next_name, state)))

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        held = {name: inputs[name] for name in state}
        made, following = decoder(inputs["latents"].to(kind), inputs[FIRST].to(kind), held)
        made = made.float()
        frames = frames_of(made, plan.geometry)
        shown = (frames, made) if pixels else (frames,)
        return (*shown, *(following[name] for name in state))

    inputs = {"latents": latents, FIRST: first, **state}
    return Graph(decoder, run, inputs, (*_shown(pixels), *map(next_name, state)))


def decode_strip_graph(
    plan: CachePlan, decoder: StreamingDecoder, strips: Strips, shapes: StripShapes, *, pixels: bool = True
) -> Graph:
    """The graph `decode_strip`: features of a strip, its caches and edges -> its rows of frames, and the next
    caches and edges. `shapes` are those of the decoder in these strips; `pixels` as in `decode_graph`."""
    kind, geometry = compute_dtype(decoder), plan.geometry
    carried = {n: torch.zeros(shape, dtype=kind) for n, shape in (shapes.state | shapes.edges).items()}

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        held = {name: inputs[name] for name in carried}
        given = inputs[FEATURES], inputs[FIRST].to(kind), inputs[TOP]
        made, following = finish_strip(decoder, strips, geometry.height, *given, held)
        made = made.float()
        shown = (to_frames(made[..., : geometry.shown[0]]), made)
        return (*shown[: len(_shown(pixels))], *(following[name] for name in carried))

    features = torch.zeros(strips.rows, *shapes.features[1:], dtype=kind)
    inputs = {FEATURES: features, FIRST: torch.ones(1), TOP: torch.zeros(1), **carried}
    return Graph(decoder, run, inputs, (*_shown(pixels), *map(next_name, carried)))


def _shown(pixels: bool) -> tuple[str, ...]:
    return ("frames", "pixels") if pixels else ("frames",)


def encode_graph(plan: CachePlan, encoder: StreamingEncoder) -> Graph:
    """The graph `encode`: the pixel frames of one latent frame and feature caches -> its latents, and the
    next caches. Frames are as large as the model computes them, before any are cropped."""
    geometry, kind = plan.geometry, compute_dtype(encoder)
    state = encoder.empty_state(geometry.latent_height, geometry.latent_width)

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        held = {name: inputs[name] for name in state}
        pixels = pixels_of(inputs[GIVEN_FRAMES]).to(kind)
        latents, following = encoder(pixels, inputs[FIRST].to(kind), held)
        return (latents.float(), *(following[name] for name in state))

    frames = torch.zeros(encoder.temporal_stride, geometry.height, geometry.width, 3, dtype=torch.uint8)
    inputs = {GIVEN_FRAMES: frames, FIRST: torch.ones(1), **state}
    return Graph(encoder, run, inputs, ("latents", *map(next_name, state)))


def _cross_names(layers: int) -> list[str]:
    return [f"cross.{layer}.{part}" for layer in range(layers) for part in KeysValues._fields]


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype a model computes in: that of its weights. Latents and noise levels stay float32."""
    return next(model.parameters()).dtype


def _largest(plan: CachePlan, entries: Sequence[CacheEntry], kind: torch.dtype) -> dict[str, Tensor]:
    """Cached tensors as long as they ever are, in a model that computes in `kind`."""
    name = str(kind).removeprefix("torch.")
    dtypes = {e.name: getattr(torch, e.dtype(plan.spec, name)) for e in entries}  # type: ignore[arg-type]
    return {e.name: torch.zeros(max(plan.buffer_shapes(e)), dtype=dtypes[e.name]) for e in entries}


def _unflatten_cache(plan: CachePlan, tensors: list[Tensor]) -> Cache:
    """Tensors in the order of `plan.entries` as a cache."""
    left = iter(tensors)

    def held(role: Role) -> KeysValues:
        return cached_parts([next(left) for _ in parts_of(role)])

    return [[{role.name: held(role) for role in g.roles} for g in groups] for groups in plan.layers]


def empty(module: nn.Module, dtype: Callable[[str], torch.dtype]) -> None:
    """Give a module parameters of the same shapes, of those dtypes by name, without contents."""
    state = {name: torch.empty(value.shape, dtype=dtype(name)) for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
