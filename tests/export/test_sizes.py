"""Sizes that people ask for: any that fills tokens, under every policy, and cropped to what was asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from forcingkv.export import export_bundle
from forcingkv.headmaps import HeadMap, InputError
from forcingkv.models.checkpoint import build_model
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.heads import head_orders, permute_heads
from forcingkv.prune.onnx_operators import graphs
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import Decoder, ModelSpec, Schedule
from forcingkv.runtime.text import encode_words
from tests.conftest import Ran, headmap_of, random_model, small_spec
from tests.exported import shared_bundle

PROMPT = "b a d"

# Pixels of public models, and the tokens of a frame: 16 pixels each way make one.
ASKED = {
    "448x256": (16, 28),
    "640x352": (22, 40),
    "512x512": (32, 32),
    "640x640": (40, 40),
    "1280x704": (44, 80),
    "1024x1024": (64, 64),
}
HEAVY = ("640x352", "512x512", "640x640", "1280x704")
MARKS = {size: [pytest.mark.slow, pytest.mark.long] for size in HEAVY}
MADE = ("448x256", *HEAVY)
"""Of those the ones that are exported here."""


def thin(
    rows: int, columns: int, layers: int = 3, frames: int = 2
) -> tuple[ModelSpec, Mapping[str, Tensor], HeadMap]:
    """A model as thin as can be, whose frames have so many tokens; layers 1 and 2 retain segments."""
    sizes = {"layers": layers, "heads": 2, "head_dim": 8, "ffn_width": 16, "text_width": 8, "text_length": 3}
    sizes |= {"width": 2 * columns, "height": 2 * rows, "frames_per_chunk": frames}
    sizes["attended_frames"] = 4 * frames
    spec = small_spec(schedule=Schedule((1000.0,)), ar_start=0, **sizes)
    return spec, random_model(spec).state_dict(), headmap_of(spec, [[0], [0], [1]][:layers])


def largest_difference(
    spec: ModelSpec, weights: Mapping[str, Tensor], headmap: HeadMap, bundle: Path, chunks: int
) -> float:
    """Of the latents of the last chunk, between ONNX Runtime and torch."""
    policy = load_policy("forcing-kv")
    model = build_model(spec, permute_heads(weights, spec, head_orders(spec, policy, headmap)))
    text = torch.from_numpy(encode_words(spec, PROMPT))
    with Session.open(bundle) as session:
        *_, last = session.generate(PROMPT, seed=3, chunks=chunks)
        assert last.frames.shape[1:] == (*reversed(session.bundle.manifest.frame_size), 3)
        *_, wanted = generate(model, session.plan, text, seeded_noise(session.plan, 3), chunks)
    return float(np.abs(last.latents - wanted.latents.numpy()).max())


@pytest.mark.parametrize("size", [pytest.param(size, marks=MARKS.get(size, ())) for size in MADE])
def test_sizes_whose_tokens_six_does_not_divide_are_exported_and_generated(size: str, tmp_path: Path) -> None:
    rows, columns = ASKED[size]
    assert rows * columns % 6, "or nothing here is uneven"
    frames = 1 if size in HEAVY else 2  # a chunk; segments are of a frame
    spec, weights, headmap = thin(rows, columns, 2 if size in HEAVY else 3, frames)
    # Where it takes seconds, the video below compares the graph with torch in every phase.
    options = {"headmap": headmap, "verify": size not in HEAVY}
    made = export_bundle(spec, weights, load_policy("forcing-kv"), tmp_path / "b", **options)  # type: ignore[arg-type]
    assert set(made.verification) == (set() if size in HEAVY else {"prompt", "step", "decode"})
    assert max(made.verification.values(), default=0) <= 1e-5
    step = onnx.load(tmp_path / "b" / "step.onnx", load_external_data=False)
    kinds = [node.op_type for graph in graphs(step) for node in graph.node if node.domain == "forcingkv"]
    assert kinds == ["UnevenPrune", "UnevenPruneFollow"][: spec.layers - 1]
    retained = rows * columns // 6 * 2 * frames  # two segments of each frame
    assert made.plan.phases[-1]["dynamic.retained"] == retained
    # Chunk 2 is the first that sees segments, chunk 3 sees some that were chosen among chosen ones.
    chunks = 3 if size in HEAVY else 4
    assert largest_difference(spec, weights, headmap, tmp_path / "b", chunks) <= 1e-3


@pytest.mark.parametrize("resolution", [*ASKED, "832x480", "640x360", "674x388", "1920x1080"])
def test_all_default_policies_of_bench_and_plan_take_the_same_sizes(
    resolution: str, run: Callable[..., Ran]
) -> None:
    words = ("--model", "self-forcing", "--gpu", "h200", "--resolution", resolution, "--json")
    ran = run("plan", *words)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["left_out"] == {}
    assert {"full", "window", "forcing-kv"} <= {row["policy"] for row in report["policies"]}


def test_fewer_tokens_than_segments_are_refused_with_how_many_would_do() -> None:
    spec, weights, headmap = thin(1, 5)
    with pytest.raises(InputError, match=r"6 segments are asked of the 5 tokens .* expected 1 to 5"):
        export_bundle(spec, weights, load_policy("forcing-kv"), Path("nowhere"), headmap=headmap)


def coarse() -> tuple[ModelSpec, Mapping[str, Tensor], HeadMap]:
    """Tokens of 4x4 pixels."""
    spec = replace(small_spec(layers=1, patch=4), width=16, height=12)
    return spec, random_model(spec).state_dict(), headmap_of(spec, [[0]])


@pytest.fixture(scope="module")
def bundles() -> tuple[Path, Path]:
    """At 16x12, and at 14x10, which is computed as 16x12."""
    spec, weights, headmap = coarse()
    policy = load_policy("forcing-kv")
    return (
        shared_bundle(spec, weights, policy, headmap=headmap),
        shared_bundle(spec, weights, policy, headmap=headmap, resolution="14 x 10"),
    )


def test_frames_are_cropped_to_the_size_that_was_asked_for(bundles: tuple[Path, Path]) -> None:
    """The same video, without its last columns and rows; latents and caches are the same."""
    whole, cropped = (Bundle.open(path).manifest for path in bundles)
    assert (whole.resolution, whole.crop, whole.frame_size) == ((16, 12), None, (16, 12))
    assert (cropped.resolution, cropped.crop, cropped.frame_size) == ((16, 12), (14, 10), (14, 10))
    assert (bundles[0] / "step.onnx").read_bytes() == (bundles[1] / "step.onnx").read_bytes()
    assert "crop" not in json.loads((bundles[0] / "manifest.json").read_text())
    with Session.open(bundles[0]) as one, Session.open(bundles[1]) as other:
        for chunk, cut in zip(*(s.generate(PROMPT, seed=1, chunks=2) for s in (one, other)), strict=True):
            np.testing.assert_array_equal(chunk.latents, cut.latents)
            np.testing.assert_array_equal(chunk.frames[:, :10, :14], cut.frames)


def test_every_way_out_has_the_size_that_was_asked_for(
    bundles: tuple[Path, Path], tmp_path: Path, run: Callable[..., Ran]
) -> None:
    import av
    from PIL import Image

    words = ("generate", "--bundle", bundles[1], "--prompt", PROMPT, "--seconds", "0.1")
    for out in ("video.mp4", "frames", "video.rgb"):
        ran = run(*words, "--out", tmp_path / out)
        assert ran.code == 0, ran.err
    with av.open(str(tmp_path / "video.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height) == (14, 10)
    frames = []
    for path in sorted((tmp_path / "frames").glob("*.png")):
        with Image.open(path) as picture:
            frames.append(np.asarray(picture))
    raw = np.fromfile(tmp_path / "video.rgb", np.uint8)
    np.testing.assert_array_equal(raw.reshape(-1, 10, 14, 3), np.stack(frames))

    piped = [sys.executable, "-m", "forcingkv", *map(str, words), "--out", "-"]
    done = subprocess.run(piped, capture_output=True, check=True)
    assert np.frombuffer(done.stdout, np.uint8).tobytes() == raw.tobytes()
    assert b"rgb24, 14x10, 16 frames a second" in done.stderr


def test_what_is_computed_and_what_is_shown_is_said(
    bundles: tuple[Path, Path], run: Callable[..., Ran]
) -> None:
    shown = run("inspect", bundles[1])
    assert "14x10 (computed at 16x12, cropped): 12 tokens a frame" in shown.out
    assert "16x12: 12 tokens a frame" in run("inspect", bundles[0]).out
    planned = run("plan", "--model", "self-forcing", "--gpu", "h200", "--resolution", "1920x1080")
    assert "self-forcing at 1920x1080 (computed at 1920x1088, cropped): 8,160 tokens" in planned.out


def test_a_manifest_that_says_another_size_than_its_frames_is_refused(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    changes: list[dict[str, object]] = [
        {"crop": [14, 12]},
        {"crop": None},
        {"crop": None, "resolution": [14, 10]},
    ]
    for change in changes:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(bundles[1], folder)
        data = json.loads((bundles[1] / "manifest.json").read_text()) | change
        (folder / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match="not of the size that it says"):
            Bundle.open(folder)


def test_latents_of_a_cropped_size_are_those_of_the_size_computed() -> None:
    """With a stride: a token of the public models is 16x16 pixels."""
    spec = small_spec(decoder=Decoder("taehv", 8, 4), width=832, height=480, latent_channels=16)
    geometry = spec.geometry("640x360")
    assert (geometry.width, geometry.height, geometry.shown) == (640, 368, (640, 360))
    assert (geometry.latent_width, geometry.latent_height, geometry.grid) == (80, 46, (23, 40))
    assert spec.geometry(geometry.name) == geometry
