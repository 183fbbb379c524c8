"""Head maps where none was given: shares of labels, spread evenly over the layers of any model."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import HeadMap, InputError
from forcingkv.measure.nominal import known_map, map_with_counts, nominal_map
from forcingkv.models.presets import load_spec
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.shipped import shipped_names
from forcingkv.runtime.spec import ModelSpec
from tests.conftest import small_spec

LABELS = [f"label {place}" for place in range(9)]


def sized(layers: int, heads: int) -> ModelSpec:
    return small_spec(layers=layers, heads=heads)


def test_shares_that_divide_are_exact_in_every_layer() -> None:
    headmap = map_with_counts(sized(7, 12), ["a", "b", "c"], {"a": 50, "b": 25, "c": 25})
    assert set(headmap.labels) == {("a",) * 6 + ("b",) * 3 + ("c",) * 3}


def test_counts_of_the_model_itself_stay_what_they_are() -> None:
    counts = {"static": 134, "dynamic": 226}
    headmap = map_with_counts(sized(30, 12), ["static", "dynamic"], counts)
    assert headmap.counts() == counts
    assert {row.count("static") for row in headmap.labels} == {4, 5}


def test_what_is_left_over_lies_all_through_the_depth() -> None:
    """14 of 30 layers have a fifth static head: about as many in each third."""
    headmap = map_with_counts(sized(30, 12), ["static", "dynamic"], {"static": 134, "dynamic": 226})
    more = [row.count("static") == 5 for row in headmap.labels]
    thirds = [sum(more[start : start + 10]) for start in (0, 10, 20)]
    assert sum(thirds) == 14
    assert min(thirds) >= 4


def test_counts_of_another_size_are_scaled() -> None:
    headmap = map_with_counts(sized(3, 4), ["static", "dynamic"], {"static": 134, "dynamic": 226})
    assert headmap.counts() == {"static": 4, "dynamic": 8}  # 4.47 and 7.53 of 12


def test_labels_stand_in_the_order_of_the_policy() -> None:
    headmap = map_with_counts(sized(2, 4), {"b": None, "a": None}, {"a": 2, "b": 6})
    assert headmap.labels == (("b", "b", "b", "a"),) * 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 16), st.lists(st.integers(0, 400), min_size=1, max_size=9))
def test_heads_are_shared_out_as_evenly_as_can_be(layers: int, heads: int, numbers: list[int]) -> None:
    counts = dict(zip(LABELS[: len(numbers)], numbers, strict=True))
    if not sum(numbers):
        numbers[0] = counts[LABELS[0]] = 1
    headmap = map_with_counts(sized(layers, heads), list(counts), counts)
    assert [len(row) for row in headmap.labels] == [heads] * layers
    for label, number in counts.items():
        found = [row.count(label) for row in headmap.labels]
        assert max(found) - min(found) <= 1
        assert abs(sum(found) - number / sum(numbers) * layers * heads) < 1
        if (number * heads) % sum(numbers) == 0:
            assert set(found) == {number * heads // sum(numbers)}
        if not number:
            assert not sum(found)


@pytest.mark.parametrize(
    "counts", [{}, {"static": 0, "dynamic": 0}, {"fast": 3}, {"static": -1, "dynamic": 3}]
)
def test_counts_that_share_nothing_out_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"heads are .*expected some of the labels static, dynamic"):
        map_with_counts(small_spec(), ["static", "dynamic"], counts)


@pytest.mark.parametrize(
    ("model", "static"),
    [
        ("self-forcing", 134),
        ("causal-forcing", 134),
        ("raven", 134),
        ("raven-cmgrpo", 134),
        ("longlive", 154),
        ("krea-14b", 800),
    ],
)
def test_published_models_have_as_many_heads_of_each_label_as_published(model: str, static: int) -> None:
    spec, policy = load_spec(model), load_policy("forcing-kv")
    counts = {"static": static, "dynamic": spec.layers * spec.heads - static}
    headmap = nominal_map(spec, policy)
    assert headmap is not None
    assert headmap.counts() == counts


def test_the_demo_model_gets_the_map_that_ships() -> None:
    file = resources.files("forcingkv.headmaps") / "maps" / "demo.json"
    shipped = HeadMap.from_json(json.loads(file.read_text(encoding="utf-8")))
    spec, policy = load_spec("demo"), load_policy("forcing-kv")
    assert nominal_map(spec, policy) == shipped
    assert known_map(spec, policy) == (shipped, "7 static, 17 dynamic: the map that ships")


def test_a_map_that_ships_is_not_taken_for_a_model_of_another_size() -> None:
    spec = load_spec("demo")
    with pytest.raises(InputError, match="no head map of demo"):
        nominal_map(replace(spec, layers=spec.layers + 1), load_policy("forcing-kv"))


@pytest.mark.parametrize("model", [*shipped_names("forcingkv.models.presets"), "small"])
def test_dummy_forcing_works_for_any_model(model: str) -> None:
    spec = small_spec() if model == "small" else load_spec(model)
    policy = load_policy("dummy-forcing")
    headmap = nominal_map(spec, policy)
    assert headmap is not None
    total = spec.layers * spec.heads
    assert headmap.counts() == {"dummy": total / 2, "sink": total / 4, "neighbour": total / 4}
    if spec.context == "recompute":
        with pytest.raises(InputError, match="expected the newest 3 latent frames in every head"):
            build_plan(spec, spec.geometry(), policy, headmap)
        return
    assert build_plan(spec, spec.geometry(), policy, headmap).kv_bytes() > 0


@pytest.mark.parametrize("policy", ["full", "window"])
def test_policies_without_groups_need_no_map(policy: str) -> None:
    assert nominal_map(load_spec("self-forcing"), load_policy(policy)) is None
    assert nominal_map(small_spec(), load_policy(policy)) is None


def test_for_an_unknown_model_the_known_ones_are_named() -> None:
    spec, policy = small_spec(), load_policy("forcing-kv")
    assert known_map(spec, policy) is None
    with pytest.raises(InputError, match=r"no head map of small for the policy forcing-kv.*longlive.*--head"):
        nominal_map(spec, policy)


def test_a_policy_with_other_groups_under_a_known_name_is_unknown() -> None:
    policy = replace(load_policy("dummy-forcing"), groups={"sink": (), "other": ()})
    assert known_map(load_spec("self-forcing"), policy) is None


def test_counts_that_were_scaled_are_not_said_to_be_published() -> None:
    spec = replace(load_spec("self-forcing"), layers=15)
    known = known_map(spec, load_policy("forcing-kv"))
    assert known is not None
    assert known[1] == "67 static, 113 dynamic in published shares, spread evenly over the layers"


def test_what_is_assumed_of_a_frame_wise_model_is_said() -> None:
    spec = load_spec("causal-forcing++-1step")
    known = known_map(spec, load_policy("forcing-kv"))
    assert known is not None
    assert known[1].startswith(
        "134 static, 226 dynamic as published for self-forcing, assumed for causal-forcing++-1step too"
    )
