"""What a session holds: against a count by hand, and against the buffers that a session makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forcingkv.runtime import Bundle
from forcingkv.runtime.backends import Tensor
from forcingkv.runtime.backends.onnxruntime import OnnxLane
from forcingkv.runtime.bundle import GraphRecord, Manifest, TensorRecord
from forcingkv.runtime.chunk_decoder import ChunkDecoder
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.footprint import engine_sets, footprint, grouped_by_need, named, part_notes, readable
from forcingkv.runtime.kv.buffers import CacheBuffers
from tests.runtime.conftest import small_bundle


def engine(graph: str, weights: int, activations: int, sm: int = 89) -> EngineRecord:
    return EngineRecord(
        graph=graph,
        flavour="tensorrt-rtx",
        version="1.7.1",
        sm=sm,
        file=f"engines/{graph}-{sm}.engine",
        layers=9,
        plugin_layers=0,
        needs_plugin=False,
        phases=1,
        weight_bytes=weights,
        activation_bytes=activations,
        scratch_bytes=activations,
        seconds=1.0,
        peak_bytes=1,
    )


ENGINES = (engine("prompt", 10, 7), engine("step", 200, 50), engine("decode", 3000, 600))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(small_bundle("forcing-kv"))


class CountingLane(OnnxLane):
    """Counts the bytes that it gives out."""

    taken = 0

    def tensor(self, shape: tuple[int, ...], dtype: str, *, state: bool = False) -> Tensor:
        made = super().tensor(shape, dtype, state=state)
        self.taken += made.nbytes
        return made


def with_caches(manifest: Manifest) -> Manifest:
    """The same with a decoder that hands on two caches, as that of Wan does."""
    caches = {"feature.0": TensorRecord("bfloat16", (1, 5, 2)), "feature.1": TensorRecord("float32", (3,))}
    decode = manifest.graphs["decode"]
    record = GraphRecord(
        decode.file,
        decode.weights,
        decode.inputs | {"first": TensorRecord("float32", (1,))} | caches,
        decode.outputs | {f"next.{name}": tensor for name, tensor in caches.items()},
    )
    return replace(manifest, graphs={**manifest.graphs, "decode": record})


def test_every_part_as_counted_by_hand(bundle: Bundle) -> None:
    """2 layers of 3 heads of 12, 24 tokens a frame; layer 0 is not split, layer 1 has 2 dynamic heads, which
    retain 6 of 18 segments of 4 tokens."""
    token = 12 * 2 * 4  # keys and values of a head
    chunk = 3 * 3 * 8 * 12 * 4  # latents
    assert footprint(bundle.manifest, bundle.plan, ENGINES) == {
        "weights": 3210,
        "activations": 600 + 50,  # those of decode beside the larger of the others
        "kv_sink": 24 * 6 * token,
        "kv_retained": 2 * 24 * 2 * token,
        "kv_recent": 2 * 24 * 6 * token,
        "kv_early": 0,
        "kv_opening": 0,
        "kv_scene": 0,
        "kv_ema": 0,
        "kv_strided": 0,
        "kv_merged": 0,
        "kv_bank": 0,
        "kv_tokens": 0,
        "decoder_caches": 0,
        "frames": 2 * 3 * 8 * 12 * 3,  # of a chunk, and of the one before
        "text": 5 * 10 * 4 + 2 * 3 * 5 * token,
        # latents, noise, next_latents, those of decode; positions; time; sigmas; sink rows; clean
        "latents": 4 * chunk + 72 * 12 * 4 + 16 * 4 + 2 * 4 + 2 * 24 * 4 + 1,
    }


def test_every_part_is_explained(bundle: Bundle) -> None:
    assert list(footprint(bundle.manifest, bundle.plan, ENGINES)) == list(part_notes())


def test_on_onnx_runtime_the_graphs_say_what_they_need(bundle: Bundle) -> None:
    graphs = bundle.manifest.graphs.values()
    weights, activations = (
        [getattr(g, f"{what}_bytes") for g in graphs] for what in ("weight", "activation")
    )
    known, engines = (footprint(bundle.manifest, bundle.plan, given) for given in ((), ENGINES))
    assert known["weights"] == sum(weights) > 0
    assert known["activations"] == max(activations) > 0
    others = {name: size for name, size in known.items() if name not in ("weights", "activations")}
    assert others == {name: engines[name] for name in others} | {"frames": engines["frames"] // 2}


def test_what_no_graph_says_is_left_out(bundle: Bundle) -> None:
    graphs = {
        name: replace(graph, weight_bytes=None, activation_bytes=None)
        for name, graph in bundle.manifest.graphs.items()
    }
    known = footprint(bundle.manifest, bundle.plan)
    del known["weights"], known["activations"]
    assert footprint(replace(bundle.manifest, graphs=graphs), bundle.plan) == known


def test_keys_and_values_take_what_the_session_allocates(bundle: Bundle) -> None:
    parts = footprint(bundle.manifest, bundle.plan)
    held = sum(size for name, size in parts.items() if name.startswith("kv_"))
    assert held == CacheBuffers(bundle.plan, OnnxLane({}), "float32").nbytes


def test_keys_and_values_are_in_the_dtype_that_the_graphs_compute_in(bundle: Bundle) -> None:
    half = footprint(replace(bundle.manifest, compute="bfloat16"), bundle.plan)
    whole = footprint(bundle.manifest, bundle.plan)
    assert {name for name in part_notes() if half.get(name) != whole.get(name)} == {
        "kv_sink",
        "kv_retained",
        "kv_recent",
    }
    assert 2 * half["kv_recent"] == whole["kv_recent"]


def test_decoder_caches_are_held_twice_and_are_no_frames(bundle: Bundle) -> None:
    plain, carried = (footprint(m, bundle.plan) for m in (bundle.manifest, with_caches(bundle.manifest)))
    assert carried["decoder_caches"] == 2 * (10 * DTYPES["bfloat16"].bytes + 3 * 4)
    assert carried["frames"] == plain["frames"]
    assert carried["latents"] == plain["latents"] + 4, "the input `first`"


def test_the_decoder_takes_what_is_said(bundle: Bundle) -> None:
    decode = with_caches(bundle.manifest).graphs["decode"]
    whole = replace(decode, inputs=decode.inputs | {"feature.0": TensorRecord("float32", (1, 5, 2))})
    manifest = replace(bundle.manifest, graphs={**bundle.manifest.graphs, "decode": whole})

    parts = footprint(manifest, bundle.plan)
    latents = np.empty(decode.inputs["latents"].shape, np.float32).nbytes
    lane = CountingLane({})
    ChunkDecoder(lane, manifest, bundle.manifest.model)
    first = 2 * 4  # one for each of its values
    assert lane.taken == parts["decoder_caches"] + parts["frames"] + latents + first


def test_engines_come_by_flavour_version_and_gpu_in_the_order_of_graphs(bundle: Bundle) -> None:
    for_120 = tuple(replace(one, sm=120) for one in ENGINES)
    larger = tuple(replace(one, sm=86, activation_bytes=one.activation_bytes + 1) for one in ENGINES)
    manifest = replace(bundle.manifest, engines=(*for_120[::-1], *ENGINES, *larger))
    sets = engine_sets(manifest)
    assert [[(e.sm, e.graph) for e in one] for one in sets] == [
        [(sm, graph) for graph in ("prompt", "step", "decode")] for sm in (86, 89, 120)
    ]
    assert [named(group) for group in grouped_by_need(sets)] == [
        "tensorrt-rtx 1.7.1 for sm_86",
        "tensorrt-rtx 1.7.1 for sm_89, sm_120",
    ]
    assert engine_sets(bundle.manifest) == []


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (9_994_999, "9.99 MB"),
        (9_996_000, "10.0 MB"),
        (118_304_768, "118 MB"),
        (35_400_000_000, "35.4 GB"),
    ],
)
def test_sizes_have_three_digits(size: int, said: str) -> None:
    assert readable(size) == said


def test_a_bundle_that_was_moved_says_the_same(bundle: Bundle, tmp_path: Path) -> None:
    """The figures come from the manifest alone: no file of an engine is looked at."""
    moved = Bundle(tmp_path / "elsewhere", bundle.manifest, bundle.headmap)
    assert footprint(moved.manifest, moved.plan, ENGINES) == footprint(bundle.manifest, bundle.plan, ENGINES)
