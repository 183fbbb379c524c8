"""A bank of frames in torch: against the rule, applied frame by frame to the whole video's keys."""

from __future__ import annotations

import pytest
import torch

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.models.kv_bank import least_alike, likeness
from forcingkv.runtime.kv.bank import Bank
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.kv.window import first_position
from forcingkv.runtime.spec import Positions
from tests.conftest import small_spec
from tests.models.caches import advanced, rotated

CHUNKS = 15


def plan_of(
    *roles: Role, positions: Positions = "relative", attended_frames: int = 20, **changes: object
) -> CachePlan:
    spec = small_spec(layers=1, positions=positions, attended_frames=attended_frames, **changes)
    return build_plan(spec, spec.geometry(), Policy("bank", "", {"all": roles}))


def alike(one: torch.Tensor, other: torch.Tensor, pairs_of_time: int) -> float:
    """The mean cosine over heads and tokens of keys before rotation, but for the numbers that time turns."""
    a, b = (keys[..., 2 * pairs_of_time :].double() for keys in (one, other))
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


def bank_by_rule(
    raw: list[torch.Tensor], role: Bank, sink: int, recent: int, size: int, pairs_of_time: int
) -> list[int]:
    """The frames that the bank holds after all chunks of `raw`, keys (1, heads, tokens, head_dim) a frame."""
    held: list[int] = []
    seen = 0
    known: dict[tuple[int, int], float] = {}

    def of(one: int, other: int) -> float:
        pair = min(one, other), max(one, other)
        if pair not in known:
            known[pair] = alike(raw[pair[0]], raw[pair[1]], pairs_of_time)
        return known[pair]

    for past in range(size, len(raw) + 1, size):
        end = max(past - recent, seen)
        held += [frame for frame in range(seen, end) if frame >= sink and frame % role.every == 0]
        seen = end
        while len(held) > role.frames:
            sums = [sum(of(one, other) for other in held) for one in held]
            held.pop(sums.index(max(sums)))
    return held


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("role", "sink", "recent", "size"),
    [
        (Bank(3, 9), 3, 6, 3),
        (Bank(3), 3, 1, 3),
        (Bank(4, 2), 1, 4, 3),
        (Bank(2), 0, 2, 1),
    ],
)
def test_what_is_kept_is_what_the_rule_keeps(
    role: Bank, sink: int, recent: int, size: int, kind: Positions
) -> None:
    sinks = [Sink(sink)] if sink else []
    plan = plan_of(*sinks, role, Recent(recent), positions=kind, frames_per_chunk=size, sink_frames=sink)
    group, seen = plan.layers[0][0], set()
    for chunk, cache, raw, _ in advanced(plan, CHUNKS + 5 * (size == 1)):
        held = cache[0][0][role.name]
        frames = bank_by_rule(raw, role, sink, recent, size, plan.spec.rotary_pairs[0])
        assert held.keys.shape[2] == role.tokens(plan, group, chunk) == len(frames) * plan.frame_tokens
        here = chunk * size - len(frames) - cache[0][0]["recent"].keys.shape[2] // plan.frame_tokens
        for n, frame in enumerate(frames):
            part = slice(n * plan.frame_tokens, (n + 1) * plan.frame_tokens)
            place = first_position(plan, chunk, chunk) - chunk * size + here + n if plan.relative else frame
            assert place >= sink
            torch.testing.assert_close(
                held.keys[:, :, part], rotated(raw[frame], plan, place), atol=1e-5, rtol=0
            )
            assert torch.equal(held.values[:, :, part], raw[frame])
        seen.add(tuple(frames))
    assert len(frames) == role.frames
    dense = range(frames[0], frames[0] + role.every * role.frames, role.every)
    assert frames != [*dense], "the choice was to be looked at"
    assert len(seen) > role.frames + 1 or role.every > 2, "it chose again and again"


def test_each_group_chooses_by_its_own_heads() -> None:
    spec = small_spec(layers=1, attended_frames=20)
    roles = Bank(3), Recent(1)
    headmap = HeadMap(ModelIdentity(spec.name, 1, 3), (("one", "two", "one"),), Rule("given"))
    plan = build_plan(spec, spec.geometry(), Policy("banks", "", {"one": roles, "two": roles}), headmap)
    *_, (_, cache, raw, _) = advanced(plan, 10)
    kept = []
    for group, held in zip(plan.layers[0], cache[0], strict=True):
        own = [frame[:, group.start : group.stop] for frame in raw]
        frames = bank_by_rule(own, Bank(3), 0, 1, spec.frames_per_chunk, spec.rotary_pairs[0])
        assert torch.equal(held["bank"].values, torch.cat([own[frame] for frame in frames], 2))
        kept.append(frames)
    assert kept[0] != kept[1]


def test_how_alike_frames_are_does_not_depend_on_when_they_are() -> None:
    """The same keys at two times are wholly alike; what turns with time does not count."""
    plan = plan_of(Bank(3), Recent(1))
    raw = torch.randn(1, 3, plan.frame_tokens, plan.spec.head_dim)
    keys = torch.stack([rotated(raw, plan, place)[0] for place in (0, 7)], 1)
    found = likeness(keys, plan.spec.rotary_pairs[0])
    torch.testing.assert_close(found, torch.ones(2, 2), atol=1e-6, rtol=0)


def test_of_equal_frames_the_oldest_goes_and_what_is_not_there_goes_first() -> None:
    same = torch.ones(4, 4)
    assert least_alike(same, torch.ones(4), 2).tolist() == [2, 3]
    assert least_alike(same, torch.tensor([1.0, 1, 0, 0]), 3).tolist() == [0, 1, 3]
    assert least_alike(same, torch.tensor([1.0, 1, 1, 0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ((Sink(3), Bank(15), Recent(1)), "the bank has 15 frames, more than the window has room for"),
        ((Sink(3), Bank(3)), "the role bank is made of frames that leave the recent ones"),
    ],
)
def test_what_does_not_fit_is_refused(roles: tuple[Role, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(*roles)


def test_bounds_are_named() -> None:
    with pytest.raises(InputError, match="frames is 0; expected 1 to"):
        Bank(0)
    with pytest.raises(InputError, match="3 of every 9999 frames are there after 29997 frames"):
        Bank(3, 9999)
    with pytest.raises(InputError, match="17 frames come to the bank with every chunk"):
        plan_of(Bank(2), Recent(1), frames_per_chunk=17, attended_frames=60)


def test_which_frames_it_holds_is_said_until_keys_decide() -> None:
    plan = plan_of(Sink(3), Bank(2, 3), Recent(1))
    role = Bank(2, 3)
    group = plan.layers[0][0]
    assert [span.frame for span in role.spans(plan, group, 3, None)] == [3, 6]
    with pytest.raises(InputError, match=r"which frames the role bank holds for chunk 4 depends on keys"):
        role.spans(plan, group, 4, None)
