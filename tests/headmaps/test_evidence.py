"""The evidence in a head map: kept in the file, checked, absent from files that never had it. Errors."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import (
    Budget,
    HeadMap,
    InputError,
    MissingExtraError,
    ModelIdentity,
    Rule,
    Statistics,
)
from forcingkv.headmaps.headmap import Budget as BudgetOfOld

MAPS = Path(__file__).parents[2] / "headmaps" / "maps"

numbers = st.floats(-10, 10)
centers = st.none() | st.tuples(numbers, numbers)
budgets = st.builds(
    Budget,
    st.text(),
    st.text(),
    kv_bytes=st.none() | st.integers(0, 2**40),
    time_ratio=st.none() | st.floats(0, 1),
)
rules = st.builds(
    Rule,
    st.sampled_from(["kmeans", "mixture", "budget", "quota"]),
    static_center=centers,
    dynamic_center=centers,
    boundary=st.none() | st.tuples(numbers, numbers, numbers),
    budget=st.none() | budgets,
    undecided=st.sampled_from([None, "kept", "dynamic"]),
)
statistics = st.builds(
    Statistics,
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(),
    st.just("full"),
    rows=st.none() | st.integers(1, 999),
    resolution=st.none() | st.text(),
)


@st.composite
def headmaps(draw: st.DrawFn) -> HeadMap:
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    margins = st.tuples(*(st.tuples(*(numbers for _ in range(heads))) for _ in range(layers)))
    some = st.sets(st.integers(0, heads - 1)).map(lambda found: tuple(sorted(found)))
    return HeadMap(
        ModelIdentity("small", layers, heads),
        (("static", "dynamic", "static", "static")[:heads],) * layers,
        draw(rules),
        statistics=draw(st.none() | statistics),
        margins=draw(st.none() | margins),
        undecided=draw(st.none() | st.tuples(*(some for _ in range(layers)))),
    )


def given_map(**changes: Any) -> HeadMap:
    labels = (("static", "dynamic", "static"), ("dynamic",) * 3)
    return replace(HeadMap(ModelIdentity("demo", 2, 3), labels, Rule("given")), **changes)


FULL = given_map(
    margins=((0.5, -1.0, 0.25),) * 2,
    undecided=((1,), ()),
    rule=Rule("budget", undecided="kept", budget=Budget("forcing-kv", "480p", kv_bytes=9)),
    statistics=Statistics(3, 5, 4, 0, "full", rows=64, resolution="832x480"),
)


@given(headmaps())
def test_reading_gives_back_the_evidence(headmap: HeadMap) -> None:
    again = HeadMap.from_json(json.loads(headmap.to_text()))
    assert again == headmap
    assert again.to_text() == headmap.to_text()
    assert again.digest == headmap.digest


def test_evidence_is_written_where_it_belongs() -> None:
    data = FULL.to_json()
    assert [layer["margins"] for layer in data["layers"]] == [[0.5, -1.0, 0.25]] * 2
    assert [layer["undecided"] for layer in data["layers"]] == [[1], []]
    assert data["rule"]["undecided"] == "kept"
    assert data["rule"]["budget"] == {
        "policy": "forcing-kv",
        "resolution": "480p",
        "kv_bytes": 9,
        "time_ratio": None,
    }
    assert (data["statistics"]["rows"], data["statistics"]["resolution"]) == (64, "832x480")


def test_every_part_of_the_evidence_counts_in_the_digest() -> None:
    parts: list[dict[str, Any]] = [
        {"margins": None},
        {"margins": ((0.5, -1.0, 0.5),) * 2},
        {"undecided": None},
        {"undecided": ((), ())},
        {"rule": replace(FULL.rule, undecided="dynamic")},
        {"rule": replace(FULL.rule, budget=None)},
        {"rule": replace(FULL.rule, static_center=(1.0, 2.0))},
        {"rule": replace(FULL.rule, boundary=(1.0, 2.0, 3.0))},
    ]
    assert len({FULL.digest, *(replace(FULL, **part).digest for part in parts)}) == len(parts) + 1


@pytest.mark.parametrize("path", sorted(MAPS.glob("*.json")), ids=lambda path: path.name)
def test_shipped_maps_are_written_back_byte_for_byte(path: Path) -> None:
    assert HeadMap.read(path).to_text().encode() == path.read_bytes()


def test_a_file_from_before_there_was_evidence_keeps_its_text() -> None:
    """What came later is left out where it is absent, so the digests in old bundles hold."""
    old = {
        "schema": "forcingkv.headmap/1",
        "model": {"name": "demo", "layers": 1, "heads": 2, "weights": None},
        "rule": {
            "name": "clusters",
            "reason": None,
            "alpha": 0.5,
            "static_per_layer": None,
            "sink_frames": 1,
        },
        "layers": [
            {"layer": 0, "heads": {"static": [1], "dynamic": [0]}, "scores": [0.2, 0.9], "confidence": None}
        ],
        "statistics": {"samples": 2, "chunks": 5, "steps": 4, "seed": 0, "policy": "full"},
    }
    headmap = HeadMap.from_json(copy.deepcopy(old))
    assert headmap.margins is headmap.undecided is headmap.rule.undecided is headmap.rule.budget is None
    assert headmap.statistics is not None
    assert headmap.statistics.rows is headmap.statistics.resolution is None
    assert headmap.to_text() == json.dumps(old, indent=1) + "\n"


def test_evidence_that_only_some_layers_have_counts_as_none() -> None:
    data = FULL.to_json()
    del data["layers"][0]["margins"], data["layers"][1]["undecided"]
    headmap = HeadMap.from_json(data)
    assert headmap.margins is headmap.undecided is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d["layers"][1]["margins"].pop(), "layer 1 has 2 margins; expected one for each of the 3"),
        (lambda d: d["layers"][0].update(margins=[]), "layer 0 has 0 margins"),
        (lambda d: d["layers"][0].update(margins=[1, 2, float("inf")]), "is inf; expected a finite number"),
        (
            lambda d: d["layers"][0].update(undecided=[0, 3]),
            r"calls the heads \[0, 3\] undecided; expected heads 0 to 2",
        ),
        (lambda d: d["layers"][0].update(undecided=[1, 1]), "in order, each once"),
        (lambda d: d["layers"][1].update(undecided=[-1]), r"layer 1 calls the heads \[-1\] undecided"),
        (lambda d: d["layers"][0].update(undecided=[0.5]), "expected a value of type int"),
        (lambda d: d["layers"][0].update(undecided=[True]), "expected a value of type int"),
        (lambda d: d["rule"].update(undecided="open"), "expected 'kept' or 'dynamic'"),
        (lambda d: d["rule"]["budget"].pop("policy"), "budget: the field 'policy' is missing"),
        (lambda d: d["rule"]["budget"].update(watts=3), "budget: unknown field 'watts'"),
        (lambda d: d["rule"].update(static_center="far"), "static_center is 'far'; expected a list"),
        (lambda d: d["statistics"].update(rows="all"), "statistics: rows is 'all'"),
    ],
)
def test_faulty_evidence_is_refused(spoil: Callable[[dict[str, Any]], object], message: str) -> None:
    data = FULL.to_json()
    spoil(data)
    with pytest.raises(InputError, match=message) as raised:
        HeadMap.from_json(data, "headmap.json")
    assert str(raised.value).startswith("headmap.json")


def test_a_budget_is_the_same_wherever_it_is_imported_from() -> None:
    assert BudgetOfOld is Budget
    assert [field.name for field in fields(Budget)] == ["policy", "resolution", "kv_bytes", "time_ratio"]


# --- errors -----------------------------------------------------------------------------------------

texts = st.none() | st.text()


@given(st.text(), texts, texts, texts)
def test_an_error_comes_back_from_another_process_whole(
    what: str, where: str | None, expected: str | None, hint: str | None
) -> None:
    error = InputError(what, where=where, expected=expected, hint=hint)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is InputError
        assert str(again) == str(error)
        assert (again.what, again.where, again.expected, again.hint) == (what, where, expected, hint)


def test_an_error_of_a_missing_extra_comes_back_whole() -> None:
    error = MissingExtraError("ray", "workers")
    error.add_note("in worker 3")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is MissingExtraError
    assert str(again) == (
        "this needs ray, which is not installed. Install it with: pip install 'forcingkv[workers]'"
    )
    assert again.__dict__ == error.__dict__
    assert again.__notes__ == ["in worker 3"]
