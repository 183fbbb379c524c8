"""forcingkv analyze compare: two maps or runs, for people, for machines, and as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import image

from forcingkv.analyze.comparison import short_names
from forcingkv.analyze.comparison_picture import comparison_picture
from forcingkv.analyze.recipes import recipe_parts
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule, Statistics, read_headmap
from tests.conftest import Ran

Run = Callable[..., Ran]
MEASURED = Statistics(8, 4, 4, 0, "full")


def map_of(rows: str, **values: object) -> HeadMap:
    """A map from rows of letters, such as "SD DD"."""
    names = {"S": "static", "D": "dynamic", "X": "dummy", "Y": "sink"}
    labels = tuple(tuple(names[letter] for letter in row) for row in rows.split())
    made = HeadMap(ModelIdentity("m", len(labels), len(labels[0])), labels, Rule("threshold", alpha=0.8))
    return replace(made, **values)  # type: ignore[arg-type]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs: three heads of eight differ; two of those are undecided, one of them in both."""
    a = map_of(
        "SSDD DDSS",
        statistics=MEASURED,
        scores=((0.9, 0.81, 0.1, 0.79), (0.2, 0.3, 0.95, 0.99)),
        undecided=((1, 3), ()),
    )
    b = map_of(
        "SDDS DDSD",
        statistics=MEASURED,
        scores=((0.9, 0.79, 0.1, 0.82), (0.2, 0.3, 0.95, 0.5)),
        undecided=((1,), ()),
    )
    for name, headmap in (("heads-a", a), ("heads-b", b)):
        headmap.write(tmp_path / name / "headmap.json")
    return tmp_path / "heads-a", tmp_path / "heads-b"


def pixels(png: bytes) -> npt.NDArray[np.float32]:
    """Height, width, colours: from 0 to 1."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return np.asarray(image.imread(io.BytesIO(png), format="png"))


def shows(picture: npt.NDArray[np.float32], colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture[..., :3] * 255 - colour).max(-1) < 1.5).sum() > 50)


def test_two_runs_for_people(runs: tuple[Path, Path], run: Run) -> None:
    ran = run("analyze", "compare", *runs)
    assert (ran.code, ran.err) == (0, "")
    lines = [line.rstrip() for line in ran.out.splitlines()]
    assert lines[0].endswith("heads-a: m, 2 layers x 4 heads, 4 static, 4 dynamic, rule threshold, 8 samples")
    assert lines[3:6] == [
        "  0  . D . S  2 changed",
        "  1  . . . D  1 changed",
        ". same in both, S static in B, D dynamic in B",
    ]
    assert [" ".join(line.split()) for line in lines[8:11]] == [
        "1 3 static -> dynamic 0.990 -> 0.500 0.190 -> 0.300 no -> no",
        "0 3 dynamic -> static 0.790 -> 0.820 0.010 -> 0.020 yes -> no",
        "0 1 static -> dynamic 0.810 -> 0.790 0.010 -> 0.010 yes -> yes",
    ], "the farthest from a boundary first"
    assert lines[-5:] == [
        "agreement 62.5% (5 of 8 heads), Cohen's kappa 0.250, adjusted Rand -0.082",
        "IoU: dynamic 0.500, static 0.400",
        "scores differ by 0.067 on average, at most 0.490 (layer 1, head 3)",
        "3 heads changed: static -> dynamic 2, dynamic -> static 1",
        "undecided in at least one map: 2 of them; uncertainty does not explain the other 1",
    ]


def test_two_runs_for_machines(runs: tuple[Path, Path], run: Run) -> None:
    found = json.loads(run("analyze", "compare", *runs, "--json", "--limit", 1).out)
    assert found["agreement"] == 0.625
    assert found["kappa"] == pytest.approx(0.25)
    assert found["iou"] == pytest.approx({"static": 0.4, "dynamic": 0.5})
    assert (found["heads"], found["changed"], found["changed_undecided"]) == (8, 3, 2)
    assert found["moves"] == [
        {"labels": ["static", "dynamic"], "heads": 2},
        {"labels": ["dynamic", "static"], "heads": 1},
    ]
    assert len(found["changes"]) == 3, "a limit is for people"
    assert found["changes"][0] == {
        "layer": 1,
        "head": 3,
        "labels": ["static", "dynamic"],
        "scores": [0.99, 0.5],
        "distances": [pytest.approx(0.19), pytest.approx(0.3)],
        "undecided": [False, False],
    }
    for side, folder in zip("ab", runs, strict=True):
        assert found[side]["path"] == str(folder)
        assert found[side]["digest"] == HeadMap.read(folder / "headmap.json").digest
        assert found[side]["statistics"]["samples"] == 8


@pytest.mark.parametrize(
    ("undecided", "line"),
    [
        (((1, 3), (3,)), "each of them is undecided in at least one map: uncertainty explains"),
        (((0,), ()), "none of them is undecided in either map"),
        (None, "A does not say which heads are undecided"),
    ],
)
def test_whether_uncertainty_explains_it(
    undecided: tuple[tuple[int, ...], ...] | None, line: str, runs: tuple[Path, Path], run: Run
) -> None:
    a, b = (HeadMap.read(folder / "headmap.json") for folder in runs)
    replace(a, undecided=undecided).write(runs[0] / "headmap.json")
    replace(b, undecided=((), ())).write(runs[1] / "headmap.json")
    assert line in run("analyze", "compare", *runs).out
    replace(b, undecided=((), ()), statistics=None).write(runs[1] / "headmap.json")
    ran = run("analyze", "compare", *runs)
    assert line not in ran.out, "only for two maps that were measured"
    assert json.loads(run("analyze", "compare", *runs, "--json").out)["changed_undecided"] is None


def test_a_run_against_a_file_and_limits(runs: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    layers = [([2, 3], [0, 1]), ([0, 1, 2, 3], [])]
    rows = [{"layer_idx": n, "static_head": s, "dynamic_head": d} for n, (s, d) in enumerate(layers)]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    out = run("analyze", "compare", runs[0], tmp_path / "b.json", "--limit", 2).out
    assert "and 4 more (--limit 6 lists all)" in out
    assert "0.990" not in out, "its label is the same"
    assert "0.100 -> unknown" in out
    assert "no -> unknown" in out
    assert "Distances are in the units of each map's own rule." in out
    assert "lists all" not in run("analyze", "compare", runs[0], tmp_path / "b.json").out
    none = run("analyze", "compare", runs[0], tmp_path / "b.json", "--limit", 0)
    assert "label A -> B" not in none.out
    assert "6 heads changed" in none.out
    same = run("analyze", "compare", runs[0], runs[0] / "headmap.json")
    assert same.out.endswith("no head changed\n")


def test_foreign_maps(data: Path, tmp_path: Path, run: Run) -> None:
    files = [data / "headmaps" / f"forcingkv_heads_{name}.json" for name in ("longlive", "selfforcing")]
    a, b = (np.array(read_headmap(file).labels) for file in files)
    found = json.loads(run("analyze", "compare", *files, "--json", "--out", tmp_path / "x.png").out)
    assert found["agreement"] == (a == b).mean()
    assert {(c["layer"], c["head"]) for c in found["changes"]} == set(zip(*np.nonzero(a != b), strict=True))
    assert all(c["distances"] == [None, None] for c in found["changes"])
    assert found["picture"] == str(tmp_path / "x.png")
    rows = run("analyze", "compare", *files).out.splitlines()[3:33]
    for row, old, new in zip(rows, a, b, strict=True):
        shown = ["." if x == y else y[0].upper() for x, y in zip(old, new, strict=True)]
        assert row.split()[1:13] == shown


def test_classes_of_pyramid_against_gates_of_duoattention(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.csv").write_text("-1,1,2\n1,1,-1\n")
    (tmp_path / "b.tsv").write_text("0.4\t0.6\t0.9\n0\t0\t1\n")
    HeadMap.write(map_of("SDD SSD"), tmp_path / "c.json")
    ran = run(
        "analyze", "compare", tmp_path / "a.csv", tmp_path / "c.json", "--out", tmp_path / "o" / "p.png"
    )
    assert ran.code == 0
    assert "agreement 0.0% (0 of 6 heads)" in ran.out
    assert "anchor -> static 2" in ran.out
    assert ran.out.endswith(f"picture: {tmp_path / 'o' / 'p.png'}\n")
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["p.png"], "nothing else is left behind"
    alike = run("analyze", "compare", tmp_path / "b.tsv", tmp_path / "c.json", "--min-agreement", 1)
    assert (alike.code, alike.err) == (0, "")


@pytest.mark.parametrize(("least", "code"), [(0.625, 0), (0, 0), (0.63, 1), (1, 1)])
def test_least_agreement(least: float, code: int, runs: tuple[Path, Path], run: Run) -> None:
    ran = run("analyze", "compare", *runs, "--min-agreement", least)
    assert ran.code == code
    assert ran.err == (f"error: agreement 0.6250 is below {float(least)}\n" if code else "")
    assert "3 heads changed" in ran.out, "the result is printed all the same"


@pytest.mark.parametrize(
    "size", [(6, 4), (30, 12), (1, 1), (120, 130), pytest.param((40, 40), marks=pytest.mark.long)]
)
def test_pictures_of_every_size(size: tuple[int, int]) -> None:
    layers, heads = size
    drawn = np.random.default_rng(0).choice([*"SD"], size=(2, layers, heads))
    a, b = (map_of(" ".join("".join(row) for row in rows)) for rows in drawn)
    png = comparison_picture(a, b, ("a", "b"))
    height, width, _ = pixels(png).shape
    assert 250 <= height <= 2000
    assert 400 <= width <= 2200


def test_the_same_maps_give_the_same_bytes() -> None:
    first, second = (comparison_picture(map_of("SD SD DS"), map_of("SS DD DD"), ("a", "b")) for _ in range(2))
    assert first == second


def test_colours_say_what_changed() -> None:
    def picture(a: str, b: str, **values: object) -> npt.NDArray[np.float32]:
        return pixels(comparison_picture(map_of(a, **values), map_of(b), ("a", "b")))

    same_static, same_dynamic = (0xCF, 0xE2, 0xF0), (0xE9, 0xE9, 0xE9)
    lost, gained, other = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)
    seen = [
        [shows(picture(a, "SD SD"), colour) for colour in (same_static, same_dynamic, lost, gained, other)]
        for a in ("SD SD", "SD SS", "DD SD", "SD SX")
    ]
    assert seen == [
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, False, True, False],
        [True, True, False, False, True],
    ]
    plain, ringed = (picture("SD SS", "SD SD", undecided=heads) for heads in (None, ((), (1,))))
    assert plain.shape != ringed.shape or (plain != ringed).any(), "undecided heads are marked"


def test_more_labels_than_colours() -> None:
    names = [f"class {number}" for number in range(12)]
    model = ModelIdentity("m", 12, 12)
    a = HeadMap(model, tuple(tuple(names) for _ in names), Rule("given"))
    b = HeadMap(model, tuple((name,) * 12 for name in names), Rule("given"))
    picture = pixels(comparison_picture(a, b, ("a", "b")))
    assert shows(picture, (0x40, 0x40, 0x40))
    assert shows(picture, (0xF5, 0xF5, 0xF5))


def test_names_are_shown_as_they_are() -> None:
    """Dollars are no formula, a script without a glyph is no warning, and long names fit."""
    a = map_of("SX SD")
    odd = replace(a, labels=(("$x_", "头$\\frac"), ("[bold]", "static")))
    for first, second in ((a, odd), (odd, odd)):
        assert pixels(comparison_picture(first, second, ("$\\broken{$", "头" * 500))).shape[1] < 1500


def test_labels_that_look_like_markup_are_printed(tmp_path: Path, run: Run) -> None:
    odd = replace(map_of("SD"), labels=(("[bold]", "dynamic"),))
    odd.write(tmp_path / "a.json")
    map_of("SD").write(tmp_path / "b.json")
    assert "[bold] -> static" in run("analyze", "compare", tmp_path / "a.json", tmp_path / "b.json").out


def test_short_names() -> None:
    assert short_names(Path("runs/heads-a"), Path("x/heads-b/headmap.json")) == ("heads-a", "heads-b")
    assert short_names(Path("a/heads"), Path("b/heads/headmap.json")) == ("a/heads", "b/heads/headmap.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["heads-a", "wide.json"], "2 layers of 4 heads, the other for 1 layer of 8 heads"),
        (["heads-a", "nowhere.json"], "nowhere.json cannot be read (No such file or directory)"),
        (["empty", "heads-a"], "empty has no headmap.json; expected a folder that"),
        (["heads-a", "text.json"], "text.json is not JSON"),
        (["nothing.json", "nothing.json"], "the maps have no heads"),
        (
            ["heads-a", "heads-b", "--out", "a.jpg"],
            "a.jpg is not a png file; expected a name that",
        ),
        (["heads-a", "heads-b", "--out", "text.json/a.png"], "a.png cannot be written"),
        (["heads-a", "heads-b", "--out", "taken.png"], "taken.png is a folder; expected the name of a file"),
        (["heads-a", "heads-b", "--min-agreement", "1.5"], "--min-agreement is 1.5; expected 0 to 1"),
        (["heads-a", "heads-b", "--min-agreement", "nan"], "--min-agreement is nan; expected 0 to 1"),
    ],
)
def test_refused(
    words: list[str],
    message: str,
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    map_of("SDSDSDSD").write(tmp_path / "wide.json")
    (tmp_path / "text.json").write_text("{hello")
    nothing = {"schema": "forcingkv.headmap/1", "model": {"name": "m", "layers": 0, "heads": 0}}
    (tmp_path / "nothing.json").write_text(json.dumps(nothing | {"rule": {"name": "r"}, "layers": []}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    ran = run("analyze", "compare", *words)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_help_has_an_example(run: Run) -> None:
    assert "Example: forcingkv analyze compare heads-a heads-b" in run("analyze", "compare", "--help").out


def test_recipes_are_set_side_by_side(tmp_path: Path, run: Run) -> None:
    """Labels may differ since recipes do. What a file does not say is unknown, never the same."""
    measured = Statistics(8, 4, 4, 0, "full", passes="denoise", scored_chunks=(2, 3, 4, 5))
    a = map_of("SSDD", statistics=measured, rule=Rule("threshold", alpha=0.8, sink_frames=1, recent_frames=4))
    b = map_of(
        "SSDS",
        statistics=replace(measured, passes="all", scored_chunks=(4,), samples=1),
        rule=Rule("threshold", alpha=0.8, sink_frames=3),
    )
    for name, headmap in (("a", a), ("b", b)):
        headmap.write(tmp_path / f"{name}.json")
    out = run("analyze", "compare", tmp_path / "a.json", tmp_path / "b.json").out
    assert (
        "recipes differ: sink frames left out 1 -> 3, passes denoise -> all, chunks 2 to 5 -> 4,"
        " samples 8 -> 1\n"
        "not known of both recipes: newest frames counted 4 -> unknown\n"
    ) in out
    found = json.loads(run("analyze", "compare", tmp_path / "a.json", tmp_path / "b.json", "--json").out)
    parts = {part["name"]: (part["values"], part["same"]) for part in found["recipe"]}
    assert parts["alpha"] == (["0.8", "0.8"], True)
    assert parts["passes"] == (["denoise", "all"], False)
    assert parts["newest frames counted"] == (["4", None], None)
    assert "static heads a layer" not in parts, "neither says it"
    same = run("analyze", "compare", tmp_path / "a.json", tmp_path / "a.json").out
    assert "recipes differ" not in same
    assert "not known of both" not in same


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"passes": "all"}, "the recipes differ (passes), which may be why they changed"),
        (
            {"scored_chunks": (4,), "policy": "window"},
            "the recipes differ (chunks, policy), which may be why",
        ),
        ({"seed": 9, "samples": 4}, None),
    ],
)
def test_another_recipe_may_be_why_labels_changed(
    change: dict[str, Any], line: str | None, runs: tuple[Path, Path], run: Run
) -> None:
    """Seeds and samples are chance, which undecided heads speak of."""
    measured = replace(MEASURED, passes="denoise", scored_chunks=(2, 3, 4, 5))
    for place, statistics in zip(runs, (measured, replace(measured, **change)), strict=True):
        replace(HeadMap.read(place / "headmap.json"), statistics=statistics).write(place / "headmap.json")
    out = run("analyze", "compare", *runs).out
    assert "recipes differ: " in out
    assert ("which may be why" in out) == (line is not None)
    assert (line or "") in out


def test_a_map_of_before_there_was_a_choice_is_of_denoising_passes(tmp_path: Path) -> None:
    old = map_of("SD", statistics=MEASURED)
    clean = map_of("SD", statistics=replace(MEASURED, passes="clean", steps=0))
    parts = {part.name: part.same for part in recipe_parts(old, clean)}
    assert (parts["passes"], parts["denoising steps"], parts["samples"]) == (False, False, True)


def test_what_a_released_map_says_of_itself_is_quoted_and_not_read(
    data: Path, tmp_path: Path, run: Run
) -> None:
    """Its description is words: nothing is taken from it, and nothing is called the same."""
    ours = map_of(" ".join(["SSDDSSDDSSDD"] * 30), statistics=MEASURED)
    ours = replace(ours, rule=Rule("threshold", alpha=0.8, sink_frames=3, recent_frames=4))
    ours.write(tmp_path / "ours.json")
    ran = run(
        "analyze", "compare", tmp_path / "ours.json", data / "headmaps" / "forcingkv_heads_longlive.json"
    )
    assert "recipes differ" not in ran.out
    assert "rule threshold -> unknown, alpha 0.8 -> unknown, sink frames left out 3 -> unknown" in ran.out
    assert "passes denoise -> unknown" in ran.out
    assert "B says of itself: " in ran.out
    assert "mass over key frames [3:]" in ran.out
    assert "A says of itself" not in ran.out
