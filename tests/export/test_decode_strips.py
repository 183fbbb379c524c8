"""Bundles that decode a frame strip by strip: the frames, states and memory of sessions on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.graph_records import STRIP, check_records
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.preflight import bytes_of_other
from forcingkv.runtime.strip_decoder import StripDecoder
from tests.conftest import Ran, random_model
from tests.export.test_decode import spec_with
from tests.export.test_engine_builds import needs_rtx
from tests.exported import shared_bundle
from tests.models.test_decoders import small_taehv, small_vae
from tests.runtime.engine_world import World
from tests.runtime.lanes import OwnState
from tests.runtime.test_footprint import CountingLane
from tests.runtime.videos import open_with

pytest.importorskip("diffusers")

from forcingkv.models.decoders import wan_vae
from forcingkv.models.decoders.wan_vae import WanVaeDecoder

CHUNKS = 3
SIZE = "46x62"
"""Computed at 48x64."""
BACKENDS = ["onnxruntime", "torch"]
QUICKER = ["onnxruntime", pytest.param("torch", marks=pytest.mark.long)]
Video = tuple[npt.NDArray[Any], npt.NDArray[Any]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend torch makes a decoder of the real width, whatever the weights are of."""
    monkeypatch.setattr(wan_vae, "AutoencoderKLWan", small_vae)


def bundle_of(count: int, **options: Any) -> Path:
    spec = spec_with("wan-vae")
    weights, decoder = random_model(spec).state_dict(), WanVaeDecoder(small_vae())
    policy = load_policy("window")
    return shared_bundle(spec, weights, policy, decoder=decoder, strips=count, resolution=SIZE, **options)


def video_of(session: Session, seed: int = 3) -> Video:
    chunks = list(session.generate("a b c", seed=seed, chunks=CHUNKS))
    assert [chunk.frames.shape for chunk in chunks] == [(n, 62, 46, 3) for n in (9, 12, 12)]
    return np.concatenate([c.frames for c in chunks]), np.concatenate([c.latents for c in chunks], 2)


@cache
def video(folder: Path, backend: str) -> Video:
    """Made once: nothing changes it."""
    with Session.open(folder, backend=backend, threads=1) as session:
        return video_of(session)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.long)])
def test_frames_are_those_of_whole_frames(count: int, backend: str) -> None:
    whole, latents = video(bundle_of(1), backend)
    strips, same = video(bundle_of(count), backend)
    np.testing.assert_array_equal(latents, same)
    difference = np.abs(whole.astype(int) - strips)
    assert difference.max() <= 1, "rounded the other way at most"
    assert (difference > 0).mean() < 1e-4


@pytest.mark.parametrize("backend", QUICKER)
def test_a_new_video_and_a_sibling_begin_with_empty_caches(backend: str) -> None:
    with Session.open(bundle_of(2), backend=backend, threads=1) as session:
        first, _ = video_of(session)
        video_of(session, seed=4)
        again, _ = video_of(session)
        with session.sibling() as other:
            beside, _ = video_of(other)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, beside)


@pytest.mark.parametrize("backend", QUICKER)
def test_a_saved_video_goes_on_to_the_bit(backend: str, tmp_path: Path) -> None:
    with Session.open(bundle_of(2), backend=backend, threads=1) as session:
        begun = session.generate("a b c", seed=3, chunks=CHUNKS)
        next(begun)
        begun.save(tmp_path / "state")
        rest = [chunk.frames for chunk in begun]
        video_of(session, seed=5)  # other caches meanwhile
        going_on = [chunk.frames for chunk in session.restore(tmp_path / "state")]
    assert len(rest) == len(going_on) == CHUNKS - 1
    for one, other in zip(rest, going_on, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engines_run_the_strips_on_memory_of_their_own(
    cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fakes refuse an engine that reads what it writes, addresses that are not aligned, and two passes on
    a captured context."""
    folder = bundle_of(2)
    expected, _ = video(folder, "onnxruntime")
    world = World(folder, monkeypatch)
    with Session.open(
        world.bundle, backend="tensorrt-rtx", cuda_graphs=cuda_graphs, preflight=False
    ) as session:
        for _ in range(2):
            found, _ = video_of(session)
            np.testing.assert_array_equal(found, expected)
        decoder = session._memory().decoder._strips
        assert decoder is not None
        assert len(decoder._passes) == 3, "a frame's, and one a strip"
    assert world.left == {}


@needs_rtx
@pytest.mark.slow
@pytest.mark.long
def test_engines_of_both_parts_are_built_and_counted(run: Callable[..., Ran]) -> None:
    folder = bundle_of(2, target="tensorrt-rtx", sms=(89,))
    opened = Bundle.open(folder)
    manifest, plan = opened.manifest, opened.plan
    needs = {engine.graph: engine.activation_bytes for engine in manifest.engines}
    assert [*needs] == ["prompt", "step", "decode", STRIP]
    assert {record.dtype for record in manifest.graphs[STRIP].carried.values()} == {"bfloat16"}
    assert set(manifest.graphs[STRIP].outputs) & {"frames", "pixels"} == {"frames"}
    parts = footprint(manifest, plan, manifest.engines)
    step, decoding = max(needs["prompt"], needs["step"]), max(needs["decode"], needs[STRIP])
    assert parts["activations"] == step + decoding
    assert "decode_strip" in run("inspect", str(folder)).out


def test_a_session_takes_what_is_said() -> None:
    opened = Bundle.open(bundle_of(6))
    lane, manifest = CountingLane({}), opened.manifest
    parts = footprint(manifest, opened.plan)
    latents = lane.tensor(manifest.graphs["decode"].inputs["latents"].shape, "float32")
    taken = lane.taken
    decoder = StripDecoder(lane, manifest, latents)
    shown = manifest.graphs[STRIP].outputs["frames"].shape
    numbers = 4 + 4 * 6  # the inputs `first`, and `top` of each strip
    assert lane.taken - taken == parts["decoder_caches"] + int(np.prod(shown)) + numbers
    assert [*decoder.held(0)] == ["whole", *(f"strip.{number}" for number in range(6))]
    on_torch = opened.computing_in("float32")
    in_place = footprint(on_torch.manifest, on_torch.plan)["decoder_caches"]
    assert in_place < parts["decoder_caches"], "nothing is made beside"


def test_strips_that_do_not_cover_a_frame_are_refused() -> None:
    opened = Bundle.open(bundle_of(6))
    manifest, plan = opened.manifest, opened.plan
    strips = manifest.strips
    assert strips is not None

    def check(changed: Strips | None, **graphs: Any) -> None:
        check_records({**manifest.graphs, **graphs}, plan, "float32", "here", changed)

    check(strips)
    for changed in ({"count": strips.count - 1}, {"lag": 1000}, {"rows": strips.rows + 1}, {"scale": 8}):
        with pytest.raises(InputError, match=r"strips that cover the 64 rows|which follows from"):
            check(replace(strips, **changed))
    with pytest.raises(InputError, match="says nothing of the strips"):
        check(None)
    with pytest.raises(InputError, match="count"):
        replace(strips, count=1)
    record = manifest.graphs[STRIP]
    short = {name: tensor for name, tensor in record.inputs.items() if name != "top"}
    with pytest.raises(InputError, match="its decode_strip graph has no input top"):
        check(strips, **{STRIP: replace(record, inputs=short)})


def test_a_decoder_in_one_part_has_no_strips() -> None:
    spec = spec_with("taehv")
    with pytest.raises(InputError, match="--decode-strips is 2, and this decoder decodes frames as a whole"):
        shared_bundle(
            spec, random_model(spec).state_dict(), load_policy("window"), decoder=small_taehv(), strips=2
        )


def test_inspect_says_in_how_many_strips(run: Callable[..., Ran]) -> None:
    text = " ".join(run("inspect", str(bundle_of(6))).out.split())
    assert "decoding each frame in 6 strips of 16 rows" in text
    assert "of each strip one buffer, and one that all share" in text


def test_a_smaller_size_is_suggested_as_what_is_decoded_as_a_whole() -> None:
    """Frames of 480p are: their caches and activations are not those of strips, scaled."""
    strips, whole = Bundle.open(bundle_of(6)), Bundle.open(bundle_of(1))
    parts, expected = (footprint(one.manifest, one.plan) for one in (strips, whole))
    wanted = sum(expected[name] for name in ("decoder_caches", "activations"))
    others = {name: parts[name] for name in ("decoder_caches", "activations")}
    found = bytes_of_other(strips, others, load_policy("window"), SIZE)
    assert found == pytest.approx(wanted, rel=0.1)
    assert sum(others.values()) < 0.9 * wanted


def test_strips_in_memory_of_a_provider_s_own_device(tmp_path: Path) -> None:
    """The way that the CUDA provider takes, on a CPU; a state goes from one to the other."""
    own, _ = open_with(bundle_of(2), OwnState)
    with own, Session.open(bundle_of(2), threads=1) as plain:
        np.testing.assert_array_equal(video_of(own)[0], video_of(plain)[0])
        decoder = own._memory().decoder._strips
        assert decoder is not None
        assert (decoder._made, len(decoder._states)) == (None, 3)
        begun = own.generate("a b c", seed=3, chunks=CHUNKS)
        next(begun)
        begun.save(tmp_path / "state")
        for one, other in zip(begun, plain.restore(tmp_path / "state"), strict=True):
            np.testing.assert_array_equal(one.frames, other.frames)
