"""Switches that encode newest frames anew on ONNX Runtime: the graph `recache`, and what it is counted as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, Chunk, Session
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from forcingkv.runtime.footprint import encoder_bytes, footprint
from forcingkv.runtime.graph_records import UNFOLDED, recache_layouts
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.rebuild import encoding, encoding_shapes, encodings
from forcingkv.runtime.preflight import bytes_of_other, needed_memory
from forcingkv.runtime.spec import ENCODED, Recache
from tests.runtime.lanes import ONNX, TORCH, On
from tests.runtime.test_recache import plans
from tests.runtime.videos import OTHER, PROMPT, assert_same

Bundles = Callable[[str], Path]
LONG = pytest.mark.long
SWITCHING = ("switching", "longlive")
"""Bundles with the graph: of heads that differ, and of LongLive's kind."""


def switched(session: Session, at: int, how: Recache | None, chunks: int) -> list[Chunk]:
    """A video whose prompt is switched, then switched back two chunks later."""
    video = session.generate(PROMPT, seed=7, chunks=chunks)
    video.switch(OTHER, recache=how, at=at)
    video.switch(PROMPT, recache=how, at=at + 2)
    return list(video)


@pytest.mark.parametrize(
    ("name", "at", "how"),
    [
        ("switching", 4, "keep-sink"),
        ("switching", 4, "empty-sink"),
        pytest.param("longlive", 2, "keep-sink", marks=LONG),
        ("longlive", 5, "keep-sink"),
        ("longlive", 5, "empty-sink"),
        *(pytest.param("switching", at, how, marks=LONG) for at in (1, 2) for how in ENCODED),
        *(pytest.param("longlive", at, how, marks=LONG) for at in (1, 3) for how in ENCODED),
    ],
)
def test_a_switch_is_that_of_torch(bundles: Bundles, name: str, at: int, how: Recache) -> None:
    """Before the cache is full and after, twice, whether the sink stays or is made anew."""
    made = []
    for on in (ONNX, TORCH):
        with on.open(bundles(name)) as session:
            made.append(switched(session, at, how, at + 4))
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", SWITCHING)
def test_it_is_the_way_of_the_model_where_nothing_is_said(bundles: Bundles, name: str) -> None:
    with ONNX.open(bundles(name)) as session:
        assert_same(switched(session, 3, None, 6), switched(session, 3, "keep-sink", 6))
        found, replayed = switched(session, 3, None, 6), switched(session, 3, "replay", 6)
        assert np.abs(found[3].latents - replayed[3].latents).max() > 3e-4


@pytest.mark.parametrize("how", ENCODED)
@pytest.mark.parametrize("name", SWITCHING)
def test_a_state_just_after_a_switch_goes_on_to_the_bit(
    bundles: Bundles, name: str, how: Recache, tmp_path: Path
) -> None:
    """With `empty-sink` and heads that differ the cache is hollow then: it holds the sink alone."""
    with ONNX.open(bundles(name)) as session:
        video = session.generate(PROMPT, seed=7, chunks=8)
        list(islice(video, 5))
        video.switch(OTHER, recache=how)
        assert session._memory().cache.hollow == (name == "switching" and how == "empty-sink")
        video.save(tmp_path)
        wanted = list(video)
        assert_same(session.restore(tmp_path), wanted)
    with TORCH.open(bundles(name)) as session:
        for one, other in zip(session.restore(tmp_path), wanted, strict=True):
            np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=3e-5)


def test_a_state_of_torch_goes_on(bundles: Bundles, tmp_path: Path) -> None:
    """Hollow, and with a fade and a switch still to come."""
    with TORCH.open(bundles("switching")) as session:
        video = session.generate(PROMPT, seed=7, chunks=10)
        list(islice(video, 4))
        video.switch(OTHER, recache="empty-sink", fade=2)
        video.switch(PROMPT, recache="keep-sink", at=8)
        video.save(tmp_path)
        wanted = list(video)
    with ONNX.open(bundles("switching")) as session:
        for one, other in zip(session.restore(tmp_path), wanted, strict=True):
            np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=3e-5)


@given(plans(), st.integers(1, 40), st.booleans())
def test_every_pass_is_among_those_that_are_known(plan: CachePlan, made: int, keep_sink: bool) -> None:
    """So memory, operations and records of the graph are those of whatever is asked for."""
    try:
        one = encoding(plan, made, keep_sink=keep_sink)
    except InputError:
        return
    known = encodings(plan)
    assert not one.frames or one.anywhere in known
    if one.frames:
        inputs, _ = recache_layouts(plan, "float32")
        varying = {name for name, layout in inputs.items() if any(isinstance(n, str) for n in layout.shape)}
        shapes = encoding_shapes(plan, one)
        assert varying <= set(shapes) <= set(inputs)
        for name, shape in shapes.items():
            fixed = zip(shape, inputs[name].shape, strict=True)
            assert all(size == wanted for size, wanted in fixed if isinstance(wanted, int)), name


def without_graph(path: Path) -> Bundle:
    """A bundle as those of earlier versions."""
    bundle = Bundle.open(path)
    graphs = {name: record for name, record in bundle.manifest.graphs.items() if name != "recache"}
    return Bundle(bundle.path, replace(bundle.manifest, graphs=graphs), bundle.headmap)


def test_a_bundle_without_the_graph_goes_on_with_replays(bundles: Bundles) -> None:
    bundle = without_graph(bundles("longlive"))
    with ONNX.open(bundle) as session, ONNX.open(bundles("longlive")) as other:
        video = session.generate(PROMPT, seed=7, chunks=5)
        for how in (None, *ENCODED):
            with pytest.raises(InputError, match="for which this session has no graph") as raised:
                video.switch(OTHER, recache=how, at=3)
            assert "--recache-graph" in str(raised.value)
            assert "--recache replay" in str(raised.value)
        assert_same(switched(session, 3, "replay", 6), switched(other, 3, "replay", 6))


def test_its_memory_is_counted_and_taken_when_a_session_opens(bundles: Bundles) -> None:
    opened = Bundle.open(bundles("longlive"))
    records, plan = opened.manifest.graphs, opened.plan
    parts = footprint(opened.manifest, plan)
    beyond = records["recache"].activation_bytes - parts["activations"]  # type: ignore[operator]
    assert beyond > 0, "more frames than a chunk has"
    assert parts["recache"] == encoder_bytes(plan) + beyond
    assert parts["weights"] == sum(records[name].weight_bytes or 0 for name in records if name != "recache")
    bare = without_graph(bundles("longlive"))
    assert footprint(bare.manifest, plan) == {name: n for name, n in parts.items() if name != "recache"}
    for on in (ONNX, TORCH):
        held = taken_by(on, bundles("longlive"))
        assert held["recache"] - held["without"] == encoder_bytes(plan)


def taken_by(on: On, path: Path) -> dict[str, int]:
    """Bytes of all tensors that a session takes of its lane when it opens, with the pass and without."""
    found = {}
    for name in ("recache", "without"):
        sizes: list[int] = []

        class Counting:
            def tensor(self, shape: tuple[int, ...], dtype: str, **options: bool) -> object:
                made = super().tensor(shape, dtype, **options)  # type: ignore[misc]
                sizes.append(made.nbytes)  # noqa: B023
                return made

        bundle = on.of(Bundle.open(path))
        lane = on.first(bundle, Counting)
        lane.recaches = name == "recache"
        with Session(bundle, on.options, lane, "host"):
            found[name] = sum(sizes)
    return found


def test_on_a_device_of_its_own_the_weights_are_there_twice(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forcingkv.runtime.backends import ort_providers

    opened = Bundle.open(bundles("longlive"))
    on_cpu = needed_memory(opened, ONNX.options)
    apart = ort_providers.Chosen("cuda", 0, ())
    monkeypatch.setattr(ort_providers, "choose_provider", lambda options: apart)
    more = needed_memory(opened, ONNX.options)["weights"] - on_cpu["weights"]
    assert more == opened.manifest.graphs["recache"].weight_bytes


def test_what_would_fit_is_counted_with_the_frames_of_its_policy(bundles: Bundles) -> None:
    from forcingkv.runtime.kv.policies import load_policy

    opened = Bundle.open(bundles("longlive"))
    parts = {"recache": 1200}
    policy = load_policy("forcing-kv")
    assert bytes_of_other(opened, parts, opened.manifest.policy, opened.plan.geometry.name) == 1200
    assert bytes_of_other(opened, parts, policy, opened.plan.geometry.name) < 1200


def test_its_weights_stay_in_their_file(bundles: Bundles) -> None:
    """Nothing is computed of them at load, and nothing packed: no operator of the graph is folded away."""
    with ONNX.open(bundles("longlive")) as session:
        lane = session._memory().lane
        assert isinstance(lane, OnnxLane)
        assert UNFOLDED == ("recache",)
        assert lane.recaches
        options = lane._graphs["recache"]._session.get_session_options()
        assert options.get_session_config_entry("session.disable_prepacking") == "1"
        assert not options.enable_cpu_mem_arena
