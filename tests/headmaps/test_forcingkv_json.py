"""Forcing-KV's head maps: there and back with nothing lost, nothing invented, and each fault named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forcingkv.headmaps import (
    Choices,
    HeadMap,
    InputError,
    ModelIdentity,
    Rule,
    Statistics,
    forcingkv_json,
    read_headmap,
)
from forcingkv.headmaps.forcingkv_json import DYNAMIC, NAMES, STATIC
from tests.conftest import Ran


def from_json(data: Any, **choices: Any) -> HeadMap:
    return forcingkv_json.from_data(data, "", "map.json", Choices(**choices))


@pytest.mark.parametrize(("model", "static", "dynamic"), [("longlive", 154, 206), ("selfforcing", 134, 226)])
def test_released_maps_make_the_way_to_our_format_and_back(
    model: str, static: int, dynamic: int, data: Path, tmp_path: Path
) -> None:
    path = data / "headmaps" / f"forcingkv_heads_{model}.json"
    original = json.loads(path.read_text())
    headmap = read_headmap(path)
    assert headmap.model == ModelIdentity(original["profile"], 30, 12)
    assert headmap.counts() == {"static": static, "dynamic": dynamic}
    for layer in original["layers"]:
        row = headmap.labels[layer["layer_idx"]]
        assert [head for head, label in enumerate(row) if label == "static"] == layer["static_head"]
    assert headmap.rule == Rule("given"), "what the file tells in prose only is unknown, not guessed"
    assert (headmap.scores, headmap.confidence, headmap.statistics) == (None, None, None)
    assert headmap.source is not None
    assert headmap.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    headmap.write(tmp_path / "ours.json")
    again = read_headmap(tmp_path / "ours.json")
    assert (again, again.digest) == (headmap, headmap.digest)
    assert forcingkv_json.to_data(again) == original
    assert list(forcingkv_json.to_data(again)) == list(original)
    assert forcingkv_json.to_text(again) == path.read_text()


@st.composite
def files(draw: st.DrawFn) -> Any:
    """Forcing-KV files that say all: with or without fields, any names, any order of layers and heads."""
    heads, layers = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    entries = []
    for number in draw(st.permutations(range(layers))):
        order = draw(st.permutations(range(heads)))
        cut = draw(st.integers(0, heads))
        entry: dict[str, Any] = {"layer_idx": number}
        entry[draw(st.sampled_from(NAMES[STATIC]))] = order[:cut]
        entry[draw(st.sampled_from(NAMES[DYNAMIC]))] = order[cut:]
        entries.append(entry | draw(st.just({}) | st.just({"note": [1, {"a": None}]})))
    if draw(st.booleans()):
        return entries
    fields = draw(st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(), max_size=3))
    counts = draw(st.just({}) | st.just({"num_layers": layers, "num_heads": heads}))
    profile = draw(st.just({}) | st.just({"format": "f", "profile": "p", "description": "é\n"}))
    return fields | counts | profile | {"layers": entries}


@given(files())
@example({"0": None, "1": "a note", "layers": [{"layer_idx": 0, "static_head": [], "dynamic_head": [0]}]})
def test_any_forcing_kv_file_makes_the_way_to_our_format_and_back(data: Any) -> None:
    headmap = from_json(data)
    again = HeadMap.from_json(json.loads(headmap.to_text()))
    assert again == headmap
    assert forcingkv_json.to_data(again) == data
    assert json.loads(forcingkv_json.to_text(again)) == data
    for entry in data if isinstance(data, list) else data["layers"]:
        for label, names in NAMES.items():
            heads = [head for name in names for head in entry.get(name, [])]
            assert all(headmap.labels[entry["layer_idx"]][head] == label for head in heads)


@given(st.data())
def test_any_map_of_ours_makes_the_way_to_forcing_kv_and_back(data: st.DataObject) -> None:
    layers, heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    cells = st.lists(st.sampled_from(["static", "dynamic"]), min_size=heads, max_size=heads)
    labels = tuple(tuple(data.draw(cells)) for _ in range(layers))
    scores = ((0.5,) * heads,) * layers
    ours = HeadMap(
        ModelIdentity("demo", layers, heads, "ab"),
        labels,
        Rule("threshold", "it was chosen", alpha=0.8),
        scores,
        statistics=Statistics(1, 2, 3, 4, "full"),
    )
    theirs = forcingkv_json.to_data(ours)
    assert isinstance(theirs, dict)
    assert theirs["description"] == "forcingkv, rule threshold: it was chosen"
    again = from_json(theirs)
    assert (again.labels, again.model) == (labels, ModelIdentity("demo", layers, heads))


@pytest.mark.parametrize("static", NAMES[STATIC])
@pytest.mark.parametrize("dynamic", NAMES[DYNAMIC])
def test_every_name_of_the_lists_is_known(static: str, dynamic: str) -> None:
    headmap = from_json([{"layer_idx": 0, static: [1], dynamic: [0, 2]}])
    assert headmap.labels == (("dynamic", "static", "dynamic"),)


def test_what_a_bare_list_leaves_out() -> None:
    assert from_json([{"static_head": [0], "dynamic_head": [1]}] * 2).labels == (("static", "dynamic"),) * 2
    assert from_json([{"static_head": [0], "dynamic_head": [1]}]).model.name == "unknown"
    half = [{"layer_idx": 0, "static_head": [1]}, {"layer_idx": 1, "temporal_head": [0, 1, 2]}]
    with pytest.raises(InputError, match=r"layer 0 gives only its static heads.*--heads N"):
        from_json(half)
    headmap = from_json(half, heads=3, model="small")
    assert headmap.labels == (("dynamic", "static", "dynamic"), ("dynamic",) * 3)
    assert headmap.rule.reason == "the file gives one list for layer 0, 1: the other is its complement"
    assert headmap.model.name == "small"
    assert forcingkv_json.to_data(headmap) == half
    assert from_json({"num_heads": 3, "layers": half}).labels == headmap.labels
    uneven = [{"static_head": [0], "dynamic_head": [1]}, {"static_head": [0], "dynamic_head": []}]
    with pytest.raises(InputError, match="name different heads: 0 to 0 in layer 1, 0 to 1 in layer 0"):
        from_json(uneven)
    with pytest.raises(InputError, match="layer 1 leaves out head 1"):
        from_json(uneven, heads=2)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Any, tuple[tuple[str, ...], ...]]:
    """A file whose layers are a table by number, in any order and with padded keys, and its labels."""
    heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    cells = st.lists(st.sampled_from(["static", "dynamic"]), min_size=heads, max_size=heads)
    rows = [tuple(draw(cells)) for _ in range(layers)]
    table: dict[str, Any] = {}
    for number in draw(st.permutations(range(layers))):
        key = draw(st.sampled_from([str(number), f"{number:02d}", f"{number:05d}", f" {number}"]))
        lists = [
            [head for head in range(heads) if rows[number][head] == label] for label in (STATIC, DYNAMIC)
        ]
        given = [found or draw(st.sampled_from([[], None])) for found in lists]
        table[key] = dict(zip(("static_head", "temporal_heads"), given, strict=True))
        table[key] |= {"layer_idx": number} if draw(st.booleans()) else {}
    fields = {"format": "f", "num_layers": layers, "num_heads": heads}
    return draw(st.sampled_from([table, {"layers": table}, fields | {"layers": table}])), tuple(rows)


@given(tables())
def test_layers_may_be_a_table_by_number(given: tuple[Any, tuple[tuple[str, ...], ...]]) -> None:
    data, labels = given
    heads = None if "num_heads" in data else len(labels[0])
    headmap = from_json(data, heads=heads)
    assert headmap.labels == labels
    again = HeadMap.from_json(json.loads(headmap.to_text()))
    assert again == headmap
    assert json.loads(forcingkv_json.to_text(again)) == forcingkv_json.to_data(again) == data


def test_a_table_of_layers_is_read_from_a_file_as_the_reference_reads_it(tmp_path: Path) -> None:
    """With a remark beside the layers, which are not in order, and fields beside them without `layers`."""
    path = tmp_path / "map.json"
    path.write_text(
        '{"format": "forcingkv_offline", "num_layers": 3, "meta": {"by": "me"},'
        ' "10": {"layer_idx": 10, "local_head": null, "temporal_head": [0, 1]},'
        ' "0": {"local_head": [1], "temporal_head": [0]}, "01": {"local_head": [0, 1], "temporal_head": []}}'
    )
    with pytest.raises(InputError, match="names layer 10; expected layers 0 to 2"):
        read_headmap(path)
    path.write_text(path.read_text().replace("10", "2"))
    headmap = read_headmap(path)
    assert headmap.labels == (("dynamic", "static"), ("static",) * 2, ("dynamic",) * 2)
    assert headmap.source is not None
    assert headmap.source.fields == {"format": "forcingkv_offline", "num_layers": 3, "meta": {"by": "me"}}
    path.write_text('{"layers": {"note": "by hand", "0": {"local_head": [1], "temporal_head": [0]}}}')
    assert read_headmap(path).labels == (("dynamic", "static"),)
    path.write_text('{"layers": {"0": {"local_head": [1]}, "0": {"local_head": [0]}}}')
    with pytest.raises(InputError, match="'0' is given twice in a table"):
        read_headmap(path)
    path.write_text('{"meta": {"by": "me"}}')
    with pytest.raises(InputError, match="neither a schema nor layers"):
        read_headmap(path)


def test_a_layer_that_is_null_is_left_out_as_the_reference_leaves_it_out() -> None:
    layers = [None, {"static_head": [0], "dynamic_head": [1]}]
    for data in (layers, {"layers": layers}, {"1": layers[1]}, {"layers": {"0": None, "1": layers[1]}}):
        with pytest.raises(InputError, match=r"leaves out layer 0 of 2.*convert map.json --missing-layers"):
            from_json(data)
        headmap = from_json(data, missing_layers="dynamic")
        assert headmap.labels == (("dynamic", "dynamic"), ("static", "dynamic"))
        whole = forcingkv_json.to_data(HeadMap.from_json(json.loads(headmap.to_text())))
        assert from_json(whole).labels == headmap.labels, "what filled the layer up is written out"


@pytest.mark.parametrize(
    ("name", "size", "counts"),
    [
        ("forcingkv_heads_selfforcing.json", (30, 12), {"static": 134, "dynamic": 226}),
        ("forcingkv_heads_causalforcing.json", (30, 12), {"static": 134, "dynamic": 226}),
        ("forcingkv_heads_raven.json", (30, 12), {"static": 134, "dynamic": 226}),
        ("forcingkv_heads_longlive.json", (30, 12), {"static": 154, "dynamic": 206}),
        ("forcingkv_heads_realtime_14b.json", (40, 40), {"static": 800, "dynamic": 800}),
        ("pyramid_forcing_best_labels.csv", (30, 12), {"wave": 156, "anchor": 172, "veil": 32}),
    ],
)
def test_every_released_map_opens(
    name: str, size: tuple[int, int], counts: dict[str, int], data: Path, run: Callable[..., Ran]
) -> None:
    path = data / "headmaps" / name
    headmap = read_headmap(path)
    assert (headmap.model.layers, headmap.model.heads) == size
    assert headmap.counts() == counts
    shown = run("headmap", "show", path, "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["counts"] == counts
    if path.suffix != ".json":
        return
    # The same labels, read in the plainest way, and as a table by number.
    content = json.loads(path.read_text())
    layers = content if isinstance(content, list) else content["layers"]
    for layer in layers:
        row = headmap.labels[layer["layer_idx"]]
        assert [head for head, label in enumerate(row) if label == "static"] == layer["static_head"]
        assert [head for head, label in enumerate(row) if label == "dynamic"] == layer["dynamic_head"]
    table = {f"{layer['layer_idx']:03d}": layer for layer in reversed(layers)}
    assert from_json(table).labels == from_json({"layers": table}).labels == headmap.labels


def test_layers_that_are_absent_must_be_said_to_be_something() -> None:
    data = {"num_layers": 4, "layers": [{"layer_idx": 2, "static_head": [0], "dynamic_head": [1]}]}
    with pytest.raises(InputError, match=r"leaves out layer 0, 1, 3 of 4; expected each.*--missing-layers"):
        from_json(data)
    headmap = from_json(data, missing_layers="dynamic")
    assert headmap.labels == (("dynamic",) * 2, ("dynamic",) * 2, ("static", "dynamic"), ("dynamic",) * 2)
    assert headmap.rule.reason == "the file leaves out layer 0, 1, 3: dynamic, as given"
    filled = forcingkv_json.to_data(headmap)
    assert isinstance(filled, dict)
    assert [layer["layer_idx"] for layer in filled["layers"]] == [0, 1, 2, 3]
    assert len(from_json(data["layers"], layers=3, missing_layers="static").labels) == 3
    with pytest.raises(InputError, match="missing layers is 'both'; expected static or dynamic"):
        from_json(data, missing_layers="both")


def one(**layer: Any) -> dict[str, Any]:
    return {"num_layers": 1, "num_heads": 2, "layers": [{"layer_idx": 0} | layer]}


FULL: dict[str, Any] = {"static_head": [0], "dynamic_head": [1]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (one(static_head=[0, 1], dynamic_head=[1]), "layer 0 gives head 1 twice (static and dynamic)"),
        (one(static_head=[0], local_head=[0], dynamic_head=[1]), "gives head 0 twice (static and static)"),
        (one(static_head=[0], dynamic_head=[]), "layer 0 leaves out head 1; expected each head exactly once"),
        (one(static_head=[0], dynamic_head=[1, 2]), "layer 0 names head 2; expected 0 to 1"),
        (one(static_head=[-1, 0], dynamic_head=[1]), "layer 0 names head -1"),
        (one(static_head=[True], dynamic_head=[0]), "layer 0: static_head names True; expected the number"),
        (one(static_head=["0"], dynamic_head=[1]), "layer 0: static_head names '0'"),
        (
            {**one(static_head=[0], dynamic_head=[1]), "0": {}},
            "has layers, and '0' beside them; expected each",
        ),
        (
            {**one(static_head=[0], dynamic_head=[1]), "heads": [{"static_head": [0]}]},
            "and 'heads' beside them",
        ),
        (one(static_head=[0.0], dynamic_head=[1]), "layer 0: static_head names 0.0"),
        (one(static_head=[float("nan")], dynamic_head=[1]), "the number NaN is not a finite number"),
        (
            one(static_head=None, dynamic_head=[1]),
            "layer 0 leaves out head 0; expected each head exactly once",
        ),
        (one(static_head=None, dynamic_head=None), "layer 0 leaves out head 0, 1"),
        (one(static_head={}, dynamic_head=[1]), "layer 0: static_head is {}; expected a list of heads"),
        (one(statc_head=[0], dynamic_head=[1]), "layer 0 has a list 'statc_head'; expected one of static"),
        (one(), "layer 0 has no list of heads"),
        ({"layers": []}, "has no layers"),
        ({"layers": {}}, "has no layers"),
        ([], "has no layers"),
        ([1], "entry 0 of the layers is 1; expected a table"),
        ([{"layer_idx": 0} | FULL, FULL], "entry 1 of the layers has no layer_idx; expected one in all"),
        ([{"layer_idx": 0} | FULL] * 2, "gives layer 0 twice; expected each layer once"),
        ([{"layer_idx": True} | FULL], "has the layer_idx True"),
        ([{"layer_idx": "0"} | FULL], "has the layer_idx '0'"),
        ([{"layer_idx": -1} | FULL], "has the layer_idx -1"),
        ([{"layer_idx": 10**12} | FULL], "the number of layers is 1000000000001; expected 1 to 4096"),
        ([{"layer_idx": 1} | FULL], "leaves out layer 0 of 2"),
        ({"num_layers": 1, "layers": [{"layer_idx": 1} | FULL]}, "names layer 1; expected layers 0 to 0"),
        ({"num_layers": "1", "layers": [FULL]}, "num_layers is '1'; expected a number"),
        ({"num_layers": 10**9, "layers": [FULL]}, "num_layers is 1000000000; expected 1 to 4096"),
        ({"num_heads": 0, "layers": [FULL]}, "num_heads is 0; expected 1 to 4096"),
        ({"num_heads": True, "layers": [FULL]}, "num_heads is True"),
        ([{"static_head": [10**9], "dynamic_head": []}], "the number of heads is 1000000001"),
        ([{"static_head": [], "dynamic_head": []}], "the number of heads is 0"),
        ({"layers": None}, "has no layers"),
        ({"layers": "0"}, "has no layers; expected a list of"),
        ([None, None], "has no layers; expected a table of heads for each layer"),
        ([None, FULL], "leaves out layer 0 of 2; expected each layer once"),
        ({"num_layers": 3, "layers": {"0": FULL, "2": FULL}}, "leaves out layer 1 of 3"),
        ({"num_layers": 3, "layers": {"0": FULL, "1": None, "2": FULL}}, "leaves out layer 1 of 3"),
        (
            {"layers": {"1": FULL, "01": FULL}},
            "gives layer 1 twice (as '1' and '01'); expected each layer once",
        ),
        ({"num_layers": 1, "layers": {"0": FULL, "1": FULL}}, "names layer 1; expected layers 0 to 0"),
        ({"layers": {"0": FULL, "-1": FULL}}, "has the entry '-1' of the layers; expected the number of a"),
        ({"layers": {"0": FULL, "layer_1": FULL}}, "has the entry 'layer_1' of the layers"),
        ({"layers": {"0": FULL, "x": [0]}}, "has the entry 'x' of the layers"),
        ({"layers": {"0": FULL, "x": None}}, "has the entry 'x' of the layers"),
        ({"layers": {"0": FULL, "1.0": FULL}}, "has the entry '1.0' of the layers"),
        ({"layers": {"0": FULL, "9" * 5000: FULL}}, "has the entry '999"),
        ({"layers": {"99999": FULL}}, "the number of layers is 100000; expected 1 to 4096"),
        ({"layers": {"0": [0, 1]}}, "entry '0' of the layers is [0, 1]; expected a table"),
        (
            {"layers": {"0": {"layer_idx": 1} | FULL}},
            "entry '0' of the layers has the layer_idx 1; expected 0, as",
        ),
        ({"0": FULL, "layer_1": FULL}, "has the entry 'layer_1' of the layers"),
        ({"0": FULL, "02": FULL}, "leaves out layer 1 of 3"),
    ],
)
def test_a_faulty_forcing_kv_file_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as raised:
        read_headmap(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_damaged_source_in_a_head_map_is_named() -> None:
    given = {"layer_idx": 0, "static_heads": [0], "dynamic_head": [1]}
    headmap = forcingkv_json.from_data([given], "", "map.json", Choices())
    assert headmap.source
    assert headmap.source.layers
    damaged = replace(headmap.source, layers=({**given, "dynamic_head": [7]},))
    with pytest.raises(
        InputError, match=r"the source in the head map: layer 0 names head 7; expected 0 to 1"
    ):
        forcingkv_json.to_data(replace(headmap, source=damaged))
