"""Head maps of other projects: read with nothing lost, nothing invented, and each fault named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcingkv.headmaps import (
    Choices,
    HeadMap,
    InputError,
    ModelIdentity,
    Rule,
    forcingkv_json,
    read_headmap,
)
from forcingkv.headmaps.readers import DUOATTENTION, PYRAMID, read_duoattention, read_pyramid

FIRST_VERSION = Path(__file__).with_name("first-version.json")
"""A map as the first version of forcingkv wrote it."""
WHERE = "map.json"


def written(folder: Path, text: str | bytes, name: str = "map") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "layers:\n- layer_idx: 0\n  static_head: [0]\n  dynamic_head: [1, 2]\n",
        "// a remark\n[[0, 1], [1, 0]]\n",
        "# a remark, and rows\n1,-1\n",
        "static_head(1)\tdynamic_head(0)\n",
    ],
)
def test_text_of_other_kinds_is_not_taken_for_a_table(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is neither JSON nor a table of values; expected a head map"):
        read_headmap(written(tmp_path, text))


def test_one_class_by_number_and_by_name_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "-1,1\n1,2\n")
    with pytest.raises(
        InputError, match="labels are given for -1 and wave, which is the same class; expected each"
    ):
        read_headmap(path, Choices(labels={"wave": "dynamic", "-1": "static"}))


def test_a_cell_without_a_class_is_named_and_no_label_is_offered_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 0, head 2 is ''; expected a class") as raised:
        read_headmap(written(tmp_path, "1,-1,\n1,2,\n"))
    assert raised.value.hint is None


def test_the_classes_of_pyramid_forcing(tmp_path: Path) -> None:
    path = written(tmp_path, "-1,1, 2\r\n1,1,-1\r\n")
    headmap = read_headmap(path)
    assert headmap.labels == (("wave", "anchor", "veil"), ("anchor", "anchor", "wave"))
    assert (headmap.model, headmap.rule) == (ModelIdentity("unknown", 2, 3), Rule("given"))
    assert headmap.source is not None
    assert headmap.source.format == PYRAMID
    assert HeadMap.from_json(json.loads(headmap.to_text())) == headmap
    with pytest.raises(InputError, match="uses the label 'anchor', 'veil', 'wave'; expected only static and"):
        forcingkv_json.to_data(headmap)
    for labels in (
        {"-1": "dynamic", "1": "dynamic", "2": "static"},
        {"wave": "dynamic", "anchor": "dynamic", "veil": "static"},
    ):
        said = read_headmap(path, Choices(model="small", labels=labels))
        assert said.labels == (("dynamic", "dynamic", "static"), ("dynamic",) * 3)
        reason = "labels as given: " + ", ".join(f"{old}={new}" for old, new in labels.items())
        assert (said.rule.reason, said.model.name) == (reason, "small")
    own = read_headmap(written(tmp_path, "10,11\n"), Choices(labels={"10": "static", "11": "dynamic"}))
    assert own.labels == (("static", "dynamic"),)


def test_the_gates_of_duo_attention(tmp_path: Path) -> None:
    path = written(tmp_path, "-1.1e-04\t5.0e-01\n1.000e+00\t4.99e-01\n", "full_attention_heads.tsv")
    headmap = read_headmap(path)
    assert headmap.labels == (("static", "dynamic"), ("dynamic", "static"))
    assert headmap.scores is None, "a retrieval score is no recency score"
    reason = "heads with a retrieval score of at least 0.5 are dynamic (DuoAttention's default)"
    assert headmap.rule == Rule("retrieval", reason, retrieval_threshold=0.5)
    assert headmap.source is not None
    assert headmap.source.format == DUOATTENTION
    assert HeadMap.from_json(json.loads(headmap.to_text())) == headmap
    high = read_headmap(path, Choices(threshold=0.75, labels={"static": "streaming"}))
    assert high.labels == (("streaming",) * 2, ("dynamic", "streaming"))
    assert high.rule.retrieval_threshold == 0.75
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"threshold is .*; expected 0 to 1"):
            read_headmap(path, Choices(threshold=threshold))


@given(st.data())
def test_any_table_is_read_cell_by_cell(data: st.DataObject) -> None:
    layers, heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))

    def rows(cells: st.SearchStrategy[Any]) -> list[list[Any]]:
        return [data.draw(st.lists(cells, min_size=heads, max_size=heads)) for _ in range(layers)]

    classes = rows(st.sampled_from([-1, 1, 2]))
    text = "\n".join(",".join(map(str, row)) for row in classes)
    names = {-1: "wave", 1: "anchor", 2: "veil"}
    found = read_pyramid(text, "", WHERE, Choices())
    assert found.labels == tuple(tuple(names[cell] for cell in row) for row in classes)

    gates, threshold = rows(st.floats(0, 1)), data.draw(st.floats(0, 1))
    text = "".join("\t".join(map(repr, row)) + "\n" for row in gates)
    found = read_duoattention(text, "", WHERE, Choices(threshold=threshold))
    expected = tuple(tuple("dynamic" if gate >= threshold else "static" for gate in row) for row in gates)
    assert found.labels == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a head map"),
        (" \n", "is empty"),
        ("1\n2\n", "has neither tabs nor commas"),
        ("0,5\t0,7\n", "has both tabs and commas"),
        ("hello", "has neither tabs nor commas"),
        (b"\x80\x02}q", "is not text (invalid start byte)"),
        (b"\xff\xfe1\x00,\x00", "is not text"),
        ("1,2,3\n", "layer 0, head 2 is '3'; expected a class: -1 (wave), 1 (anchor), 2 (veil)"),
        ("1,2\n1,0.5\n", "layer 1, head 1 is '0.5'"),
        ("1,2\n1,nan\n", "layer 1, head 1 is 'nan'"),
        ("1,\n", "layer 0, head 1 is ''"),
        ("head0,head1\n1,2\n", "layer 0, head 0 is 'head0'"),
        ("1,2\n1\n", "layer 1 has 1 heads; expected 2, as layer 0 has"),
        ("1,2\n\n1,2\n", "line 2 is empty; expected a row for each layer"),
        ("0.5\t0.5\n0.5\n", "layer 1 has 1 heads; expected 2"),
        ("0.5\tnan\n", "layer 0, head 1 is 'nan'; expected a retrieval score from 0 to 1"),
        ("0.5\tinf\n", "layer 0, head 1 is 'inf'"),
        ("0.5\tx\n", "layer 0, head 1 is 'x'"),
        (
            "-1\t1\t2\n",
            "layer 0, head 0 is '-1'; expected a retrieval score from 0 to 1. If these are classes",
        ),
        ('{"layers": [', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"layers": [{"static_head": [0], "static_head": [1]}]}', "'static_head' is given twice"),
        ("{}", "has neither a schema nor layers"),
        ('{"schema": "x", "layers": [{"layer_idx": 0}]}', "has a schema as forcingkv's maps and layer_idx"),
        ('{"schema": "x", "layers": []}', "schema is 'x'; expected 'forcingkv.headmap/1'"),
    ],
)
def test_a_file_of_no_or_two_formats_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as raised:
        read_headmap(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


CLASSES, GATES = "1,-1\n", "0.1\t0.9\n"
LISTS = '[{"static_head": [0], "dynamic_head": [1]}]'


@pytest.mark.parametrize(
    ("text", "choices", "message"),
    [
        (CLASSES, Choices(threshold=0.5), "is pyramid-forcing-csv, which has no use for --threshold"),
        (LISTS, Choices(threshold=0.5), "is forcing-kv-json, which has no use for --threshold"),
        (
            GATES,
            Choices(missing_layers="static"),
            "has no use for --missing-layers; expected that option with",
        ),
        (CLASSES, Choices(labels={"3": "static"}), "has no class '3'; expected labels for -1, 1"),
        (GATES, Choices(labels={"wave": "static"}), "has no label 'wave'; expected new labels for static"),
        (LISTS, Choices(labels={"veil": "static"}), "has no label 'veil'"),
        (CLASSES, Choices(heads=3), "is for 1 layer of 2 heads; expected 1 layer of 3 heads"),
        (GATES, Choices(layers=30), "expected 30 layers of 2 heads. Use the map made for this model"),
        (LISTS, Choices(heads=3), "layer 0 leaves out head 2"),
    ],
)
def test_choices_that_do_not_fit_are_refused(
    text: str, choices: Choices, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        read_headmap(written(tmp_path, text), choices)
    assert message in str(raised.value)


def test_our_own_maps_are_read_as_before(tmp_path: Path) -> None:
    path = FIRST_VERSION
    headmap = read_headmap(path)
    assert headmap == HeadMap.read(path)
    assert headmap.to_text() == path.read_text(), "fields that came later are not in old files"
    renamed = read_headmap(path, Choices(model="mine"))
    assert (renamed.model.name, renamed.model.weights) == ("mine", None)
    swapped = read_headmap(path, Choices(labels={"static": "dynamic", "dynamic": "static"}))
    assert swapped.counts() == {"static": headmap.counts()["dynamic"], "dynamic": headmap.counts()["static"]}
    assert swapped.rule.reason == f"{headmap.rule.reason}; labels as given: static=dynamic, dynamic=static"
    assert read_headmap(written(tmp_path, b"\xef\xbb\xbf" + path.read_bytes())) == headmap, (
        "a byte order mark"
    )


@pytest.mark.parametrize(
    ("name", "message"), [("layers", "lists the layers"), ("heads", "leaves out head 4, 5")]
)
def test_a_damaged_count_takes_no_memory(name: str, message: str) -> None:
    data = json.loads(FIRST_VERSION.read_text())
    data["model"][name] = 10**12
    for layer in data["layers"]:
        layer.pop("scores"), layer.pop("confidence")
    with pytest.raises(InputError, match=message):
        HeadMap.from_json(data)


@pytest.mark.parametrize(
    "spoil", [lambda d: d["source"].pop("sha256"), lambda d: d["source"].update(layers=[1])]
)
def test_a_faulty_source_is_refused(spoil: Callable[[dict[str, Any]], object]) -> None:
    data = forcingkv_json.from_data(json.loads(LISTS), "", WHERE, Choices()).to_json()
    spoil(data)
    with pytest.raises(InputError, match=r"source: "):
        HeadMap.from_json(data)
