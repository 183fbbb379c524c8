"""The policy `pyramid`: from published labels, against the frames that its forerunner was seen to read."""

from __future__ import annotations

from pathlib import Path

from forcingkv.headmaps.readers import read_headmap
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from tests.golden.files import GoldenFile
from tests.golden.settings import case_of

SIDE_EFFECT = 3
"""The frame that anchor heads keep for ever in the file, since it is the first after the sink."""

BLOCK, BLOCKS = 4, 4


def test_the_published_labels_and_the_policy_make_a_plan(data: Path) -> None:
    spec, policy = load_spec("self-forcing"), load_policy("pyramid")
    headmap = read_headmap(data / "headmaps" / "pyramid_forcing_best_labels.csv")
    assert headmap.counts() == {"wave": 156, "anchor": 172, "veil": 32}
    plan = build_plan(spec, spec.geometry(), policy, headmap)
    seen = {
        group.label: sum(role.seen_tokens(plan, group, 50) for role in group.roles) / plan.frame_tokens
        for group in plan.groups
    }
    assert seen == {"wave": 1 + 4 + 1, "anchor": 3 + 4 + 1, "veil": 3 + 4 / 4 + 1}
    assert plan.window_frames == 3 + 1 + 24 + 3


def test_a_chunk_reads_what_one_of_its_query_frames_reads(data: Path) -> None:
    """The first in wave heads, by whose phase they choose; the last in others: what has left the recent
    frames is read by the last first."""
    file = GoldenFile(data / "golden" / "pyramid_forcing.safetensors")
    case = case_of(file, "")
    assert case.headmap is not None
    shipped = load_policy("pyramid").groups
    assert case.policy.groups == shipped
    plan = build_plan(case.spec, case.spec.geometry(), case.policy, case.headmap)
    labels = case.headmap.labels[0]
    for chunk, by_query in enumerate(file.spec["read"]):
        for group in plan.layers[0]:
            own = range(3 * chunk, 3 * chunk + 3)
            spans = [span for role in group.roles for span in role.spans(plan, group, chunk, None)]
            mine = sorted({span.frame for span in spans} | {*own})
            read = by_query[0 if group.label == "wave" else 2][labels.index(group.label)]
            frames, tokens = {frame for frame, _ in read[:-1]}, read[-1]
            held = sum(span.tokens for span in spans) + plan.chunk_tokens
            if group.label == "anchor" and SIDE_EFFECT not in mine:
                assert (SIDE_EFFECT in frames) == (chunk > 0), chunk
                tokens -= plan.frame_tokens * (SIDE_EFFECT in frames)
                frames -= {SIDE_EFFECT}
            merged = [span for span in spans if span.tokens < plan.frame_tokens]
            if len(merged) == BLOCKS and own.start % BLOCK == 0:
                # There a block counts as one of the newest once it is whole, though it is not read yet.
                mine.remove(merged[0].frame)
                held -= merged[0].tokens
            assert mine == sorted(frames), (chunk, group.label)
            assert held == tokens
