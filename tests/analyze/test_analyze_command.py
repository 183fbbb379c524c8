"""`forcingkv analyze heads` and `report`: what they print and write, and how they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from forcingkv.commands.analyze import bytes_of
from forcingkv.headmaps import HeadMap, InputError
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("white_pictures")

Run = Callable[..., Ran]

BUDGET = {"policy": "forcing-kv", "resolution": "48x32", "kv_bytes": None, "time_ratio": None}
PROMPT = "a 3 moving left and a 7 moving up\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec of two layers, and prompts."""
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "spec.toml").write_text('base = "demo"\nname = "tiny"\nlayers = 2\n')
    (folder / "prompts.txt").write_text(PROMPT * 2)
    (folder / "latin.txt").write_bytes("a 3 moving left\nd\u00e9j\u00e0 vu\n".encode("latin-1"))
    return folder


def heads(place: Path, out: Path, samples: int = 2) -> list[object]:
    return [
        "analyze",
        "heads",
        "--model",
        place / "spec.toml",
        "--random-weights",
        "--chunks",
        3,
        "--prompts",
        place / "prompts.txt",
        "--samples",
        samples,
        "--out",
        out,
    ]


@pytest.fixture(scope="module")
def made(white_pictures: None, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, by the command."""
    from typer.testing import CliRunner

    from forcingkv.commands import app

    out = tmp_path_factory.mktemp("made") / "run"
    ran = CliRunner().invoke(app, [str(word) for word in heads(place, out)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return out


def test_it_prints_the_verdict_the_map_and_the_figures(made: Path, run: Run) -> None:
    ran = run("analyze", "report", made)
    assert ran.code == 0, ran.err
    words = " ".join(ran.out.replace("│", " ").split())
    assert "of 8 heads keep their label in 95% of samples" in words
    assert "Measured on 2 samples only" in words
    for name in ("labels", "rule", "undecided", "variance explained by", "divergence", "samples for ± 0.01"):
        assert any(line.startswith(name) for line in ran.out.splitlines()), name
    rows = [line.split()[1:5] for line in ran.out.splitlines() if line.startswith(("  0 ", "  1 "))]
    headmap = HeadMap.read(made / "headmap.json")
    assert headmap.undecided is not None
    for layer, row in enumerate(rows):
        for head, letter in enumerate(row):
            assert letter.upper() == headmap.labels[layer][head][0].upper()
            assert letter.islower() == (head in headmap.undecided[layer])


def test_json_says_what_the_files_say(made: Path, run: Run, tmp_path: Path) -> None:
    ran = run("analyze", "report", made, "--out", tmp_path / "b", "--rule", "quota", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert data["stability"] == json.loads((tmp_path / "b" / "stability.json").read_text())
    assert data["headmap"] == json.loads((tmp_path / "b" / "headmap.json").read_text())
    assert data["digest"] == HeadMap.read(tmp_path / "b" / "headmap.json").digest
    assert data["stability"]["rule"]["name"] == "quota"
    assert {head["label"] for head in data["stability"]["heads"]} == {"static", "dynamic"}
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "headmap.json",
        "report.html",
        "stability.json",
    ]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--rule", "threshold", "--alpha", 0.3], {"alpha": 0.3, "undecided": "dynamic"}),
        (["--rule", "threshold", "--undecided", "kept"], {"alpha": 0.8, "undecided": "kept"}),
        (["--rule", "threshold", "--sink-frames", 3], {"sink_frames": 3}),
        (["--rule", "quota", "--static-per-layer", 3], {"static_per_layer": 3, "undecided": "kept"}),
        (["--rule", "budget", "--target-kv", "1.1MB"], {"budget": {**BUDGET, "kv_bytes": 1_100_000}}),
        (["--rule", "budget", "--target-time", 0.9], {"budget": {**BUDGET, "time_ratio": 0.9}}),
    ],
)
def test_any_rule_can_be_applied_again(
    options: list[object], rule: dict[str, object], made: Path, run: Run, tmp_path: Path
) -> None:
    ran = run("analyze", "report", made, "--out", tmp_path, *options, "--json")
    assert ran.code == 0, ran.err
    recorded = json.loads(ran.out)["headmap"]["rule"]
    assert {name: recorded[name] for name in rule} == rule


def test_a_run_goes_on_and_can_be_restarted(place: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*heads(place, out, 1)).code == 0
    first = (out / "stats" / "sample-0000.parquet").stat().st_mtime_ns
    assert run(*heads(place, out, 2)).code == 0
    assert (out / "stats" / "sample-0000.parquet").stat().st_mtime_ns == first
    assert len(list((out / "stats").glob("*.parquet"))) == 2
    ran = run(*heads(place, out, 2), "--seed", 9)
    assert ran.code == 2
    assert "is of another run: seed differs" in ran.err
    assert run(*heads(place, out, 1), "--seed", 9, "--restart").code == 0
    assert len(list((out / "stats").glob("*.parquet"))) == 1


def test_options_of_the_recording_reach_it(place: Path, run: Run, tmp_path: Path) -> None:
    stats = f"file://{tmp_path / 'elsewhere'}"
    ran = run(
        *heads(place, tmp_path / "run", 1),
        "--rows",
        30,
        "--policy",
        "window",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--threads",
        1,
        "--stats",
        stats,
        "--json",
    )
    assert ran.code == 0, ran.err
    measured = json.loads(ran.out)["headmap"]["statistics"]
    assert (measured["rows"], measured["policy"], measured["resolution"]) == (30, "window", "48x32")
    assert [path.name for path in (tmp_path / "elsewhere").glob("*.parquet")] == ["sample-0000.parquet"]
    assert not (tmp_path / "run" / "stats").exists()
    assert run("analyze", "report", tmp_path / "run", "--stats", stats).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "LATIN"], "latin.txt, line 2 has the byte 0xe9, which is not UTF-8"),
        (["--samples", 0], "Invalid value for '--samples'"),
        (["--rule", "budget"], "the rule budget is given 0 targets"),
        (["--rule", "quota", "--target-kv", "1GB"], "the rule quota is given 1 targets"),
        (["--rule", "budget", "--target-kv", "much"], "--target-kv is 'much'; expected a size"),
        (["--rule", "budget", "--target-kv", "1KB"], "cannot be met; expected at least"),
        (["--rule", "quota", "--undecided", "dynamic"], "the rule quota fixes how many heads are static"),
        (["--undecided", "both"], "--undecided is 'both'; expected kept or dynamic"),
        (["--device", "tpu"], "there is no device 'tpu'"),
        (["--device", "mps:1"], "there is no device 'mps:1'"),
        (["--device", "xpu"], "finds no device xpu here"),
        (["--dtype", "float16"], "there is no dtype 'float16'"),
        (["--policy", "forcing-kv"], "the policy forcing-kv needs a head map"),
        (["--sink-frames", 9], "leaves no history"),
        (["--stats", "nosuch://x"], "nosuch://x cannot be reached"),
        (["--ray", "127.0.0.1:1"], "ray 127.0.0.1:1: no cluster answers"),
    ],
)
def test_wrong_input(options: list[object], message: str, place: Path, run: Run, tmp_path: Path) -> None:
    words = [place / "latin.txt" if word == "LATIN" else word for word in options]
    ran = run(*heads(place, tmp_path / "out", 1), *words)
    assert ran.code == 2, ran.out + ran.err
    assert message in " ".join(ran.err.replace("│", " ").split())
    assert "Traceback" not in ran.err
    assert not any((tmp_path / "out" / name).exists() for name in ("headmap.json", "report.html"))


def test_a_gpu_that_is_not_there_is_said(place: Path, run: Run, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = run(*heads(place, tmp_path / "out", 1), "--device", "cuda")
    assert ran.code == 2
    assert "finds no device cuda here; expected a GPU of NVIDIA or AMD" in " ".join(ran.err.split())


@pytest.mark.parametrize("words", [["heads"], ["report"], ["compare"]])
def test_help_has_an_example(words: list[str], run: Run) -> None:
    ran = run("analyze", *words, "--help")
    assert ran.code == 0
    assert "Example: forcingkv analyze" in ran.out


def test_sizes_are_read_as_people_write_them() -> None:
    assert [bytes_of(text) for text in ("12", "1.5GB", "800 mb", "2KiB")] == [12, 15 * 10**8, 8 * 10**8, 2048]
    for text in ("", "GB", "-1GB", "1 parsec"):
        with pytest.raises(InputError, match="expected a size"):
            bytes_of(text)
