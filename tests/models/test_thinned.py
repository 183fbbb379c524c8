"""Strided and merged frames in torch: against the whole video's keys before rotation."""

from __future__ import annotations

import pytest
import torch

from forcingkv.headmaps import InputError
from forcingkv.models.kv import read_role
from forcingkv.runtime.kv.merged import Merged
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.kv.strided import Strided
from forcingkv.runtime.kv.window import first_position
from forcingkv.runtime.spec import Positions
from tests.conftest import small_spec
from tests.models.caches import advanced, rotated

CHUNKS = 15


def plan_of(*roles: Role, positions: Positions = "relative", **changes: object) -> CachePlan:
    spec = small_spec(layers=1, positions=positions, **changes)
    return build_plan(spec, spec.geometry(), Policy("thinned", "", {"all": roles}))


def seen_by_rule(role: Strided, sink: int, recent: int, chunk: int, size: int) -> list[int]:
    own = chunk * size
    old = range(sink, max(own - recent, sink))
    phase = own % role.every if role.cyclic else 0
    return [frame for frame in old if frame % role.every == phase][-role.frames :]


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("role", "sink", "recent", "size"),
    [
        (Strided(6, 3), 3, 1, 3),
        (Strided(6, 2, cyclic=True), 1, 1, 3),
        (Strided(2, 4), 1, 5, 3),
        (Strided(4, 2, cyclic=True), 1, 4, 3),
        (Strided(3, 2, cyclic=True), 2, 1, 1),
    ],
)
def test_strided_frames_are_those_of_the_rule(
    role: Strided, sink: int, recent: int, size: int, kind: Positions
) -> None:
    plan = plan_of(Sink(sink), role, Recent(recent), positions=kind, frames_per_chunk=size)
    group = plan.layers[0][0]
    most = 0
    for chunk, cache, raw, _ in advanced(plan, CHUNKS):
        held = cache[0][0][role.name]
        assert held.keys.shape[2] == role.tokens(plan, group, chunk)
        seen = read_role(plan, group, role, held, held.keys)
        frames = seen_by_rule(role, sink, recent, chunk, size)
        assert frames == [span.frame for span in role.spans(plan, group, chunk, None)]
        assert seen.keys.shape[2] == len(frames) * plan.frame_tokens == role.seen_tokens(plan, group, chunk)
        own = first_position(plan, chunk, chunk)
        for n, frame in enumerate(frames):
            part = slice(n * plan.frame_tokens, (n + 1) * plan.frame_tokens)
            wanted = rotated(raw[frame], plan, own + frame - chunk * size)
            torch.testing.assert_close(seen.keys[:, :, part], wanted, atol=5e-6, rtol=0)
            assert torch.equal(seen.values[:, :, part], raw[frame])
            assert plan.window_frames >= sink + chunk * size - frame + size or kind == "absolute"
        most = max(most, len(frames))
    assert most == role.frames


def blocks_by_rule(role: Merged, sink: int, recent: int, chunk: int, size: int) -> list[int]:
    end = chunk * size - recent
    starts = [first for first in range(0, 99, role.frames) if first >= sink and first + role.frames <= end]
    return starts[-role.blocks :]


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("role", "sink", "recent", "size"),
    [
        (Merged(4, 2, 4), 3, 1, 3),
        (Merged(2, 1, 3), 0, 2, 3),
        (Merged(1, 2, 2), 1, 4, 3),
        (Merged(5, 2, 2), 2, 1, 2),
        (Merged(4, 4, 2), 0, 1, 3),
    ],
)
def test_merged_blocks_are_means_of_keys_before_rotation(
    role: Merged, sink: int, recent: int, size: int, kind: Positions
) -> None:
    plan = plan_of(
        *([Sink(sink)] if sink else []), role, Recent(recent), positions=kind, frames_per_chunk=size
    )
    group, (rows, columns) = plan.layers[0][0], plan.geometry.grid
    # Tokens at the edge stand for those that a patch has not.
    whole = [-(-side // role.patch) * role.patch for side in (rows, columns)]
    places = torch.arange(rows * columns).reshape(rows, columns)
    places = places[[min(n, rows - 1) for n in range(whole[0])]]
    places = places[:, [min(n, columns - 1) for n in range(whole[1])]]
    patches = whole[0] // role.patch, role.patch, whole[1] // role.patch, role.patch
    at = (role.patch - 1) // 2
    corner = places[at :: role.patch, at :: role.patch].reshape(-1)
    most = 0
    for chunk, cache, raw, _ in advanced(plan, CHUNKS):
        held = cache[0][0][role.name]
        assert held.keys.shape[2] == role.tokens(plan, group, chunk)
        seen = read_role(plan, group, role, held, held.keys)
        blocks = blocks_by_rule(role, sink, recent, chunk, size)
        each = len(corner)
        assert seen.keys.shape[2] == len(blocks) * each
        own = first_position(plan, chunk, chunk)
        for n, first in enumerate(blocks):
            block = torch.stack(raw[first : first + role.frames])[:, :, :, places.reshape(-1)]
            mean = block.unflatten(3, patches).mean((0, 4, 6)).flatten(2, 3)
            middle = first + (role.frames - 1) // 2
            # A frame whose upper left token of each patch is the mean, rotated as that frame is.
            frame = torch.zeros_like(raw[0])
            frame[:, :, corner] = mean
            wanted = rotated(frame, plan, own + middle - chunk * size)[:, :, corner]
            part = slice(n * each, (n + 1) * each)
            torch.testing.assert_close(seen.keys[:, :, part], wanted, atol=5e-6, rtol=0)
            torch.testing.assert_close(seen.values[:, :, part], mean, atol=2e-6, rtol=0)
            assert plan.window_frames >= sink + chunk * size - middle + size or kind == "absolute"
        most = max(most, len(blocks))
    assert most == role.blocks


def test_lengths_that_grow_in_some_chunks_only_have_phases_of_their_own() -> None:
    """What a pass makes, and what it is told, is as long in every chunk of a phase."""
    plan = plan_of(Sink(3), Strided(6, 3), Recent(1))
    (group,) = plan.layers[0]
    assert [phase.first_chunk for phase in plan.phases] == [0, 1, 2, 3, 4, 5, 6, 7]
    for chunk in range(12):
        begins = plan.phase(chunk).first_chunk
        for role in group.roles:
            assert role.next_tokens(plan, group, chunk) == role.next_tokens(plan, group, begins)
        now, first = plan.rows(chunk), plan.rows(begins)
        assert {name: len(rows) for name, rows in now.items()} == {n: len(rows) for n, rows in first.items()}


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ((Sink(1), Strided(3, 2)), "frames that leave the recent ones, and there are none"),
        ((Sink(1), Merged(4, 2, 4)), "frames that leave the recent ones, and there are none"),
    ],
)
def test_what_does_not_fit_is_refused(roles: tuple[Role, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(*roles)


def test_sums_of_very_long_chunks_are_refused() -> None:
    """What is told of each of its frames grows with the square of their number."""
    with pytest.raises(InputError, match="a chunk has 65 frames, each of which may end a block"):
        plan_of(Merged(4, 2, 1), Recent(1), frames_per_chunk=65, attended_frames=130)


def test_a_reach_past_any_video_is_refused() -> None:
    with pytest.raises(InputError, match="4 of every 9999 frames reach over 39996 frames"):
        Strided(9999, 4)
    with pytest.raises(InputError, match="9999 blocks of 4 frames are 39996 frames"):
        Merged(4, 2, 9999)
