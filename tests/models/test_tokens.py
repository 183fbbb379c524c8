"""Tokens by a score, in torch: against the rule, applied token by token to the whole video's keys."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule
from forcingkv.headmaps.fields import from_data
from forcingkv.models.kv_choice import best
from forcingkv.runtime.kv.plan import CachePlan, build_plan
from forcingkv.runtime.kv.policies import Policy
from forcingkv.runtime.kv.roles import Recent, Role, Sink
from forcingkv.runtime.kv.tokens import Tokens
from forcingkv.runtime.kv.window import first_position
from forcingkv.runtime.spec import Positions
from tests.conftest import small_spec
from tests.models import query_statistics
from tests.models.caches import advanced, rotated

CHUNKS = 6


class Token(NamedTuple):
    """A token of the video, and what was known of it when it left."""

    frame: int
    place: int
    worth: float


def plan_of(
    *roles: Role, positions: Positions = "absolute", attended_frames: int = 20, **changes: object
) -> CachePlan:
    spec = small_spec(layers=1, positions=positions, attended_frames=attended_frames, **changes)
    statistics = query_statistics.made_up(spec)
    return build_plan(spec, spec.geometry(), Policy("tokens", "", {"all": roles}), None, statistics)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() @ other.double()) / (one.double().norm() * other.double().norm()))


class ByRule(NamedTuple):
    """The rule for one head: what is kept after each chunk."""

    plan: CachePlan
    role: Tokens
    head: slice
    """One head, or those that choose together."""
    sink: int
    recent: int

    def kept(self, raw: list[torch.Tensor], queries: list[torch.Tensor]) -> list[list[Token]]:
        """The tokens that are kept when each chunk comes, in the order of the video."""
        held: list[Token] = []
        seen, size, found = 0, self.plan.spec.frames_per_chunk, []
        for chunk in range(len(raw) // size):
            before = seen
            seen = max((chunk + 1) * size - self.recent, seen)
            pool = held + [
                Token(frame, place, self._worth(raw, chunk, frame, place))
                for frame in range(before, seen)
                if frame >= self.sink
                for place in range(self.plan.frame_tokens)
            ]
            pool.sort(key=lambda token: token[:2])
            scores = [self._score(token, raw, queries, chunk, before) for token in pool]
            order = sorted(range(len(pool)), key=lambda n: (scores[n], n), reverse=True)
            held = [pool[n] for n in sorted(order[: self.role.budget(self.plan)])]
            found.append(held)
        return found

    def stands(self, chunk: int, frame: int, kept_since: int) -> int:
        """Position of a frame as the clean pass of a chunk sees it."""
        size = self.plan.spec.frames_per_chunk
        if not self.plan.relative:
            return frame
        # What was kept before lies right before the recent frames.
        return first_position(self.plan, chunk, chunk) + max(frame, kept_since - 1) - chunk * size

    def _worth(self, raw: list[torch.Tensor], chunk: int, frame: int, place: int) -> float:
        if self.role.score != "similarity":
            return 0.0
        at = self.stands(chunk, frame, 0)
        one, other = (rotated(raw[frame + n], self.plan, at + n)[0, self.head, place] for n in range(2))
        return -sum(cosine(a, b) for a, b in zip(one, other, strict=True))

    def _score(
        self, token: Token, raw: list[torch.Tensor], queries: list[torch.Tensor], chunk: int, before: int
    ) -> float:
        if self.role.score == "similarity":
            return token.worth
        if self.role.score == "statistics":
            plan, statistics = self.plan, self.plan.statistics
            assert statistics is not None
            size = plan.spec.frames_per_chunk
            after = first_position(plan, chunk, chunk) + size
            distance = after - self.stands(chunk, token.frame, before)
            key = raw[token.frame][0, :, token.place].numpy()
            heads = range(plan.spec.heads)[self.head]
            return sum(
                query_statistics.score(statistics, plan.spec, 0, head, key[head], distance) for head in heads
            )
        keys = rotated(raw[token.frame], self.plan, self.stands(chunk, token.frame, before))
        mean = queries[chunk][0, self.head].double().mean(1)
        return float((mean * keys[0, self.head, token.place].double()).sum())


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("role", "sink", "recent", "size"),
    [
        (Tokens(2, "queries", together=True), 3, 1, 3),
        (Tokens(0.5, "queries"), 4, 4, 3),
        (Tokens(3, "similarity"), 1, 2, 3),
        (Tokens(0.25, "similarity", together=True), 0, 2, 1),
        (Tokens(1.5, "statistics"), 3, 1, 3),
        (Tokens(2, "statistics", together=True), 0, 2, 1),
    ],
)
def test_what_is_kept_is_what_the_rule_keeps(
    role: Tokens, sink: int, recent: int, size: int, kind: Positions
) -> None:
    sinks = [Sink(sink)] if sink else []
    plan = plan_of(*sinks, role, Recent(recent), positions=kind, frames_per_chunk=size, sink_frames=sink)
    group, chosen, queries = plan.layers[0][0], set(), list[torch.Tensor]()
    states = [(chunk, cache[0][0]) for chunk, cache, raw, _ in advanced(plan, CHUNKS, queries=queries)]
    *_, (_, _, raw, _) = advanced(plan, CHUNKS, queries=[])
    hidden = role.hidden_tokens(plan, group)
    for head in range(plan.spec.heads):
        heads = slice(None) if role.together else slice(head, head + 1)
        rule = ByRule(plan, role, heads, sink, recent)
        for (chunk, cache), tokens in zip(states, rule.kept(raw, queries), strict=True):
            held = cache[role.name]
            assert held.keys.shape[2] == role.tokens(plan, group, chunk)
            assert role.seen_tokens(plan, group, chunk) == len(tokens) <= role.budget(plan)
            before = chunk * size - cache["recent"].keys.shape[2] // plan.frame_tokens
            for n, (frame, place, _) in enumerate(tokens):
                at = rule.stands(chunk, frame, before)
                key = rotated(raw[frame], plan, at)[0, head, place]
                torch.testing.assert_close(held.keys[0, head, hidden + n], key, atol=1e-5, rtol=0)
                assert torch.equal(held.values[0, head, hidden + n], raw[frame][0, head, place])
            chosen.add((head, *((token.frame, token.place) for token in tokens)))
        assert len({token.frame for token in tokens}) > 1 or role.frames < 1, "single tokens, not frames"
    assert len(chosen) > 2 * plan.spec.heads, "it chose again and again"


def test_each_group_chooses_by_its_own_heads() -> None:
    spec = small_spec(layers=1, attended_frames=20)
    roles = Tokens(1, "queries", together=True), Recent(1)
    headmap = HeadMap(ModelIdentity(spec.name, 1, 3), (("one", "two", "one"),), Rule("given"))
    plan = build_plan(spec, spec.geometry(), Policy("both", "", {"one": roles, "two": roles}), headmap)
    queries: list[torch.Tensor] = []
    *_, (_, cache, raw, _) = advanced(plan, 6, queries=queries)
    for group, held in zip(plan.layers[0], cache[0], strict=True):
        rule = ByRule(plan, roles[0], slice(group.start, group.stop), 0, 1)
        tokens = rule.kept(raw, queries)[-1]
        own = torch.stack([raw[f][:, group.start : group.stop, p] for f, p, _ in tokens], 2)
        assert torch.equal(held["tokens"].values, own)


def naive(scores: list[float], there: list[int], kept: int) -> list[int]:
    order = sorted((n for n in range(len(scores)) if there[n]), key=lambda n: (scores[n], n), reverse=True)
    return sorted(order[:kept])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_best_of_a_row_are_those_of_a_sort(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, count))
    some = st.one_of(st.sampled_from([-1.0, 0.0, 1.0, 2.5]), st.floats(-1e4, 1e4, width=32))
    # Nearer to each other than the search tells apart is as good as equal.
    rows = [
        [round(x, 2) for x in data.draw(st.lists(some, min_size=count, max_size=count))] for _ in range(2)
    ]
    there = data.draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=count, max_size=count))
    found = best(torch.tensor(rows), torch.tensor(there).float(), kept)
    assert found.shape == (2, kept)
    for row, places in zip(rows, found.tolist(), strict=True):
        wanted = naive([float(torch.tensor(x)) for x in row], there, kept)
        assert places[: len(wanted)] == wanted
        assert len(set(places)) == kept


def test_many_scores_are_told_apart() -> None:
    scores = torch.randn(2, 6000, generator=torch.Generator().manual_seed(3))
    found = best(scores, torch.ones(6000), 4000)
    for row, places in zip(scores, found, strict=True):
        assert torch.equal(places, row.sort(stable=True).indices[-4000:].sort().values)


def test_what_is_worth_is_kept_with_16_bits_where_keys_have_8() -> None:
    """Of bfloat16 a token's worth would be kept to a hundredth, and thousands of tokens would be equal."""
    from forcingkv.models.kv_tokens import _packed, _unpacked

    worth = torch.rand(1, 2, 37) - 0.5
    like = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    packed = _packed(worth, like)
    assert packed.keys.shape == packed.values.shape == (1, 2, 5, 8)
    assert packed.keys.dtype == torch.bfloat16
    torch.testing.assert_close(_unpacked(packed, 37), worth, atol=2e-5, rtol=0)
    exact = _packed(worth, like.float())
    assert torch.equal(_unpacked(exact, 37), worth)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ((Sink(3), Tokens(15, "queries"), Recent(1)), "tokens of 15 frames are kept, more than the window"),
        ((Sink(3), Tokens(3, "queries")), "the role tokens is made of frames that leave the recent ones"),
        ((Tokens(0.3, "queries"), Recent(1)), r"0\.3 frames are 7\.2 tokens at .*a whole number of tokens"),
        ((Tokens(0, "similarity"), Recent(1)), "0 frames are 0 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(roles: tuple[Role, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(*roles)


def test_an_unknown_score_is_refused_by_name() -> None:
    data = {"role": "tokens", "frames": 2, "score": "attention"}
    with pytest.raises(InputError, match=r"score is 'attention'; expected 'queries' or 'similarity'"):
        from_data(Role, data, "policy mine")
    with pytest.raises(InputError, match=r"frames is -1\.0; expected 0 to"):
        Tokens(-1.0, "queries")


def test_a_pass_without_queries_is_an_error() -> None:
    with pytest.raises(ValueError, match="scores by queries, and the clean pass gave none"):
        [*advanced(plan_of(Tokens(1, "queries"), Recent(1)), 2)]


def test_which_frames_it_holds_is_said_until_scores_decide() -> None:
    role = Tokens(4, "queries")
    plan = plan_of(Sink(3), role, Recent(1))
    group = plan.layers[0][0]
    assert [span.frame for span in role.spans(plan, group, 2, None)] == [3, 4]
    with pytest.raises(InputError, match="which tokens the role tokens holds for chunk 3 depends on keys"):
        role.spans(plan, group, 3, None)
    example = role.example_spans(plan, group, 5, None)
    assert [span.frame for span in example] == [*range(3, 14)]
    assert sum(span.tokens for span in example) == role.budget(plan)
