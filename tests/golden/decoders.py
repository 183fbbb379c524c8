"""Golden files of decoders: their latents through the product's decoder, in the calls that the file names."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from forcingkv.export import export_bundle
from forcingkv.models.checkpoint import random_weights
from forcingkv.models.decoders import StreamingDecoder, load_decoder
from forcingkv.runtime.backends.onnxruntime import OnnxGraph
from forcingkv.runtime.graph_records import next_name
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Decoder, DecoderKind, ModelSpec, Schedule, TextEncoder
from tests.golden.files import GoldenError, GoldenFile
from tests.golden.product import Runner
from tests.golden.recipes import is_tiny, weights_of

TOLERANCES = {"wan-vae": 5e-5, "taehv": 2e-5}
"""Largest absolute difference of any value: pixels in -1 to 1 of a VAE, in 0 to 1 of a tiny decoder."""

Array = npt.NDArray[np.float32]


def decoded(file: GoldenFile, variant: str, runner: Runner) -> tuple[list[float], float]:
    """The largest difference in each call, and the tolerance.

    Raises GoldenError for what is not understood.
    """
    decoder, kind = _load(file)
    latents, reference = file.tensor("latents"), file.tensor(variant)
    if kind == "taehv":  # (1, frames, channels, height, width)
        latents, reference = latents.swapaxes(1, 2), reference.swapaxes(1, 2) * 2 - 1
    counts = file.spec.get("frames_per_call")
    parts = _calls(counts, latents, reference, decoder.temporal_stride)
    if runner == "onnxruntime":
        made = _by_graph(decoder, kind, [part for part, _ in parts])
    else:
        made = _by_torch(decoder, [part for part, _ in parts])
    scale = 1 if kind == "wan-vae" else 2
    differences = []
    for mine, (_, theirs) in zip(made, parts, strict=True):
        mine = mine[:, :, -theirs.shape[2] :]
        if mine.shape != theirs.shape:
            raise GoldenError(f"a call has pixels {theirs.shape}, and the product's {mine.shape}")
        differences.append(float(np.abs(mine.astype(np.float64) - theirs).max()) / scale)
    return differences, TOLERANCES[kind]


@contextmanager
def published(file: GoldenFile) -> Iterator[tuple[Path, DecoderKind]]:
    """A file as it is published, with the weights of a golden file, and what kind of decoder it is of."""
    weights = weights_of(file)
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        path = Path(folder, "decoder.safetensors")
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in weights.items()}, path)
        yield path, "taehv" if is_tiny(weights) else "wan-vae"


def scale_of(file: GoldenFile) -> dict[str, list[float]]:
    """What the loader of a VAE is told of its latents, in diffusers' names."""
    return {f"latents_{part}": file.tensor(part).tolist() for part in ("mean", "std")}


def _load(file: GoldenFile) -> tuple[StreamingDecoder, DecoderKind]:
    """The decoder, read by the product from a file as it is published."""
    with published(file) as (path, kind):
        if kind == "taehv":
            return load_decoder(kind, path), kind
        from forcingkv.models.decoders.wan_files import load_wan_vae  # imports diffusers, which takes seconds

        vae = load_wan_vae(path, scale_of(file)).eval().requires_grad_(False)
        vae.__dict__["bounded"] = lambda pixels: pixels  # the files have pixels as they were before
        return vae, kind


def _calls(counts: Any, latents: Array, pixels: Array, stride: int) -> list[tuple[Array, Array]]:
    """Latents and pixels of each call, whose numbers of pixel frames the file says."""
    whole = isinstance(counts, list) and all(isinstance(count, int) and count > 0 for count in counts)
    starts = [0, *np.cumsum(counts if whole else [0]).tolist()]
    if not whole or starts[-1] != pixels.shape[2] or any((start - 1) % stride for start in starts[1:]):
        raise GoldenError(f"its frames_per_call are {counts!r}, of {pixels.shape[2]} frames")
    frames = [1 + (start - 1) // stride if start else 0 for start in starts]
    return [
        (latents[:, :, frames[n] : frames[n + 1]], pixels[:, :, starts[n] : starts[n + 1]])
        for n in range(len(starts) - 1)
    ]


def _by_torch(decoder: StreamingDecoder, parts: Sequence[Array]) -> list[Array]:
    state, made = decoder.empty_state(*parts[0].shape[-2:]), []
    with torch.no_grad():
        for call, part in enumerate(parts):
            latents = torch.from_numpy(np.ascontiguousarray(part))
            pixels, state = decoder(latents, torch.tensor([float(call == 0)]), state)
            made.append(pixels.numpy())
    return made


def _by_graph(decoder: StreamingDecoder, kind: DecoderKind, parts: Sequence[Array]) -> list[Array]:
    """Through the graph `decode` of a bundle, which takes one latent frame a call."""
    spec = spec_of(decoder, kind, *parts[0].shape[-2:])
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        bundle = Path(folder, "bundle")
        manifest = export_bundle(
            spec, random_weights(spec), load_policy("full"), bundle, decoder=decoder, verify=False
        )
        record, graph = manifest.graphs["decode"], OnnxGraph(bundle / "decode.onnx", 1)
        run = stateful(graph, record, "latents")
        return [
            np.concatenate([run(frame)["pixels"] for frame in np.split(part, part.shape[2], 2)], 2)
            for part in parts
        ]


def stateful(graph: OnnxGraph, record: Any, takes: str) -> Callable[[npt.NDArray[Any]], dict[str, Array]]:
    """Calls of a graph with its input `takes`, each with what the one before it carries on."""
    state = {name: np.zeros(one.shape, np.float32) for name, one in record.carried.items()}
    first = [np.ones(1, np.float32)]

    def call(given: npt.NDArray[Any]) -> dict[str, Array]:
        found = {name: np.empty(one.shape, one.dtype) for name, one in record.outputs.items()}
        graph.run({takes: np.ascontiguousarray(given), "first": first[0], **state}, found)
        first[0] = np.zeros(1, np.float32)
        state.update({name: found[next_name(name)] for name in state})
        return found

    return call


def spec_of(decoder: StreamingDecoder, kind: DecoderKind, height: int, width: int) -> ModelSpec:
    """A model as small as one can be, for a bundle that the decoder lies in."""
    stride = decoder.spatial_stride
    return ModelSpec(
        name="golden",
        layers=1,
        heads=1,
        head_dim=8,
        ffn_width=8,
        latent_channels=decoder.latent_channels,
        patch=1,
        text_width=4,
        text_length=4,
        time_width=4,
        frames_per_chunk=1,
        attended_frames=2,
        ar_start=0,
        fps=16.0,
        width=stride * width,
        height=stride * height,
        schedule=Schedule((1000.0,)),
        decoder=Decoder(kind, stride, decoder.temporal_stride),
        text=TextEncoder("umt5"),
    )
