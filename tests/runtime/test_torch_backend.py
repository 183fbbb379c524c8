"""The backend torch: its videos against ONNX Runtime's and the model's own, its cache, dtypes and weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forcingkv.headmaps import InputError
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.backends.torch_cache import JoinedCache
from forcingkv.runtime.backends.torch_device import multiplies_in
from forcingkv.runtime.backends.torch_model import StoredLinear
from forcingkv.runtime.faults import DeviceError
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.snapshot import read_snapshot
from forcingkv.runtime.text import encode_words
from tests.conftest import choosing, headmap_of, random_model, small_spec
from tests.exported import shared_bundle
from tests.runtime.conftest import small_bundle
from tests.runtime.lanes import ONNX, TORCH
from tests.runtime.videos import BUNDLES, OTHER, POLICIES, PROMPT, assert_same, video_of

Bundles = Callable[[str], Path]
CPU = torch.device("cpu")


def kv_of(session: Session) -> dict[str, np.ndarray]:
    """What the cache holds, by entry."""
    maker = session._memory()
    return {name: tensor.fetch(maker.lane.main).array() for name, tensor in maker.cache.held().items()}


@pytest.mark.parametrize("name", BUNDLES)
def test_its_videos_and_caches_are_those_of_onnx_runtime(bundles: Bundles, name: str) -> None:
    """Every policy, all phases, with a switch of the prompt that rebuilds the cache."""
    with ONNX.open(bundles(name)) as one, TORCH.open(bundles(name)) as other:
        pair = [session.generate(PROMPT, seed=7, chunks=9) for session in (one, other)]
        for index in range(9):
            if index == 7:
                assert [video.switch(OTHER) for video in pair] == [7, 7]
            wanted, found = (next(video) for video in pair)
            np.testing.assert_allclose(found.latents, wanted.latents, rtol=0, atol=1e-4)
            assert np.abs(found.frames.astype(int) - wanted.frames).max() <= 1
            held, again = kv_of(one), kv_of(other)
            assert held.keys() == again.keys()
            for entry, kept in held.items():
                np.testing.assert_allclose(again[entry], kept, rtol=0, atol=1e-4, err_msg=entry)


@pytest.mark.parametrize("name", POLICIES)
def test_a_single_pass_is_that_of_onnx_runtime(bundles: Bundles, name: str) -> None:
    """The first denoising pass of a chunk on the very same cache: what ONNX Runtime saved."""
    with ONNX.open(bundles(name)) as one, TORCH.open(bundles(name)) as other:
        list(islice(one.generate(PROMPT, seed=7), 6))
        list(islice(other.generate(PROMPT, seed=7), 6))
        state, passed = one._memory().state(), []
        arrays = {key: tensor.fetch(one._memory().queue_of(key)).array() for key, tensor in state.items()}
        other._memory().restore(6, 6, arrays)
        for session in (one, other):
            maker = session._memory()
            maker._write_positions(6)
            maker._latents[0].write(
                np.random.default_rng(0).standard_normal(maker.latent_shape, np.float32), maker.lane.main
            )
            maker._denoise(0, maker.levels(6)[0], {})
            passed.append(maker._latents[1].fetch(maker.lane.main).array())
        np.testing.assert_allclose(passed[1], passed[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["forcing-kv", "taehv"])
def test_a_bundle_without_graphs_makes_the_same_video_to_the_bit(bundles: Bundles, name: str) -> None:
    lean = small_bundle(name, "torch")
    assert not [*lean.glob("*.onnx")]
    opened = Bundle.open(lean)
    assert not opened.manifest.has_graphs
    with TORCH.open(bundles(name)) as whole, Session.open(lean) as session:
        assert "(torch)" in session.runs_on, "chosen, since nothing else can"
        assert_same(video_of(session), video_of(whole))
        made = footprint(session.bundle.manifest, session.plan)
        assert made == footprint(opened.manifest, opened.plan), "as if it had been asked of the bundle"
    for backend in ("onnxruntime", "onnxruntime-cpu"):
        with pytest.raises(InputError, match="has no graphs"):
            Session.open(lean, backend=backend)


@pytest.mark.parametrize(
    "changes", [{"choose": "random", "seed": 3}, {"shared": False}, {"choose": "uniform"}]
)
def test_choices_that_graphs_cannot_make(changes: dict[str, Any]) -> None:
    spec = small_spec(layers=2)
    policy, headmap = choosing(load_policy("forcing-kv"), **changes), headmap_of(spec, [[0], [1]])
    model = random_model(spec)
    lean = shared_bundle(spec, model.state_dict(), policy, headmap=headmap, target="torch")
    plan = Bundle.open(lean).plan
    baked = shared_bundle(
        spec, model.state_dict(), load_policy("forcing-kv"), headmap=headmap, target="torch"
    )
    weights = load_file(Bundle.open(baked).weights("step"))  # type: ignore[arg-type]
    turned = {n: t.t() if t.dim() == 2 and n.endswith("weight") else t for n, t in weights.items()}
    model.load_state_dict(turned)
    text = torch.from_numpy(encode_words(spec, PROMPT))
    wanted = list(generate(model, plan, text, seeded_noise(plan, 7), 7))
    with TORCH.open(lean) as session:
        for chunk, known in zip(video_of(session), wanted, strict=True):
            np.testing.assert_allclose(chunk.latents, known.latents.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.2), ("float16", 0.02)])
def test_smaller_dtypes_are_near_float32(bundles: Bundles, dtype: Any, most: float) -> None:
    """In chunk 0, of latents of deviation 1; later chunks go their own way."""
    with TORCH.open(bundles("forcing-kv")) as exact, TORCH.open(bundles("forcing-kv"), dtype=dtype) as less:
        assert f"in {dtype} (torch)" in less.runs_on
        wanted, found = (next(session.generate(PROMPT, seed=7)) for session in (exact, less))
        assert 0 < np.sqrt(np.mean((wanted.latents - found.latents) ** 2)) < most
        entries = less._memory().cache.held().values()
        assert {tensor.dtype for tensor in entries} == {dtype}
        assert less._memory().cache.nbytes * 2 == exact._memory().cache.nbytes
        assert len(video_of(less)) == 7


def test_a_cpu_without_instructions_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (name, dtype) in enumerate({"bf16": torch.bfloat16, "fp16": torch.float16}.items()):
        for there in (True, False):
            answer = f"_is_mkldnn_{name}_supported"
            monkeypatch.setattr(torch.ops.mkldnn, answer, lambda there=there: there, raising=False)
            assert multiplies_in(CPU, dtype) == (dtype if there else torch.float32), number
        assert multiplies_in(torch.device("cuda", 0), dtype) == dtype
    assert multiplies_in(CPU, torch.float32) == torch.float32


def test_products_are_rounded_to_what_is_computed_in() -> None:
    linear = StoredLinear(7, 5)
    linear.products = torch.float32
    stored = linear.to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = x.float() @ stored.weight.float().t() + stored.bias.float()
    assert torch.equal(stored(x), wanted.bfloat16())


def test_weights_stay_as_they_are_stored() -> None:
    spec = small_spec(layers=2)
    half = {name: tensor.bfloat16() for name, tensor in random_model(spec).state_dict().items()}
    lean = shared_bundle(spec, half, load_policy("full"), target="torch", dtype="bfloat16")
    with Session.open(lean, dtype="float32") as session:
        loaded = session._memory().lane._loaded  # type: ignore[attr-defined]
        linears = [m for m in loaded.model.modules() if isinstance(m, StoredLinear)]
        assert len(linears) > 20
        assert {linear.weight.dtype for linear in linears} == {torch.bfloat16}
        assert {linear.products for linear in linears} == {torch.float32}
        wanted = video_of(session, 2)
    with Session.open(lean) as session:
        assert "in bfloat16" in session.runs_on, "what it was exported for"
    model = random_model(spec)
    model.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    plan = Bundle.open(lean).plan
    text = torch.from_numpy(encode_words(spec, PROMPT))
    for chunk, known in zip(wanted, generate(model, plan, text, seeded_noise(plan, 7), 2), strict=True):
        np.testing.assert_allclose(chunk.latents, known.latents.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layers", [12])
def test_all_layers_are_compiled_once(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """More layers than torch compiles a function anew for. The compiler itself is left out: it takes long."""
    made: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **named: compile_(f, backend=backend, **named))
    spec = small_spec(layers=layers)
    lean = shared_bundle(spec, random_model(spec).state_dict(), load_policy("full"), target="torch")
    torch._dynamo.reset()
    with Session.open(lean) as plain, Session.open(lean, compiled=True) as session:
        wanted, found = video_of(plain, 3), video_of(session, 3)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=1e-4)
    assert len(made) == 2, "what comes before attention, and what comes after it"


def test_a_bundle_computing_in_another_dtype_is_the_same_bundle(bundles: Bundles) -> None:
    bundle = Bundle.open(bundles("taehv"))
    half = bundle.computing_in("bfloat16")
    assert half.digest == bundle.digest
    assert (half.manifest.compute, bundle.manifest.compute) == ("bfloat16", "float32")
    graphs = half.manifest.graphs
    assert {record.file for record in graphs.values()} == {None}
    assert {record.dtype for record in graphs["decode"].carried.values()} == {"bfloat16"}
    assert graphs["step"].inputs["latents"].dtype == "float32"
    assert bundle.computing_in(None).manifest.compute == "float32"


def test_states_go_on_in_their_own_dtype_only(bundles: Bundles, tmp_path: Path) -> None:
    with TORCH.open(bundles("taehv"), dtype="bfloat16") as session:
        video = session.generate(PROMPT, seed=7, chunks=7)
        list(islice(video, 4))
        video.save(tmp_path)
        wanted = list(video)
        assert_same(session.restore(tmp_path), wanted)
    assert read_snapshot(tmp_path, session.bundle)[0].compute == "bfloat16"
    for backend in (TORCH, ONNX):
        with (
            backend.open(bundles("taehv")) as other,
            pytest.raises(InputError, match=r"computed in bfloat16; expected float32.*--dtype bfloat16"),
        ):
            other.restore(tmp_path)


@pytest.mark.parametrize(("first", "second"), [(ONNX, TORCH), (TORCH, ONNX)])
def test_a_state_of_the_other_backend_goes_on(
    bundles: Bundles, tmp_path: Path, first: Any, second: Any
) -> None:
    with first.open(bundles("taehv")) as one, second.open(bundles("taehv")) as other:
        video = one.generate(PROMPT, seed=7, chunks=8)
        list(islice(video, 5))
        video.save(tmp_path)
        for found, wanted in zip(other.restore(tmp_path), video, strict=True):
            np.testing.assert_allclose(found.latents, wanted.latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BUNDLES)
def test_the_cache_has_the_bytes_that_are_said(bundles: Bundles, name: str) -> None:
    with TORCH.open(bundles(name)) as session:
        cache = session._memory().cache
        assert isinstance(cache, JoinedCache)
        parts = footprint(session.bundle.manifest, session.plan)
        assert cache.nbytes == sum(size for part, size in parts.items() if part.startswith("kv_"))


def test_a_role_that_makes_another_number_of_tokens_is_told(bundles: Bundles) -> None:
    with TORCH.open(bundles("full")) as session:
        cache: Any = session._memory().cache
        group = cache._groups[0][0]
        made = {name: type(kv)(*(part[:, :, :1] for part in kv)) for name, kv in group.cached(1).items()}
        with pytest.raises(ValueError, match=r"the role \w+ made keys and values .*; by its length"):
            group.take(made, 1)


def test_a_closed_lane_says_so_and_frames_that_were_shared_stay(bundles: Bundles) -> None:
    session = TORCH.open(bundles("taehv"), frames="device")
    lane = session._memory().lane
    chunk = next(session.generate(PROMPT, seed=7))
    assert isinstance(chunk.frames, torch.Tensor)
    before = chunk.frames.clone()
    session.close()
    assert torch.equal(chunk.frames, before)
    np.testing.assert_array_equal(np.from_dlpack(chunk.frames), before.numpy())
    for doing in (lambda: lane.bind("prompt", 0, {}, {}), lane.sibling, lambda: lane.tensor((1,), "uint8")):
        with pytest.raises(DeviceError, match="the lane is closed"):
            doing()
    lane.close()
