"""Positions relative to the window in torch: against keys rotated afresh, absolute positions, public code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.models.generate import GeneratedChunk, generate, seeded_noise
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy, load_policy
from forcingkv.runtime.kv.window import first_position
from forcingkv.runtime.spec import Positions
from tests.conftest import random_model, roles, small_spec
from tests.golden.compare import compare
from tests.golden.files import GoldenFile
from tests.models.caches import advanced, rotated

POLICIES = ["full", "window", "forcing-kv", "dummy-forcing", "forcing-kv-krea-sink"]

WINDOWS = {"full": 5, "window": 4, "forcing-kv": 2, "dummy-forcing": 2, "forcing-kv-krea-sink": 2}
"""The chunks in the first window of each."""


def plan_of(policy: Policy, positions: Positions, **changes: object) -> CachePlan:
    spec = small_spec(layers=2, sink_frames=1, positions=positions, **changes)
    # Layer 0 of forcing-kv is not split.
    row = ("static", "dynamic", "dynamic") if "static" in policy.groups else ("sink", "neighbour", "dummy")
    headmap = HeadMap(ModelIdentity(spec.name, 2, 3), (row, row), Rule("given"))
    return build_plan(spec, spec.geometry(), policy, headmap if policy.needs_headmap else None)


@pytest.mark.parametrize(
    "policy",
    [
        *map(load_policy, POLICIES),
        Policy("all moves", "", {"all": roles(0, 5)}),
        Policy("a sink of two chunks", "", {"all": roles(5, 4)}),
    ],
    ids=lambda policy: policy.name,
)
def test_cached_keys_are_those_that_are_rotated_afresh(policy: Policy) -> None:
    plan, frames = plan_of(policy, "relative"), 3
    checked = set()
    for chunk, cache, raw, chosen in advanced(plan, 9):
        own = first_position(plan, chunk, chunk)
        for groups, held in zip(plan.layers, cache, strict=True):
            for group, kept in zip(groups, held, strict=True):
                heads = slice(group.start, group.stop)
                for role in group.roles:
                    keys, values = kept[role.name]
                    begin = 0
                    for span in role.spans(plan, group, chunk, chosen[-1]):
                        place = slice(span.offset, span.offset + span.tokens)
                        at = own - (chunk * frames - span.frame) if role.moves else span.frame
                        end = begin + span.tokens
                        wanted = rotated(raw[span.frame], plan, at)[:, heads, place]
                        torch.testing.assert_close(keys[:, :, begin:end], wanted, atol=2e-6, rtol=0)
                        assert torch.equal(values[:, :, begin:end], raw[span.frame][:, heads, place])
                        begin = end
                        checked.add((role.name, at))
                    assert begin == keys.shape[2]
    assert {name for name, _ in checked} == {r.name for group in plan.groups for r in group.roles}


def video(plan: CachePlan, chunks: int) -> list[GeneratedChunk]:
    text = torch.eye(plan.spec.text_length, plan.spec.text_width)[None]
    return list(generate(random_model(plan.spec), plan, text, seeded_noise(plan, 3), chunks))


@pytest.mark.parametrize("name", POLICIES)
def test_within_the_first_window_the_video_is_that_of_absolute_positions(name: str) -> None:
    relative, absolute = (plan_of(load_policy(name), kind) for kind in ("relative", "absolute"))
    one, other = (video(plan, 7) for plan in (relative, absolute))
    inside = [chunk for chunk in range(7) if 3 * chunk + 3 <= relative.window_frames]
    assert inside == list(range(WINDOWS[name]))
    for chunk, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        difference = float((mine.latents - theirs.latents).norm() / theirs.latents.norm())
        if chunk in inside:
            assert difference <= 1e-5
            assert (mine.indices is None) == (theirs.indices is None)
        else:  # the sink is at another distance
            assert difference > 1e-4, chunk


def test_what_segments_are_chosen_does_not_depend_on_the_window() -> None:
    # One window is left while the keys of layer 1 are still those of absolute positions: 12 frames.
    policy = load_policy("forcing-kv")
    wide = replace(policy, groups=policy.groups | {"static": roles(1, 8)})
    one, other = (video(plan_of(wide, kind), 4) for kind in ("relative", "absolute"))
    chosen = [[None if c.indices is None else c.indices.tolist() for c in made] for made in (one, other)]
    assert chosen[0] == chosen[1]
    assert chosen[0][-1] is not None


def test_without_a_sink_nothing_but_the_numbers_of_positions_changes() -> None:
    # Rotary embedding sees differences alone: with no key that stays, both videos are the same.
    policy = Policy("any", "", {"all": roles(0, 5)})
    one, other = (video(plan_of(policy, kind), 8) for kind in ("relative", "absolute"))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine.latents, theirs.latents, atol=1e-5, rtol=0)


def test_it_is_the_endless_mode_of_longlive(data: Path) -> None:
    file = GoldenFile(data / "golden" / "longlive_infinity.safetensors")
    compared = compare(file, "sink3_window12", "loop")  # the other window: tests/test_golden_files.py
    assert compared.holds, compared.line
