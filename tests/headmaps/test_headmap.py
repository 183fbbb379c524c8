"""Head maps: the file keeps what the map says, and a faulty one is refused with its fault named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import HeadMap, InputError, ModelIdentity, Rule, Statistics


@st.composite
def headmaps(draw: st.DrawFn) -> HeadMap:
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def rows(cell: st.SearchStrategy[Any]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(draw(cell) for _ in range(heads)) for _ in range(layers))

    scores = st.floats(0, 1)
    return HeadMap(
        ModelIdentity(draw(st.text(min_size=1)), layers, heads, draw(st.none() | st.text())),
        rows(st.sampled_from(["static", "dynamic"])),
        Rule("threshold", alpha=draw(scores), sink_frames=1),
        draw(st.none() | st.just(rows(scores))),
        draw(st.none() | st.just(rows(scores))),
        draw(st.none() | st.just(Statistics(3, 4, 5, 6, "full"))),
    )


@given(headmaps())
def test_reading_gives_back_what_was_written(headmap: HeadMap) -> None:
    again = HeadMap.from_json(json.loads(headmap.to_text()))
    assert again == headmap
    assert again.digest == headmap.digest


@given(headmaps())
def test_the_order_puts_groups_side_by_side(headmap: HeadMap) -> None:
    for layer, row in enumerate(headmap.labels):
        order = headmap.order(layer, ["static", "dynamic"])
        assert sorted(order) == list(range(len(row)))
        sorted_labels = [row[head] for head in order]
        assert sorted_labels == ["static"] * row.count("static") + ["dynamic"] * row.count("dynamic")


def plain() -> dict[str, Any]:
    identity = ModelIdentity("demo", 2, 3)
    labels = (("static", "dynamic", "static"), ("dynamic",) * 3)
    return HeadMap(identity, labels, Rule("given"), scores=((0.5,) * 3,) * 2).to_json()


def heads(data: dict[str, Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = data["layers"][0]["heads"]
    return found


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: heads(d)["dynamic"].append(0), "gives head 0 twice"),
        (lambda d: heads(d)["static"].remove(2), "leaves out head 2"),
        (lambda d: heads(d)["static"].append(3), "names head 3; expected 0 to 2"),
        (lambda d: d["layers"].pop(), r"lists the layers \[0\]; expected each of the 2 layers once"),
        (
            lambda d: d["layers"][0]["scores"].__setitem__(1, float("nan")),
            "the number NaN is not a finite number",
        ),
        (
            lambda d: d["layers"][0]["scores"].pop(),
            "layer 0 has 2 scores; expected one for each of the 3",
        ),
        (lambda d: d["layers"][0].update(scores="high"), "expected a list"),
        (lambda d: d.update(schema="forcingkv.headmap/9"), "expected 'forcingkv.headmap/1'"),
        (lambda d: d.pop("rule"), "the field 'rule' is missing"),
        (lambda d: d.update(colour="red"), "unknown field 'colour'"),
    ],
)
def test_a_faulty_map_is_refused(
    spoil: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    data = plain()
    spoil(data)
    path = tmp_path / "headmap.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as raised:
        HeadMap.read(path)
    assert str(path) in str(raised.value)


def test_files_that_are_no_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        HeadMap.read(tmp_path / "absent.json")
    for text, message in [("{", "is not JSON"), ("[]", "expected a table of fields")]:
        path = tmp_path / "headmap.json"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            HeadMap.read(path)


def test_a_map_for_another_model_is_refused() -> None:
    headmap = HeadMap.from_json(plain())
    with pytest.raises(InputError, match=r"is for 2 layers of 3 heads \(demo\); expected 6 layers of 4"):
        headmap.check_model(6, 4, {"static", "dynamic"})
    with pytest.raises(InputError, match="uses the label 'static'; expected only dynamic"):
        headmap.check_model(2, 3, {"dynamic"})


def test_every_shipped_map_fits_its_model() -> None:
    from forcingkv.models.presets import load_spec

    folder = Path(__file__).parents[2] / "headmaps" / "maps"
    maps = [HeadMap.read(path) for path in sorted(folder.glob("*.json"))]
    assert [headmap.model.name for headmap in maps] == [path.stem for path in sorted(folder.glob("*.json"))]
    assert "demo" in {headmap.model.name for headmap in maps}
    for headmap in maps:
        spec = load_spec(headmap.model.name)
        headmap.check_model(spec.layers, spec.heads, {"static", "dynamic"})
        assert headmap.statistics is not None
        assert headmap.scores is not None
