"""What goes into the graphs of a bundle and comes out: it follows from spec, plan and compute dtype.

Only the feature caches of a decoder do not: what it carries from call to call is its own. But each comes in
and goes out in one shape, and its size is in the manifest, from which memory is counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import shown
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.kv.plan import PARTS, CacheEntry, CachePlan
from forcingkv.runtime.kv.rebuild import encodings, rows_names, seen_entries
from forcingkv.runtime.spec import Dtype

if TYPE_CHECKING:
    from forcingkv.runtime.bundle import GraphRecord, TensorRecord

GRAPHS = ("prompt", "step", "decode")
"""Graphs that every bundle has."""
MORE_GRAPHS = ("decode_strip", "recache", "encode")
"""Graphs that some bundles have too, in the order in which they are made."""
ALL_GRAPHS = (*GRAPHS, *MORE_GRAPHS)
UNFOLDED = ("recache",)
"""Graphs that read their weights where the file has them, in every pass: nothing is computed of them when the
graph is loaded, and they are no second copy beside those of `step` (docs/decisions/0044)."""
CLEAN = "clean"
"""The input of `step` that says whether a pass is the clean one."""
TURN = ("turn_cosines", "turn_sines")
"""Inputs of `step` that move cached keys with the window, where positions are relative to it
(`positions.turn`)."""
VARYING = "encoded_frames"
"""The dimension of `recache` that is how many frames it encodes."""
FIRST = "first"
"""Input of graphs with feature caches that is 1 in a video's first call and 0 in the others."""
STRIP = "decode_strip"
"""The graph that decodes a strip of a frame, of what `decode` makes of a whole one."""
DECODING_GRAPHS = ("decode", STRIP)
"""Those that make frames."""
FEATURES, TOP = "features", "top"
"""What goes from `decode` to `decode_strip`, row by row; and which row of it a strip begins with."""
EDGE = "edge."
"""How the inputs of `decode_strip` begin that the strip above gives, and not the call before."""
GIVEN_FRAMES = "frames"
"""The input of `encode` that is pixel frames."""
STREAMING = (*DECODING_GRAPHS, "encode")
"""Graphs that go through a video call by call, each with caches of its own; a lane runs them in its side
queue."""
MOST_CACHES = 1000
"""Inputs of a decoder; the VAE has 33."""
MOST_ALONG = 1 << 24
"""Of any dimension."""
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
"""Of what a decoder carries."""
SYMBOL = re.compile(r"[\w.+*/(), -]{1,1000}", re.ASCII)
"""Of a dimension that varies."""

Dimension: TypeAlias = int | str


class Layout(NamedTuple):
    """Dtype and shape of an input or output. A dimension that varies by phase has its symbol."""

    dtype: str
    shape: tuple[Dimension, ...]


ANY = "*"
"""In the shape of an output: a length that follows from the inputs'."""


def next_name(name: str) -> str:
    """The name of the output that replaces the input of that name in the next call."""
    return f"next.{name}"


def symbol_of(name: str) -> str:
    """Symbol of an input's length that varies: its name in characters that symbols have; labels have any."""
    symbol = re.sub(r"\W", "_", name)
    return symbol if symbol.isidentifier() else f"_{symbol}"


def tokens_symbol(entry: CacheEntry) -> str:
    """Symbol of how many tokens of a role are cached."""
    return symbol_of(f"{entry.group.label}_{entry.role.name}_tokens")


def cross_layouts(plan: CachePlan, compute: Dtype) -> dict[str, Layout]:
    """The prompt's keys and values: outputs of `prompt`, inputs of `step`."""
    spec = plan.spec
    layout = Layout(compute, (1, spec.heads, spec.text_length, spec.head_dim))
    return {f"cross.{layer}.{part}": layout for layer in range(spec.layers) for part in PARTS}


def prompt_layouts(plan: CachePlan, compute: Dtype) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Inputs and outputs of `prompt`."""
    text = Layout("float32", (1, plan.spec.text_length, plan.spec.text_width))
    return {"text": text}, cross_layouts(plan, compute)


def step_layouts(
    plan: CachePlan, compute: Dtype, *, skips_caches: bool
) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Inputs and outputs of `step`; `skips_caches` says whether it is told which pass is the clean one."""
    spec = plan.spec
    latents = Layout("float32", latent_shape(plan))
    table = Layout("float32", (plan.chunk_tokens, spec.head_dim // 2))
    timesteps = spec.frames_per_chunk if spec.schedule.by_frame else 1
    number = Layout("float32", (timesteps,))
    inputs = {"latents": latents}
    if spec.schedule.renoise == "fresh":
        inputs["noise"] = latents
    inputs |= {"sigma": number, "sigma_next": number}
    inputs["time"] = Layout("float32", (1, timesteps, spec.time_width))
    inputs |= {"cosines": table, "sines": table}
    if plan.relative:
        inputs |= dict.fromkeys(TURN, Layout("float32", (spec.head_dim,)))
    inputs |= cross_layouts(plan, compute)
    outputs = {"next_latents": latents, "x0": latents}
    for entry in plan.entries:
        inputs[entry.name] = _cached(plan, entry, compute)
        outputs[next_name(entry.name)] = _cached(plan, entry, compute, made=True)
    inputs |= {
        name: Layout("int32", (length or symbol_of(name),)) for name, length in plan.told_lengths.items()
    }
    if plan.choice:
        outputs["retained_indices"] = Layout("int64", (ANY,))
    if skips_caches:
        inputs[CLEAN] = Layout("bool", (1,))
    return inputs, outputs


def latent_shape(plan: CachePlan, frames: int | None = None) -> tuple[int, ...]:
    """(1, channels, latent frames, height, width) of a chunk, or of so many latent frames."""
    spec, geometry = plan.spec, plan.geometry
    counted = spec.frames_per_chunk if frames is None else frames
    return 1, spec.latent_channels, counted, geometry.latent_height, geometry.latent_width


def encoded_lengths(plan: CachePlan) -> tuple[Dimension, Dimension]:
    """How many frames `recache` encodes, and how many tokens: symbols, where their number varies."""
    frames = {one.frames for one in encodings(plan)}
    if len(frames) == 1:
        return frames.copy().pop(), frames.pop() * plan.frame_tokens
    return VARYING, f"{plan.frame_tokens}*{VARYING}" if plan.frame_tokens > 1 else VARYING


def recache_layouts(plan: CachePlan, compute: Dtype) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Inputs and outputs of `recache`."""
    spec, (frames, tokens) = plan.spec, encoded_lengths(plan)
    batch, channels, _, *sides = latent_shape(plan)
    table = Layout("float32", (tokens, spec.head_dim // 2))
    inputs = {"latents": Layout("float32", (batch, channels, frames, *sides))}
    inputs |= {"time": Layout("float32", (1, 1, spec.time_width)), "cosines": table, "sines": table}
    if plan.relative:
        inputs |= dict.fromkeys(TURN, Layout("float32", (spec.head_dim,)))
    inputs |= cross_layouts(plan, compute)
    for entry in seen_entries(plan):
        inputs[entry.name] = _cached(plan, entry, compute)
    inputs |= {name: Layout("int32", (symbol_of(name),)) for name in rows_names(plan)}
    outputs = {next_name(e.name): _cached(plan, e, compute, made=True) for e in plan.entries}
    return inputs, outputs


def _cached(plan: CachePlan, entry: CacheEntry, compute: Dtype, *, made: bool = False) -> Layout:
    """A cached tensor as passes read it, or as one makes it."""
    shape = 1, entry.group.heads, ANY if made else tokens_symbol(entry), entry.width(plan.spec)
    return Layout(entry.dtype(plan.spec, compute), shape)


@dataclass(frozen=True)
class DecoderSizes:
    """What the inputs and outputs of `decode` and `decode_strip` do not take from the plan."""

    carried: Mapping[str, Layout]
    """Feature caches of `decode`."""
    strips: Strips | None = None
    """None: a frame is decoded as a whole, and what follows is empty."""
    strip: Mapping[str, Layout] = field(default_factory=dict)
    """What `decode_strip` carries: feature caches of a strip, and edges."""
    features: tuple[int, ...] = ()
    """(rows, channels, frames, width): the shape of a frame's features."""

    def computing_in(self, compute: Dtype) -> DecoderSizes:
        """The same, of a decoder that computes in that dtype."""
        carried, strip = (
            {name: layout._replace(dtype=compute) for name, layout in of.items()}
            for of in (self.carried, self.strip)
        )
        return replace(self, carried=carried, strip=strip)


def decode_layouts(
    plan: CachePlan, compute: Dtype, sizes: DecoderSizes, *, pixels: bool
) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Inputs and outputs of `decode`, of a decoder of those sizes.

    `pixels` says whether it gives what frames are rounded from, for comparing graphs with torch.
    """
    carried = sizes.carried
    spec, (width, height) = plan.spec, plan.geometry.shown
    if spec.decoder.kind == "pixels":
        frames = spec.frames_per_chunk
        given = Layout("float32", latent_shape(plan))
        return {"latents": given}, {"frames": Layout("uint8", (frames, height, width, 3))}
    frames = spec.decoder.temporal_stride
    inputs = {"latents": Layout("float32", latent_shape(plan, 1)), FIRST: Layout("float32", (1,))}
    outputs = {FEATURES: Layout(compute, sizes.features)}
    if sizes.strips is None:
        outputs = _frame_layouts(plan, height, plan.geometry.height, pixels=pixels)
    outputs |= {next_name(name): layout for name, layout in carried.items()}
    return inputs | dict(carried), outputs


def encode_layouts(
    plan: CachePlan, compute: Dtype, carried: Mapping[str, Layout]
) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Inputs and outputs of `encode`, of an encoder that carries those feature caches."""
    geometry, frames = plan.geometry, plan.spec.decoder.temporal_stride
    inputs = {
        GIVEN_FRAMES: Layout("uint8", (frames, geometry.height, geometry.width, 3)),
        FIRST: Layout("float32", (1,)),
    }
    outputs = {"latents": Layout("float32", latent_shape(plan, 1))}
    outputs |= {next_name(name): layout for name, layout in carried.items()}
    return inputs | dict(carried), outputs


def strip_layouts(
    plan: CachePlan, compute: Dtype, sizes: DecoderSizes, *, pixels: bool
) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Inputs and outputs of `decode_strip`."""
    assert sizes.strips is not None
    rows = sizes.strips.pixel_rows
    number = Layout("float32", (1,))
    features = Layout(compute, (sizes.strips.rows, *sizes.features[1:]))
    outputs = _frame_layouts(plan, rows, rows, pixels=pixels)
    outputs |= {next_name(name): layout for name, layout in sizes.strip.items()}
    return {FEATURES: features, FIRST: number, TOP: number, **sizes.strip}, outputs


def _frame_layouts(plan: CachePlan, shown: int, rows: int, *, pixels: bool) -> dict[str, Layout]:
    """What a latent frame becomes: so many rows of its frames, and of the pixels they are rounded from."""
    frames, geometry = plan.spec.decoder.temporal_stride, plan.geometry
    made = {"frames": Layout("uint8", (frames, shown, geometry.shown[0], 3))}
    if pixels:
        made["pixels"] = Layout("float32", (1, 3, frames, rows, geometry.width))
    return made


def layouts(
    plan: CachePlan, compute: Dtype, graph: str, record: GraphRecord, sizes: DecoderSizes
) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Inputs and outputs of a graph; `sizes` are the decoder's."""
    if graph == "prompt":
        return prompt_layouts(plan, compute)
    if graph == "step":
        return step_layouts(plan, compute, skips_caches=record.skips_caches)
    if graph == "encode":
        return encode_layouts(plan, compute, _carried(record))
    if graph == "recache":
        return recache_layouts(plan, compute)
    of_decoder = strip_layouts if graph == STRIP else decode_layouts
    return of_decoder(plan, compute, sizes, pixels=compute == "float32" and record.file is not None)


def layouts_without_graphs(
    plan: CachePlan, compute: Dtype, sizes: DecoderSizes
) -> dict[str, tuple[dict[str, Layout], dict[str, Layout]]]:
    """Inputs and outputs of all graphs, where there are none but torch's own functions; `sizes` are the
    decoder's."""
    found = {
        "prompt": prompt_layouts(plan, compute),
        "step": step_layouts(plan, compute, skips_caches=True),
        "decode": decode_layouts(plan, compute, sizes, pixels=False),
    }
    if sizes.strips:
        found[STRIP] = strip_layouts(plan, compute, sizes, pixels=False)
    return found


def sizes_of(graphs: Mapping[str, GraphRecord], strips: Strips | None) -> DecoderSizes:
    """The sizes of the decoder, as the records of its graphs have them."""
    carried, strip = (_carried(graphs[name]) if name in graphs else {} for name in ("decode", STRIP))
    features = graphs["decode"].outputs.get(FEATURES)
    return DecoderSizes(carried, strips, strip, features.shape if features else ())


def check_records(
    graphs: Mapping[str, GraphRecord],
    plan: CachePlan,
    compute: Dtype,
    where: str,
    strips: Strips | None = None,
) -> None:
    """Raise InputError unless the records of all graphs are those that follow from the plan, and from the
    strips in which frames are decoded."""
    others = sorted(set(graphs) - set(ALL_GRAPHS))
    if others:
        raise InputError(f"has a graph {shown(others[0])}", where=where, expected=", ".join(ALL_GRAPHS))
    if (strips is not None) != (STRIP in graphs):
        what = "says nothing of the strips" if strips is None else "has no graph for the strips"
        raise InputError(f"{what} that frames are decoded in", where=where, expected=f"a graph {STRIP}")
    for name in STREAMING:
        if name in graphs and (name == "encode" or plan.spec.decoder.kind != "pixels"):
            _check_carried(graphs[name], compute, f"{where}: graphs.{name}")
    sizes = sizes_of(graphs, strips)
    if strips is not None:
        _check_strips(strips, sizes, plan, where)
    for name, record in graphs.items():
        wanted = layouts(plan, compute, name, record, sizes)
        for kind, found, expected in zip(
            ("input", "output"), (record.inputs, record.outputs), wanted, strict=True
        ):
            _check(name, kind, found, expected, where)


def _check(
    graph: str, kind: str, found: Mapping[str, TensorRecord], wanted: Mapping[str, Layout], where: str
) -> None:
    again = "It was made by another version of forcingkv: export the bundle again."
    for name in wanted:
        if name not in found:
            raise InputError(
                f"its {graph} graph has no {kind} {name}",
                where=where,
                expected=f"the {kind}s of its cache plan",
                hint=again,
            )
    for name, record in found.items():
        if name not in wanted:
            what = f"its {graph} graph has the {kind} {shown(name)}, which is not known"
            raise InputError(what, where=where, expected=f"the {kind}s of its cache plan", hint=again)
        layout = wanted[name]
        if record.dtype != layout.dtype or not _same(record.shape, layout.shape):
            raise InputError(
                f"its {kind} {name} of {graph} is {shown(record.dtype)} {shown(list(record.shape))}",
                where=where,
                expected=f"{layout.dtype} {list(layout.shape)}, which follows from its model and policy",
                hint=again,
            )


def _same(found: tuple[object, ...], wanted: tuple[Dimension, ...]) -> bool:
    return len(found) == len(wanted) and all(
        _any_length(a) if b is ANY else type(a) is type(b) and a == b
        for a, b in zip(found, wanted, strict=True)
    )


def _any_length(size: object) -> bool:
    if isinstance(size, str):
        return SYMBOL.fullmatch(size) is not None
    return type(size) is int and 0 <= size <= MOST_ALONG


def _carried(record: GraphRecord) -> dict[str, Layout]:
    return {name: Layout(tensor.dtype, tensor.shape) for name, tensor in record.carried.items()}


def _check_strips(strips: Strips, sizes: DecoderSizes, plan: CachePlan, where: str) -> None:
    """Raise InputError unless strips are of the frame and cover it, and features are theirs."""
    rows, shape = plan.geometry.height + strips.lag, sizes.features
    covered = strips.count * strips.pixel_rows
    fits = rows <= covered < rows + strips.count * strips.scale
    whole = len(shape) == 4 and all(type(size) is int and 0 < size <= MOST_ALONG for size in shape)
    if (
        plan.spec.decoder.kind == "pixels"
        or not fits
        or not whole
        or shape[0] * strips.scale != plan.geometry.height
    ):
        raise InputError(
            f"has {strips.count} strips of {strips.pixel_rows} rows, {strips.lag} rows late, of features"
            f" {shown(list(shape))}",
            where=where,
            expected=f"strips that cover the {plan.geometry.height} rows of a frame",
            hint="Export the bundle again with this version of forcingkv.",
        )


def _check_carried(record: GraphRecord, compute: Dtype, where: str) -> None:
    """Raise InputError unless the feature caches of a decoder have plain names, dtypes and whole sizes."""
    carried = record.carried
    if not 1 <= len(carried) <= MOST_CACHES:
        what = f"carries {len(carried)} tensors from call to call"
        raise InputError(what, where=where, expected=f"1 to {MOST_CACHES}")
    for name, tensor in carried.items():
        whole = all(type(size) is int and 0 < size <= MOST_ALONG for size in tensor.shape)
        if not (NAME.fullmatch(name) and whole and tensor.dtype == compute and 0 < len(tensor.shape) <= 8):
            raise InputError(
                f"carries {shown(name)} as {shown(tensor.dtype)} {shown(list(tensor.shape))}",
                where=where,
                expected=f"{compute}, and whole sizes from 1 to {MOST_ALONG}",
            )
