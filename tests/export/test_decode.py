"""`decode.onnx` of a bundle: chunk by chunk in ONNX Runtime against the whole video at once in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from forcingkv.export.graphs import decode_graph
from forcingkv.headmaps import InputError
from forcingkv.models.decoders import KINDS, StreamingDecoder, decoder_for
from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from forcingkv.runtime import Session
from forcingkv.runtime.backends.onnxruntime import OnnxGraph
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Decoder, ModelSpec
from tests.conftest import random_model, small_spec
from tests.exported import shared_bundle
from tests.models.test_decoders import SMALL, SMALL22, small_lighttae, small_taehv, small_vae
from tests.runtime.conftest import small_bundle

CHUNKS = 3


def spec_with(case: str) -> ModelSpec:
    kind, _, version = case.partition(" of ")
    stride = 16 if version == "2.2" else 8
    decoder = Decoder(kind, spatial_stride=stride, temporal_stride=4)  # type: ignore[arg-type]
    return small_spec(latent_channels=4, width=6 * stride, height=4 * stride, decoder=decoder, layers=1)


def by_diffusers(latents: Tensor, config: dict[str, Any] = SMALL) -> Tensor:
    mean, std = (torch.tensor(SMALL[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    pixels: Tensor = small_vae(config).decode(latents * std + mean).sample
    return pixels


def by_taehv(latents: Tensor, patch: int = 1) -> Tensor:
    """At once, which tests/models/test_decoders.py compares with the published layers."""
    decoder = small_taehv(patch)
    pixels, _ = decoder(latents, torch.ones(1), decoder.empty_state(*latents.shape[-2:]))
    return pixels[:, :, 3:]


def by_lighttae(latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(SMALL[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return by_taehv(latents * std + mean)


CASES: dict[str, tuple[Callable[[], StreamingDecoder], Callable[[Tensor], Tensor]]] = {
    "wan-vae": (lambda: WanVaeDecoder(small_vae()), by_diffusers),
    "wan-vae of 2.2": (lambda: WanVaeDecoder(small_vae(SMALL22)), partial(by_diffusers, config=SMALL22)),
    "taehv": (small_taehv, by_taehv),
    "taehv of 2.2": (partial(small_taehv, 2), partial(by_taehv, patch=2)),
    "lighttae": (small_lighttae, by_lighttae),
}
LARGEST = "wan-vae of 2.2"


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long if name == LARGEST else ()) for name in CASES],
)
def bundle(request: pytest.FixtureRequest) -> tuple[str, Path]:
    if request.param == "taehv":
        return request.param, small_bundle("taehv")  # of the same decoder and sizes
    spec = spec_with(request.param)
    decoder, weights = CASES[request.param][0](), random_model(spec).state_dict()
    return request.param, shared_bundle(spec, weights, load_policy("window"), decoder=decoder)


def test_a_streamed_video_is_the_one_decoded_at_once(bundle: tuple[str, Path]) -> None:
    kind, folder = bundle
    with Session.open(folder) as session:
        videos = [list(session.generate("a b c", seed=seed, chunks=CHUNKS)) for seed in (3, 4, 3)]
    assert [len(chunk.frames) for chunk in videos[0]] == [9, 12, 12]
    for video in videos:
        frames = np.concatenate([chunk.frames for chunk in video])
        whole = CASES[kind][1](torch.from_numpy(np.concatenate([c.latents for c in video], 2)))
        expected = (whole[0].permute(1, 2, 3, 0).numpy() + 1) * 127.5
        assert np.abs(frames - expected).max() <= 0.5 + 127.5e-4, "rounded, nothing else"
    first, _, again = (np.concatenate([chunk.frames for chunk in video]) for video in videos)
    np.testing.assert_array_equal(first, again, "a new video begins with empty caches")


def test_pixels_of_the_graph_equal_decoding_at_once(bundle: tuple[str, Path]) -> None:
    kind, folder = bundle
    with Session.open(folder) as session:
        record = session.bundle.manifest.graphs["decode"]
    graph = OnnxGraph(folder / "decode.onnx", 1)
    shapes = {n: r.shape for n, r in record.inputs.items()}
    names = [name for name in shapes if name.startswith("feature.")]
    state = {name: np.zeros(shapes[name], np.float32) for name in names}
    latents = torch.randn(1, 4, 7, 4, 6, generator=torch.Generator().manual_seed(0))
    parts = []
    for number, frame in enumerate(latents.split(1, 2)):
        found = {name: np.empty(r.shape, r.dtype) for name, r in record.outputs.items()}
        inputs = {
            "latents": np.ascontiguousarray(frame.numpy()),
            "first": np.array([number == 0], np.float32),
        }
        graph.run(inputs | state, found)
        state = {name: found[f"next.{name}"] for name in names}
        parts.append(found["pixels"])
    pixels = torch.from_numpy(np.concatenate(parts, 2)[:, :, 3:])
    torch.testing.assert_close(pixels, CASES[kind][1](latents), atol=1e-4, rtol=0)


def test_the_decoder_is_chosen_by_name_and_file(tmp_path: Path) -> None:
    spec = replace(spec_with("wan-vae"), latent_channels=16)
    with pytest.raises(
        InputError, match=r"the weights of the decoder wan-vae are not given.*--vae Wan2.1_VAE"
    ):
        decoder_for(spec, None, None)
    with pytest.raises(InputError, match="there is no decoder 'jpeg'; expected one of wan-vae, taehv"):
        decoder_for(spec, "jpeg", None)
    with pytest.raises(InputError, match="the latents of small are pixels: it needs no decoder"):
        decoder_for(small_spec(), "taehv", None)
    with pytest.raises(
        InputError, match=r"decodes 16 channels at strides 4 \(time\), 8 \(space\); expected 4"
    ):
        decoder_for(spec_with("wan-vae"), "taehv", None, random=True)
    for kind in KINDS:
        chosen, decoder = decoder_for(spec, kind, None, random=True)
        assert (chosen.decoder.kind, decoder is not None) == (kind, True)
    assert decoder_for(small_spec(), None, None) == (small_spec(), None)


@pytest.mark.parametrize("kind", CASES)
def test_cropped_frames_are_the_others_without_their_last_columns_and_rows(kind: str) -> None:
    spec, decoder = spec_with(kind), CASES[kind][0]()
    crop = spec.geometry("92x36" if spec.decoder.spatial_stride == 16 else "46x18")
    whole, (width, height) = spec.geometry(f"{crop.width}x{crop.height}"), crop.shown
    assert (whole.crop, whole.latent_height, whole.latent_width) == (
        None,
        crop.latent_height,
        crop.latent_width,
    )
    plans = [build_plan(spec, geometry, load_policy("full")) for geometry in (crop, whole)]
    graphs = [decode_graph(plan, decoder) for plan in plans]
    held: dict[str, Tensor] = dict(graphs[0].inputs)
    shape = (1, 4, 1, whole.latent_height, whole.latent_width)
    for call in range(2):
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(call))
        given = held | {"latents": latents, "first": torch.tensor([float(call == 0)])}
        made = [dict(zip(graph.outputs, graph.run(given), strict=True)) for graph in graphs]
        assert made[0]["frames"].shape == (4, height, width, 3)
        assert torch.equal(made[0]["frames"], made[1]["frames"][:, :height, :width])
        held = {name: made[0].get(f"next.{name}", tensor) for name, tensor in held.items()}
