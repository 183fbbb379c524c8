"""DynamicPrune: the ONNX body and the torch operator against a loop written from docs/method.md."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from forcingkv.models.wan import KeysValues
from forcingkv.prune.onnx_operators import (
    DOMAIN,
    OPSET,
    PLUGIN_NAMESPACE,
    functions_for,
    prune_functions,
    split_prune,
)
from forcingkv.prune.reference import prune_follow, prune_score

Array = npt.NDArray[np.float32]


def naive(keys: list[Array], segments: int, kept: int) -> list[int]:
    """Candidate frames are all but the last; a segment's similarity to the next frame is the mean of
    its tokens' cosines, a token's key being all heads side by side; keep the least similar. A frame's tokens
    are split as evenly as they go: segment j of S begins at token j * N / S, rounded down."""
    tokens = keys[0].shape[1]
    similarity = []
    for frame, following in itertools.pairwise(keys):
        for segment in range(segments):
            cosines = []
            for token in range(segment * tokens // segments, (segment + 1) * tokens // segments):
                a, b = (
                    np.concatenate([head[token] for head in f]).astype(np.float64) for f in (frame, following)
                )
                cosines.append(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))
            similarity.append(np.mean(cosines))
    least = sorted(range(len(similarity)), key=lambda i: (similarity[i], i))[:kept]
    return sorted(least)


@st.composite
def cases(draw: st.DrawFn) -> tuple[KeysValues, KeysValues, int, int]:
    batch, heads, width = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(2, 9))
    segments, size, frames = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    tokens = segments * size + draw(st.integers(0, segments - 1))
    kept = draw(st.integers(1, segments * frames))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def draw_kv(count: int) -> KeysValues:
        shape = (batch, heads, count * tokens, width)
        return KeysValues(*(torch.randn(shape, generator=generator) for _ in range(2)))

    return draw_kv(1), draw_kv(frames), segments, kept


def body_session(segments: int, frame_tokens: int, kept: int, *, parts: bool = False) -> ort.InferenceSession:
    """A model of the two nodes, scoring and following, with their bodies; `parts`: scoring as three nodes."""
    uneven = frame_tokens % segments != 0
    split: dict[str, int] = {"segment_tokens": frame_tokens // segments}
    if uneven:
        split = {"frame_tokens": frame_tokens, "segments": segments}
    kv = ["transition_keys", "transition_values", "new_keys", "new_values"]
    nodes = [
        helper.make_node(
            "UnevenPrune" if uneven else "DynamicPrune",
            kv,
            ["keys", "values", "indices"],
            domain=DOMAIN,
            frame_tokens=frame_tokens,
            segments=segments,
            kept=kept,
            plugin_namespace=PLUGIN_NAMESPACE,
        ),
        helper.make_node(
            "UnevenPruneFollow" if uneven else "DynamicPruneFollow",
            [*kv, "indices"],
            ["keys2", "values2"],
            domain=DOMAIN,
            **split,
            plugin_namespace=PLUGIN_NAMESPACE,
        ),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in kv]
    floats = ["keys", "values", "keys2", "values2"]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in floats]
    outputs.append(helper.make_tensor_value_info("indices", TensorProto.INT64, [None]))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "prune", inputs, outputs), opset_imports=opsets, ir_version=10
    )
    model.functions.extend(prune_functions())
    if parts:
        split_prune(model)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(deadline=None, max_examples=60)
@given(cases(), st.booleans())
def test_body_and_operator_equal_the_loop(case: tuple[KeysValues, KeysValues, int, int], parts: bool) -> None:
    transition, new, segments, kept = case
    frame = transition.keys.shape[2]
    chain = torch.cat([transition.keys, new.keys], 2)[0].split(frame, 1)
    expected = naive([f.numpy() for f in chain], segments, kept)
    size = frame // segments
    starts = [i // segments * frame + i % segments * frame // segments for i in expected]
    places = np.concatenate([np.arange(start, start + size) for start in starts])
    assert len(places) == len(set(places)), "no token is kept twice"
    tokens = [torch.cat(pair, 2).numpy()[:, :, places] for pair in zip(transition, new, strict=True)]

    *retained, indices = prune_score(*transition, *new, frame, segments, kept)
    assert indices.tolist() == expected
    followed = prune_follow(*transition, *new, indices, frame, segments)
    for found, wanted in zip((*retained, *followed), tokens * 2, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)

    names = ["transition_keys", "transition_values", "new_keys", "new_values"]
    feed = dict(zip(names, (t.numpy() for t in (*transition, *new)), strict=True))
    session = body_session(segments, frame, kept, parts=parts)
    out = session.run(["indices", "keys", "values", "keys2", "values2"], feed)
    assert out[0].tolist() == expected
    for found, wanted in zip(out[1:], tokens * 2, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_ties_go_to_the_lowest_index() -> None:
    """Tokens all alike: every segment is as similar as every other."""
    frame = torch.ones(1, 2, 12, 4)
    transition, new = (
        KeysValues(frame, frame),
        KeysValues(frame.repeat(1, 1, 3, 1), frame.repeat(1, 1, 3, 1)),
    )
    *_, indices = prune_score(*transition, *new, 12, 6, 6)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5]
    names = ["transition_keys", "transition_values", "new_keys", "new_values"]
    feed = dict(zip(names, (t.numpy() for t in (*transition, *new)), strict=True))
    (found,) = body_session(6, 12, 6).run(["indices"], feed)
    assert found.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_model_gets_the_bodies_of_its_nodes_alone() -> None:
    def bodies(*types: str) -> set[str]:
        nodes = [helper.make_node(name, ["a"], ["b"], domain=DOMAIN) for name in types]
        nodes.append(helper.make_node("Add", ["a", "a"], ["c"]))
        model = helper.make_model(helper.make_graph(nodes, "nodes", [], []))
        return {function.name for function in functions_for(model)}

    assert bodies("DynamicPruneFollow") == {"DynamicPruneFollow"}
    kernels = {"TokenCosines", "SelectSegments", "DynamicPruneFollow"}
    assert bodies("DynamicPrune", *kernels) == {"DynamicPrune", *kernels}
    assert bodies("UnevenPrune", "UnevenPruneFollow") == {"UnevenPrune", "UnevenPruneFollow"}
