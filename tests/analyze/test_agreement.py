"""Agreement of two head maps, against its formulas written out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.analyze.comparison import Change, ScoreDifference, agree, changes, pairwise, score_difference
from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule

HEADS = 5
Labelling = list[str]


def map_of(labels: Labelling, heads: int = HEADS, rule: Rule | None = None) -> HeadMap:
    """A map with those labels, row by row."""
    rows = tuple(tuple(labels[i : i + heads]) for i in range(0, len(labels), heads))
    return HeadMap(ModelIdentity("m", len(rows), heads), rows, rule or Rule("given"))


def kappa(first: Labelling, second: Labelling) -> Fraction:
    """(observed - expected) / (1 - expected), expected from each map's own shares of labels."""
    n = len(first)
    observed = Fraction(sum(a == b for a, b in zip(first, second, strict=True)), n)
    counts = Counter(first), Counter(second)
    expected = sum((Fraction(counts[0][label] * counts[1][label], n * n) for label in counts[0]), Fraction())
    return Fraction(1) if expected == 1 else (observed - expected) / (1 - expected)


def rand(first: Labelling, second: Labelling) -> Fraction:
    """Hubert and Arabie's: pairs of heads together in both maps, corrected for chance."""
    n = comb(len(first), 2)
    both = sum(comb(k, 2) for k in Counter(zip(first, second, strict=True)).values())
    rows, columns = (sum(comb(k, 2) for k in Counter(x).values()) for x in (first, second))
    expected = Fraction(rows * columns, n)
    largest = Fraction(rows + columns, 2)
    return Fraction(1) if largest == expected else (both - expected) / (largest - expected)


def iou(first: Labelling, second: Labelling, label: str) -> Fraction:
    a, b = ({i for i, found in enumerate(x) if found == label} for x in (first, second))
    return Fraction(len(a & b), len(a | b))


@st.composite
def two_labellings(draw: st.DrawFn) -> tuple[Labelling, Labelling]:
    layers = draw(st.integers(1, 6))
    names = draw(st.sampled_from([["static", "dynamic"], ["static", "dynamic", "sink", "dummy"], ["a"]]))
    row = st.lists(st.sampled_from(names), min_size=layers * HEADS, max_size=layers * HEADS)
    return draw(row), draw(row)


@given(two_labellings())
def test_every_number_is_its_formula(labels: tuple[Labelling, Labelling]) -> None:
    first, second = labels
    found = agree(map_of(first), map_of(second))
    assert found.share == pytest.approx(sum(a == b for a, b in zip(*labels, strict=True)) / len(first))
    assert found.kappa == pytest.approx(float(kappa(first, second)), abs=1e-12)
    assert found.rand == pytest.approx(float(rand(first, second)), abs=1e-12)
    assert set(found.iou) == {*first, *second}
    for label, value in found.iou.items():
        assert value == pytest.approx(float(iou(first, second, label)))


@given(two_labellings())
def test_the_order_of_the_maps_does_not_matter(labels: tuple[Labelling, Labelling]) -> None:
    first, second = map(map_of, labels)
    there, back = agree(first, second), agree(second, first)
    assert (there.share, there.iou) == (back.share, back.iou)
    assert (there.kappa, there.rand) == pytest.approx((back.kappa, back.rand), abs=1e-12)
    assert {(c.layer, c.head, c.labels[::-1]) for c in changes(first, second)} == {
        (c.layer, c.head, c.labels) for c in changes(second, first)
    }


@given(two_labellings())
def test_changes_are_what_turns_one_map_into_the_other(labels: tuple[Labelling, Labelling]) -> None:
    first, second = map(map_of, labels)
    rows = [list(row) for row in first.labels]
    found = changes(first, second)
    for change in found:
        assert rows[change.layer][change.head] == change.labels[0] != change.labels[1]
        rows[change.layer][change.head] = change.labels[1]
    assert tuple(map(tuple, rows)) == second.labels
    share = agree(first, second).share
    assert len(found) == round((1 - share) * len(labels[0]))


@pytest.mark.parametrize("labels", [["static"] * HEADS, ["static", "dynamic", "dynamic", "sink", "static"]])
def test_identical_maps(labels: Labelling) -> None:
    a, b = map_of(labels), map_of(labels)
    found = agree(a, b)
    assert (found.share, found.kappa, found.rand) == (1, 1, 1)
    assert found.iou == dict.fromkeys(labels, 1)
    assert changes(a, b) == []


def test_maps_of_one_label_each() -> None:
    found = agree(map_of(["static"] * HEADS), map_of(["dynamic"] * HEADS))
    assert (found.share, found.kappa) == (0, 0)
    assert found.rand == 1, "Rand compares the groups, not their names"
    assert found.iou == {"static": 0, "dynamic": 0}
    one = agree(map_of(["static"] * HEADS), map_of(["static"] * 3 + ["dynamic"] * 2))
    assert (one.share, one.kappa, one.rand) == (0.6, 0, 0)


def test_a_worked_example() -> None:
    """20 + 15 of 50 alike: observed 0.7, expected 0.5 (the example of kappa in many books)."""
    first = ["static"] * 25 + ["dynamic"] * 25
    second = ["static"] * 20 + ["dynamic"] * 5 + ["static"] * 10 + ["dynamic"] * 15
    found = agree(map_of(first), map_of(second))
    assert found.kappa == pytest.approx(0.4)
    assert found.iou == pytest.approx({"static": 20 / 35, "dynamic": 15 / 30})


def test_different_sizes_and_no_heads_are_refused() -> None:
    with pytest.raises(InputError, match="2 layers of 5 heads, the other for 1 layer of 10 heads"):
        agree(map_of(["static"] * 10), map_of(["static"] * 10, heads=10))
    empty = HeadMap(ModelIdentity("m", 0, 5), (), Rule("given"))
    with pytest.raises(InputError, match="no heads"):
        agree(empty, empty)


def test_changes_come_farthest_first_with_their_distances() -> None:
    a = replace(
        map_of(["static", "static", "dynamic", "dynamic"], 2, Rule("threshold", alpha=0.8)),
        scores=((0.81, 0.95), (0.3, 0.7)),
    )
    b = replace(
        map_of(["dynamic", "dynamic", "static", "dynamic"], 2, Rule("mixture")),
        scores=((0.79, 0.5), (0.31, 0.7)),
        margins=((-0.5, -0.02), (0.4, -3.0)),
        undecided=((1,), ()),
    )
    found = changes(a, b)
    assert [(c.layer, c.head) for c in found] == [(0, 0), (1, 0), (0, 1)]
    assert [c.distances for c in found] == [
        pytest.approx(pair) for pair in [(0.01, 0.5), (0.5, 0.4), (0.15, 0.02)]
    ]
    assert [c.undecided for c in found] == [(None, False), (None, False), (None, True)]
    assert found[2].scores == (0.95, 0.5)
    assert found[2].labels == ("static", "dynamic")


def test_what_a_map_does_not_say_is_unknown() -> None:
    a, b = map_of(["static"] * 5), map_of(["static", "dynamic"] * 2 + ["static"])
    unknown = (None, None)
    assert changes(a, b) == [
        Change(0, head, ("static", "dynamic"), unknown, unknown, unknown) for head in (1, 3)
    ]
    scored = replace(a, scores=((0.1,) * 5,))
    assert changes(scored, b)[0].distances == unknown, "a score without a boundary has no distance"


def test_pairwise() -> None:
    maps = {"a": map_of(["static"] * 5), "b": map_of(["dynamic"] * 5), "c": map_of(["static"] * 5)}
    found = pairwise(maps)
    assert len(found) == 9
    assert {pair for pair, agreement in found.items() if agreement.share == 1} == {
        ("a", "a"),
        ("b", "b"),
        ("c", "c"),
        ("a", "c"),
        ("c", "a"),
    }


def test_score_difference() -> None:
    a = replace(map_of(["static"] * 4, 2), scores=((0.1, 0.5), (0.3, 0.7)))
    b = replace(map_of(["static"] * 4, 2), scores=((0.1, 0.4), (0.6, 0.7)))
    assert score_difference(a, b) == ScoreDifference(pytest.approx(0.1), pytest.approx(0.3), 1, 0)
    assert score_difference(a, map_of(["static"] * 4, 2)) is None
