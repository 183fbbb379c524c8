"""`encode` of a bundle: given frames become latents, piece by piece, on every backend that runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.decoders import frames_of
from forcingkv.models.decoders.wan_vae import WanVaeDecoder
from forcingkv.models.encoders.wan_vae import WanVaeEncoder
from forcingkv.runtime import Bundle
from forcingkv.runtime.backends import Lane, LaneOptions, as_run, open_backend
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.frame_encoder import FrameEncoder, Frames, PixelEncoder, encoder_of
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from tests.conftest import random_model, small_spec
from tests.export.test_decode import spec_with
from tests.export.test_engine_builds import needs_rtx
from tests.exported import shared_bundle
from tests.models.test_decoders import SMALL, SMALL22, small_vae

CONFIGS = {"wan-vae": SMALL, "wan-vae of 2.2": SMALL22}
CROPPED = {"wan-vae": "46x30", "wan-vae of 2.2": "92x62"}
"""Two columns, and two rows or four, fewer than the model computes."""


@cache
def encoding_bundle(kind: str, target: str = "onnx", resolution: str | None = None) -> Path:
    spec, vae = spec_with(kind), small_vae(CONFIGS[kind])
    options: dict[str, Any] = {"target": target} if target != "onnx" else {}
    if target == "tensorrt-rtx":
        options["sms"] = (89,)
    return shared_bundle(
        spec,
        random_model(spec).state_dict(),
        load_policy("window"),
        decoder=WanVaeDecoder(vae),
        encoder=WanVaeEncoder(vae),
        resolution=resolution,
        **options,
    )


def lane_on(bundle: Bundle, backend: str) -> tuple[Bundle, Lane]:
    options = LaneOptions(backend, threads=1)
    run = as_run(bundle, options)
    return run, open_backend(run, options)


@pytest.fixture(params=["onnxruntime", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def encoder(kind: str, backend: str) -> Iterator[FrameEncoder]:
    bundle, lane = lane_on(Bundle.open(encoding_bundle(kind)), backend)
    made = encoder_of(lane, bundle.manifest.graphs, bundle.plan)
    assert isinstance(made, FrameEncoder)
    yield made
    lane.close()


def clip(kind: str, count: int = 9, seed: int = 3) -> Frames:
    geometry = spec_with(kind).geometry()
    shape = count, geometry.height, geometry.width, 3
    frames: Frames = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return frames


def by_diffusers(kind: str, frames: Frames) -> np.ndarray[Any, Any]:
    mean, std = (torch.tensor(SMALL[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        made = (small_vae(CONFIGS[kind]).encode(pixels).latent_dist.mode() - mean) / std
    return made.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("split", [[9], [1, 8], [1, 4, 4], [5, 4]], ids=str)
def test_frames_in_pieces_are_what_diffusers_encodes_at_once(
    encoder: FrameEncoder, kind: str, split: list[int]
) -> None:
    frames, made = clip(kind), []
    for part in np.split(frames, np.cumsum(split)[:-1]):
        made.append(encoder.encode(part))
        assert (made[-1].dtype, made[-1].shape) == (np.float32, (1, 4, (len(part) + 3) // 4, 4, 6))
    found = np.concatenate(made, 2)
    np.testing.assert_allclose(found, by_diffusers(kind, frames), rtol=0, atol=1e-4)
    assert encoder.called == 3


def test_a_new_video_knows_nothing_of_the_one_before(encoder: FrameEncoder, kind: str) -> None:
    first = encoder.encode(clip(kind))
    encoder.restart()
    encoder.encode(clip(kind, 5, seed=8))
    encoder.restart()
    assert np.array_equal(encoder.encode(clip(kind)), first)


def test_frames_of_another_size_or_number_are_refused(encoder: FrameEncoder, kind: str) -> None:
    frames = clip(kind)
    _, height, width, _ = frames.shape
    size = rf"expected uint8 \(frames, {height}, {width}, 3\)"
    wrong: list[tuple[Any, str]] = [
        (frames[:, 1:], size),
        (frames.astype(np.float32), rf"are float32 of the shape .*{size}"),
        (frames[0], size),
        (frames[:4], r"are 4; expected 1, 5, 9, \.\.\. of them: whole latent frames"),
        (frames[:0], "are 0"),
    ]
    for given, told in wrong:
        with pytest.raises(InputError, match=told):
            encoder.encode(given)
    encoder.encode(frames[:1])
    with pytest.raises(InputError, match=r"are 1; expected 4, 8, \.\.\. of them"):
        encoder.encode(frames[1:2])
    np.testing.assert_allclose(encoder.encode(frames[1:5]), by_diffusers(kind, frames)[:, :, 1:2], atol=1e-4)


def test_cropped_frames_go_on_with_their_last_column_and_row(kind: str, backend: str) -> None:
    bundle, lane = lane_on(Bundle.open(encoding_bundle(kind, "torch", CROPPED[kind])), "torch")
    width, height = bundle.plan.geometry.shown
    frames = clip(kind, 5)[:, :height, :width]
    whole = bundle.plan.geometry
    padded = np.pad(
        frames, ((0, 0), (0, whole.height - height), (0, whole.width - width), (0, 0)), mode="edge"
    )
    made = encoder_of(lane, bundle.manifest.graphs, bundle.plan).encode(frames)
    lane.close()
    assert padded.shape[1:3] == (whole.height, whole.width) != (height, width)
    np.testing.assert_allclose(made, by_diffusers(kind, padded), rtol=0, atol=1e-4)


def test_a_bundle_says_what_its_encoder_takes(kind: str) -> None:
    bundle = Bundle.open(encoding_bundle(kind))
    manifest = bundle.manifest
    assert manifest.graph_names == ["prompt", "step", "decode", "encode"]
    assert manifest.verification["encode"] < 1e-4
    encode, decode = manifest.graphs["encode"], manifest.graphs["decode"]
    assert encode.weights == "encoder.safetensors" != decode.weights
    geometry = bundle.plan.geometry
    assert encode.inputs["frames"].shape == (4, geometry.height, geometry.width, 3)
    assert encode.outputs["latents"].shape == (1, 4, 1, geometry.latent_height, geometry.latent_width)
    parts = footprint(manifest, bundle.plan)
    carried = WanVaeEncoder(small_vae(CONFIGS[kind])).state_shapes(
        geometry.latent_height, geometry.latent_width
    )
    assert parts["encoder_caches"] == 2 * 4 * sum(int(np.prod(shape)) for shape in carried.values())
    assert encode.weight_bytes
    assert encode.activation_bytes
    assert parts["weights"] == sum(graph.weight_bytes or 0 for graph in manifest.graphs.values())
    assert parts["activations"] >= encode.activation_bytes


def test_torch_runs_a_bundle_without_graphs_that_has_an_encoder(kind: str) -> None:
    bundle, lane = lane_on(Bundle.open(encoding_bundle(kind, "torch")), "torch")
    assert bundle.manifest.graphs["encode"].file is None
    made = encoder_of(lane, bundle.manifest.graphs, bundle.plan).encode(clip(kind))
    lane.close()
    np.testing.assert_allclose(made, by_diffusers(kind, clip(kind)), rtol=0, atol=1e-4)


@needs_rtx
@pytest.mark.slow
@pytest.mark.long
def test_engines_build_of_both_graphs_with_caches(kind: str) -> None:
    manifest = Bundle.open(encoding_bundle(kind, "tensorrt-rtx")).manifest
    assert [engine.graph for engine in manifest.engines] == ["prompt", "step", "decode", "encode"]
    assert manifest.compute == "bfloat16"
    assert manifest.graphs["encode"].inputs["feature.0"].dtype == "bfloat16"
    needs = {engine.graph: engine.activation_bytes for engine in manifest.engines}
    plan = Bundle.open(encoding_bundle(kind, "tensorrt-rtx")).plan
    parts = footprint(manifest, plan, manifest.engines)
    beside = max(needs["decode"], needs["encode"])
    assert parts["activations"] == max(needs["prompt"], needs["step"]) + beside
    assert min(needs["decode"], needs["encode"]) > 0


def test_a_bundle_without_an_encoder_says_how_to_have_one() -> None:
    spec = spec_with("wan-vae")
    plan = build_plan(spec, spec.geometry(), load_policy("full"))
    with pytest.raises(InputError, match=r"has no encoder.*Export it again with --encoder"):
        encoder_of(None, {}, plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [None, "10x6"])
def test_latents_that_are_pixels_need_no_graph(channels: int, resolution: str | None) -> None:
    spec = small_spec(latent_channels=channels)
    geometry = spec.geometry(resolution)
    plan = build_plan(spec, geometry, load_policy("full"))
    encoder = encoder_of(None, {}, plan)  # type: ignore[arg-type]
    assert isinstance(encoder, PixelEncoder)
    width, height = geometry.shown
    shape = 4, height, width, channels
    frames = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    frames = np.broadcast_to(frames, (*shape[:3], 3))
    latents = np.concatenate([encoder.encode(frames[:1]), encoder.encode(frames[1:])], 2)
    assert (latents.dtype, latents.shape) == (np.float32, (1, channels, 4, geometry.height, geometry.width))
    assert np.abs(latents).max() <= 1 + 1e-6
    assert np.array_equal(frames_of(torch.from_numpy(latents), geometry).numpy(), frames)


def test_a_colour_picture_becomes_grey_as_it_is_seen() -> None:
    spec = small_spec(latent_channels=1)
    geometry = spec.geometry()
    frames = np.zeros((1, geometry.height, geometry.width, 3), np.uint8)
    frames[..., 1] = 255
    found = PixelEncoder(build_plan(spec, geometry, load_policy("full"))).encode(frames)
    np.testing.assert_allclose(found, 2 * 0.587 - 1, atol=1e-6)


def test_an_encoder_for_latents_that_are_pixels_is_a_mistake(tmp_path: Path) -> None:
    from forcingkv.export import export_bundle

    spec = small_spec()
    with pytest.raises(ValueError, match="the latents of small are pixels, and an encoder was given"):
        export_bundle(
            spec,
            random_model(spec).state_dict(),
            load_policy("full"),
            tmp_path / "b",
            encoder=WanVaeEncoder(small_vae()),
        )
