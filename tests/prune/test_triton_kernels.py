"""The Triton kernels, interpreted, against the ONNX body in ONNX Runtime and the torch operator."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from fractions import Fraction
from functools import cache

import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from forcingkv.models.wan import KeysValues
from forcingkv.prune.launcher import COMPACT_BLOCK, COSINE_BLOCK, MAX_CANDIDATES, SELECT_BLOCK
from forcingkv.prune.onnx_operators import DOMAIN, OPSET, PLUGIN_NAMESPACE, functions_for
from forcingkv.prune.reference import prune_score
from forcingkv.runtime.kv.segments import Split
from tests.prune.interpreter import INTEGERS, Sizes, bits, collect, interpreter, prune, select, select_uneven

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
KV = ["transition_keys", "transition_values", "new_keys", "new_values"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with interpreter() as pool:
        yield pool


@cache
def session(kind: int, frame_tokens: int, segments: int, kept: int) -> ort.InferenceSession:
    """A model of one operator that scores, whose body ONNX Runtime runs."""
    node = helper.make_node(
        "UnevenPrune" if frame_tokens % segments else "DynamicPrune",
        KV,
        ["keys", "values", "indices"],
        domain=DOMAIN,
        kept=kept,
        frame_tokens=frame_tokens,
        segments=segments,
        plugin_namespace=PLUGIN_NAMESPACE,
    )
    inputs = [helper.make_tensor_value_info(name, kind, [None] * 4) for name in KV]
    outputs = [helper.make_tensor_value_info(name, kind, [None] * 4) for name in ("keys", "values")]
    outputs.append(helper.make_tensor_value_info("indices", TensorProto.INT64, [None]))
    model = helper.make_model(
        helper.make_graph([node], "prune", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    model.functions.extend(functions_for(model))
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def body(transition: KeysValues, new: KeysValues, sizes: Sizes) -> tuple[Tensor, KeysValues]:
    """Indices, and retained keys and values, from the ONNX body; bound by address: numpy lacks bfloat16."""
    dtype, (batch, heads, _, width) = new.keys.dtype, new.keys.shape
    run = session(DTYPES[dtype], sizes.frame_tokens, sizes.segments, sizes.kept)
    binding = run.io_binding()
    for name, tensor in zip(KV, (*transition, *new), strict=True):
        binding.bind_input(name, "cpu", 0, DTYPES[dtype], list(tensor.shape), tensor.data_ptr())
    shape = (batch, heads, sizes.kept * sizes.segment_tokens, width)
    keys, values = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    indices = torch.zeros(sizes.kept, dtype=torch.int64)
    for name, kind, tensor in (
        ("keys", DTYPES[dtype], keys),
        ("values", DTYPES[dtype], values),
        ("indices", TensorProto.INT64, indices),
    ):
        binding.bind_output(name, "cpu", 0, kind, list(tensor.shape), tensor.data_ptr())
    run.run_with_iobinding(binding)
    return indices, KeysValues(keys, values)


@st.composite
def launches(draw: st.DrawFn) -> tuple[Sizes, tuple[int, int, int, int], int, torch.Generator]:
    """Sizes; batch, heads, new frames, width; frames of the transition (0 or 1); a source of numbers."""
    segments, segment_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    more = draw(st.integers(0, segments - 1))  # tokens that make the segments uneven
    transition = draw(st.integers(0, 1))
    frames = draw(st.integers(2 - transition, 3))
    candidates = segments * (transition + frames - 1)
    sizes = Sizes(
        segments * segment_tokens + more,
        segments,
        kept=draw(st.integers(1, min(candidates, 5))),
        cosine_block=draw(st.sampled_from([8, COSINE_BLOCK])),
        select_block=draw(st.sampled_from([4, SELECT_BLOCK])),
        compact_block=draw(st.sampled_from([4, COMPACT_BLOCK])),
        candidates=draw(st.sampled_from([16, MAX_CANDIDATES])),
    )
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    width = draw(st.sampled_from([4, 5, 8, 12, 16, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return sizes, (batch, heads, frames, width), transition, generator


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits, those of no number among them: values are only copied."""
    kind = INTEGERS[dtype.itemsize]
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=kind).view(dtype)


def split(keys: Tensor, transition: int, generator: torch.Generator) -> tuple[KeysValues, KeysValues]:
    """Keys (batch, heads, tokens, width) with values, as transition tokens and new ones."""
    values = random_bits(tuple(keys.shape), keys.dtype, generator)
    parts = (x.split([transition, x.shape[2] - transition], 2) for x in (keys, values))
    (old_keys, new_keys), (old_values, new_values) = ((a.contiguous(), b.contiguous()) for a, b in parts)
    return KeysValues(old_keys, old_values), KeysValues(new_keys, new_values)


def runs(sizes: Sizes, tokens: int) -> list[range]:
    """The tokens of each candidate segment, by the definition: j * N / S to (j + 1) * N / S of each frame."""
    frame, segments = sizes.frame_tokens, sizes.segments
    return [
        range(first + place * frame // segments, first + (place + 1) * frame // segments)
        for first in range(0, tokens, frame)
        for place in range(segments)
    ]


def check(pool: Executor, transition: KeysValues, new: KeysValues, sizes: Sizes) -> tuple[Tensor, list[int]]:
    """Kernels, body and torch operator choose and collect the same; returns cosines and indices.

    What they collect is the first tokens of each chosen segment, as many as the shortest has, cut out here.
    """
    cosines, indices, retained = prune(pool, transition, new, sizes)
    candidates = runs(sizes, len(cosines))
    rows = [token for index in indices for token in candidates[index][: sizes.segment_tokens]]
    assert len(rows) == len(set(rows)), "no token is kept twice"
    for mine, pair in zip(retained, zip(transition, new, strict=True), strict=True):
        assert torch.equal(bits(mine), bits(torch.cat(pair, 2)[:, :, rows].contiguous()))
    *kept, chosen = prune_score(*transition, *new, sizes.frame_tokens, sizes.segments, sizes.kept)
    others = [body(transition, new, sizes), (chosen, KeysValues(*kept))]
    for chosen, kept in others:
        assert indices.tolist() == chosen.tolist()
        for mine, its in zip(retained, kept, strict=True):
            assert torch.equal(bits(mine), bits(its))
    return cosines, indices.tolist()


@settings(deadline=None, max_examples=50)
@given(launches(), st.sampled_from(list(DTYPES)), st.data())
def test_planted_ties_go_to_the_lowest_index(
    pool: Executor,
    launch: tuple[Sizes, tuple[int, int, int, int], int, torch.Generator],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """A token's key is +-1 in 4^n places. A frame later, half or a quarter of the signs are flipped, or none:
    the cosine is 0, 0.5 or 1, and any sum of them is exact in any order."""
    sizes, (batch, heads, frames, width), transition, generator = launch
    tokens = sizes.frame_tokens
    places = max(4**n for n in range(1, 4) if 4**n <= heads * width)
    flips = data.draw(
        st.lists(st.integers(0, 2), min_size=(count := (transition + frames - 1) * tokens), max_size=count)
    )
    by_frame = torch.tensor(flips).reshape(-1, tokens)
    signs = [torch.randint(0, 2, (tokens, places), generator=generator) * 2.0 - 1]
    for row in by_frame:
        turned = torch.arange(places) < (row * places // 4)[:, None]
        signs.append(torch.where(turned, -signs[-1], signs[-1]))
    vectors = torch.zeros(len(signs) * tokens, heads * width)
    vectors[:, torch.randperm(heads * width, generator=generator)[:places]] = torch.cat(signs)
    keys = torch.randn(batch, heads, len(vectors), width, generator=generator)
    keys[0] = torch.unflatten(vectors, 1, (heads, width)).transpose(0, 1)

    cosines, chosen = check(pool, *split(keys.to(dtype), transition * tokens, generator), sizes)

    assert cosines.tolist() == [1 - count / 2 for count in flips]
    flipped = [Fraction(sum(flips[run.start : run.stop]), len(run)) for run in runs(sizes, len(flips))]
    assert chosen == sorted(sorted(range(len(flipped)), key=lambda i: (-flipped[i], i))[: sizes.kept])


@settings(deadline=None, max_examples=50)
@given(launches(), st.sampled_from(list(DTYPES)))
def test_random_keys_give_the_same_segments(
    pool: Executor,
    launch: tuple[Sizes, tuple[int, int, int, int], int, torch.Generator],
    dtype: torch.dtype,
) -> None:
    sizes, (batch, heads, frames, width), transition, generator = launch
    tokens = (transition + frames) * sizes.frame_tokens
    keys = torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)
    exact = keys[0].double().transpose(0, 1).flatten(1)
    expected = torch.cosine_similarity(exact[: -sizes.frame_tokens], exact[sizes.frame_tokens :])
    means = [expected[run.start : run.stop].mean() for run in runs(sizes, len(expected))]
    ordered = torch.stack(means).sort().values
    # Sums in float32 differ in their last bits; where these decide, any choice is as good.
    assume(len(ordered) == sizes.kept or ordered[sizes.kept] - ordered[sizes.kept - 1] > 1e-5)

    cosines, _ = check(pool, *split(keys, transition * sizes.frame_tokens, generator), sizes)

    torch.testing.assert_close(cosines, expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "cosine"), [(0.0, 0.0), (1e-9, 0.24), (1e-3, 1.0)])
def test_keys_shorter_than_1e_8_count_as_that_long(pool: Executor, size: float, cosine: float) -> None:
    sizes = Sizes(6, 3, 2, COSINE_BLOCK, SELECT_BLOCK, COMPACT_BLOCK, MAX_CANDIDATES)
    keys = torch.full((1, 2, 18, 12), size)
    cosines, chosen = check(pool, *split(keys, 6, torch.Generator()), sizes)
    torch.testing.assert_close(cosines, torch.full((12,), cosine))
    assert chosen == [0, 1]


def test_what_is_no_number_is_chosen_last_and_harms_no_other(pool: Executor) -> None:
    nan = float("nan")
    similarity = torch.tensor([nan, 0.5, nan, -0.5, 0.25, nan])
    cosines = similarity.repeat_interleave(3)
    assert select(pool, cosines, 3, 2) == [3, 4]
    assert select(pool, cosines, 3, 5) == [0, 1, 2, 3, 4]
    assert select(pool, cosines, 3, 6) == [0, 1, 2, 3, 4, 5]
    assert select(pool, torch.full((6,), nan), 1, 3) == [0, 1, 2]


def test_uneven_segments_are_judged_by_their_own_tokens(pool: Executor) -> None:
    """Of 7 tokens in 3 segments of 2, 2 and 3; the least similar token of all is the last of the third."""
    thirds = Split(7, 3)
    assert [(thirds.start(i), thirds.tokens(i)) for i in range(6)] == [
        *[(0, 2), (2, 2), (4, 3)],
        *[(7, 2), (9, 2), (11, 3)],
    ]
    cosines = torch.tensor([0.5, 0.5, 0.75, 0.75, 0.5, 0.5, -1.0, 0.25, 0.25, 1.0, 1.0, 0.5, 0.5, 0.5])
    assert select_uneven(pool, cosines, thirds, 1) == [2], "a mean of 0 over three, 0.25 over two"
    assert select_uneven(pool, cosines, thirds, 3) == [0, 2, 3], "0.5 twice: the first"
    cosines[6] = torch.nan
    assert select_uneven(pool, cosines, thirds, 5) == [0, 1, 3, 4, 5], "what is no number harms no other"


def test_the_sizes_that_public_models_are_asked_for(pool: Executor) -> None:
    """512x512 is 1,024 tokens, 448x256 448, in 6 segments each; of a random choice."""
    generator = torch.Generator().manual_seed(2)
    for tokens in (1024, 448):
        sizes = Sizes(tokens, 6, 6, COSINE_BLOCK, SELECT_BLOCK, COMPACT_BLOCK, MAX_CANDIDATES)
        assert not sizes.split.is_even
        keys = torch.randn(1, 2, 4 * tokens, 8, generator=generator)
        check(pool, *split(keys, tokens, generator), sizes)


def test_as_many_candidates_as_there_may_be(pool: Executor) -> None:
    generator = torch.Generator().manual_seed(5)
    similarity = torch.randint(-3, 4, (MAX_CANDIDATES,), generator=generator) / 4
    expected = sorted(similarity.sort(stable=True).indices[:20].tolist())
    assert select(pool, similarity.repeat_interleave(SELECT_BLOCK + 1), SELECT_BLOCK + 1, 20) == expected


@pytest.mark.parametrize(
    ("frame", "transition"),
    [(12, 0), *(pytest.param(*one, marks=pytest.mark.long) for one in ((12, 1), (13, 0), (13, 1)))],
)
def test_garbage_indices_read_some_segment_and_nothing_else(
    pool: Executor, frame: int, transition: int
) -> None:
    """TensorRT's builder may run a layer on indices of its own making: nothing outside may be read.

    13 tokens in 6 segments are uneven. Products of the largest indices with a segment's tokens leave 64 bits.
    """
    garbage = [-1, 10**6, -(2**63), 2**63 - 1, 2**62 + 1, -(2**62) - 5, 7, 2**61 + 3]
    sizes = Sizes(frame, 6, len(garbage), COSINE_BLOCK, SELECT_BLOCK, COMPACT_BLOCK, MAX_CANDIDATES)
    generator = torch.Generator().manual_seed(3)
    keys = torch.rand(1, 2, (transition + 3) * frame, 8, generator=generator)
    pairs = torch.stack([keys, keys + 1]).split([transition * frame, 3 * frame], 3)
    tensors = [tensor.contiguous() for pair in pairs for tensor in pair]
    retained = collect(pool, tensors, garbage, sizes)
    every = runs(sizes, keys.shape[2])
    bounded = [every[min(max(index, 0), len(every) - 1)][: sizes.segment_tokens] for index in garbage]
    rows = [token for run in bounded for token in run]
    assert torch.equal(retained[0], keys[:, :, rows])
    assert torch.equal(retained[1], keys[:, :, rows] + 1)
