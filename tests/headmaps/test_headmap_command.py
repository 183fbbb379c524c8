"""forcingkv headmap: show, validate and convert maps of every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.headmaps import HeadMap, ModelIdentity, Rule, read_headmap
from tests.conftest import Ran

MAPS = Path(__file__).parents[2] / "headmaps" / "maps"
CLASSES = "-1,1,2\n1,1,-1\n"


@pytest.mark.parametrize(("model", "static", "dynamic"), [("longlive", 154, 206), ("selfforcing", 134, 226)])
def test_show_json(model: str, static: int, dynamic: int, data: Path, run: Callable[..., Ran]) -> None:
    path = data / "headmaps" / f"forcingkv_heads_{model}.json"
    ran = run("headmap", "show", path, "--json")
    shown = json.loads(ran.out)
    assert {name: shown[name] for name in ("layers", "heads", "static", "dynamic")} == {
        "layers": 30,
        "heads": 12,
        "static": static,
        "dynamic": dynamic,
    }
    headmap = read_headmap(path)
    assert shown["digest"] == headmap.digest
    assert shown["labels"] == [list(row) for row in headmap.labels]
    assert shown["source"]["fields"]["profile"].startswith(model)
    assert shown["rule"]["sink_frames"] is None


def test_show_draws_each_layer_and_says_where_it_came_from(data: Path, run: Callable[..., Ran]) -> None:
    path = data / "headmaps" / "forcingkv_heads_longlive.json"
    lines = run("headmap", "show", path).out.splitlines()
    rows = read_headmap(path).labels
    for line, row in zip(lines[: len(rows)], rows, strict=True):
        letters = line.split()[1:13]
        assert letters == [label[0].upper() for label in row]
        assert line.endswith(f"{row.count('static')} static, {row.count('dynamic')} dynamic")
    assert lines[30] == "longlive_naive_sink_3_thr08, 30 layers x 12 heads: 154 static, 206 dynamic"
    rest = "\n".join(lines[31:])
    assert "rule: given" in rest
    assert "source: forcing-kv-json, sha256 124ec00d" in rest
    assert "mass over key frames [3:] >= 0.800000; otherwise dynamic." in rest, "no line is broken"


def test_show_keeps_wide_maps_on_one_line_each(tmp_path: Path, run: Callable[..., Ran]) -> None:
    labels = (("static", "dynamic") * 20,) * 2
    HeadMap(ModelIdentity("wide", 2, 40), labels, Rule("given")).write(tmp_path / "map.json")
    lines = run("headmap", "show", tmp_path / "map.json").out.splitlines()
    assert lines[:2] == [f"  {layer}  {'SD' * 20} 20 static, 20 dynamic" for layer in (0, 1)]


def test_labels_that_begin_alike_get_letters_of_their_own(tmp_path: Path, run: Callable[..., Ran]) -> None:
    labels = (("static", "sink", "sinks", "dummy", "dynamic"),)
    HeadMap(ModelIdentity("m", 1, 5), labels, Rule("given")).write(tmp_path / "map.json")
    lines = run("headmap", "show", tmp_path / "map.json").out.splitlines()
    assert lines[0].split()[1:6] == ["S", "I", "N", "U", "D"]
    assert lines[2] == "S static, D dynamic, U dummy, I sink, N sinks"


def test_validate(data: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = data / "headmaps" / "forcingkv_heads_longlive.json"
    ran = run("headmap", "validate", path, "--model", "longlive")
    assert (ran.code, ran.out) == (0, f"{path}: 30 layers x 12 heads, each labelled once\n")
    ran = run("headmap", "validate", path, "--model", "demo")
    assert ran.code == 2
    assert f"{path} is for 30 layers of 12 heads; expected 6 layers of 4 heads." in ran.err
    (tmp_path / "a.csv").write_text(CLASSES)
    assert (
        "labels anchor, veil, wave: the policy forcing-kv"
        in run("headmap", "validate", tmp_path / "a.csv").out
    )
    assert json.loads(run("headmap", "validate", tmp_path / "a.csv", "--json").out)["counts"] == {
        "wave": 2,
        "veil": 1,
        "anchor": 3,
    }
    (tmp_path / "b.json").write_text('[{"layer_idx": 1, "static_head": [0], "dynamic_head": [1]}]')
    ran = run("headmap", "validate", tmp_path / "b.json")
    assert (ran.code, ran.out) == (2, "")
    assert "leaves out layer 0 of 2" in ran.err
    assert "--missing-layers" in ran.err


def test_convert_there_and_back(data: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = data / "headmaps" / "forcingkv_heads_longlive.json"
    ours, theirs = tmp_path / "new" / "ours.json", tmp_path / "theirs.json"
    theirs.write_text("an old file")
    ran = run("headmap", "convert", path, "--model", "longlive", "--out", ours)
    assert (ran.code, ran.out) == (0, f"{ours}: 30 layers x 12 heads, 154 static, 206 dynamic\n")
    assert HeadMap.read(ours).model == ModelIdentity("longlive", 30, 12)
    ran = run("headmap", "convert", ours, "--to", "forcing-kv-json", "--out", theirs, "--json")
    assert json.loads(ran.out)["static"] == 154
    assert json.loads(theirs.read_text()) == json.loads(path.read_text())
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["new", "ours.json", "theirs.json"]


def test_convert_takes_what_a_file_leaves_open(tmp_path: Path, run: Callable[..., Ran]) -> None:
    out = tmp_path / "out.json"
    files = {
        "a.csv": (CLASSES, ["--labels", "-1=dynamic,1=dynamic, 2=static"], 1),
        "b.tsv": ("0.4\t0.6\n", ["--threshold", 0.3], 0),
        "c.json": ('[{"layer_idx": 1, "static_head": [2]}]', ["--heads", 3, "--missing-layers", "static"], 4),
        "d.json": (json.dumps([{"static_head": [0]}] * 6), ["--model", "demo"], 6),
    }
    for name, (text, words, static) in files.items():
        (tmp_path / name).write_text(text)
        ran = run("headmap", "convert", tmp_path / name, *words, "--out", out)
        assert ran.code == 0, ran.err
        headmap = HeadMap.read(out)
        assert headmap.counts().get("static", 0) == static
        assert headmap.rule.reason, "what was chosen is on record"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "yaml"], "--to is 'yaml'; expected one of forcingkv, forcing-kv-json"),
        (["--to", "forcing-kv-json"], "uses the label 'anchor', 'veil', 'wave'"),
        (["--labels", "-1"], "--labels is '-1'; expected old=new,old=new"),
        (["--labels", "-1=static,-1=dynamic"], "each old one once"),
        (["--model", "demo"], "is for 2 layers of 3 heads; expected 6 layers of 4 heads"),
        (["--model", "demo", "--heads", 3], "--heads is 3; expected 4, as demo has"),
        (["--threshold", 0.5], "has no use for --threshold"),
        (["--out", "FOLDER/a.csv/out.json"], "out.json cannot be written"),
    ],
)
def test_convert_refuses(words: list[str], message: str, tmp_path: Path, run: Callable[..., Ran]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(CLASSES)
    given = [str(word).replace("FOLDER", str(tmp_path)) for word in words]
    ran = run("headmap", "convert", path, "--out", tmp_path / "out.json", *given)
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


@pytest.mark.parametrize("name", ["show", "validate", "convert"])
def test_help_has_an_example(name: str, run: Callable[..., Ran]) -> None:
    assert f"Example: forcingkv headmap {name}" in run("headmap", name, "--help").out


def test_the_shipped_maps_are_shown(run: Callable[..., Ran]) -> None:
    for path in MAPS.glob("*.json"):
        shown = json.loads(run("headmap", "show", path, "--json").out)
        assert shown["digest"] == HeadMap.read(path).digest
