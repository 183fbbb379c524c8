"""What commands show of names that strangers chose: no command to the terminal, no line, no markup."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forcingkv.commands.console import progress_bar, say
from forcingkv.headmaps import HeadMap
from forcingkv.measure.bench.results import SHOWN
from forcingkv.measure.fidelity.evaluation_tables import print_policies
from forcingkv.measure.tables import PlainConsole, printable
from tests.conftest import Ran, mixed_map, small_spec
from tests.runtime.conftest import small_bundle

Run = Callable[..., Ran]

WORST = "\x1b[2J\x1b]0;owned\x07\x9b31m\nerror: forged\r\u202etxt\ud800[/red]:fire:"
SHOWN_SO = r"\x1b[2J\x1b]0;owned\x07\x9b31m\nerror: forged\r\u202etxt\ud800[/red]:fire:"


def clean(ran: Ran) -> str:
    """All that a command showed, once it is sure that nothing of it is a command."""
    text = ran.out + ran.err
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\ud800-\udfff]", text), repr(text)
    assert not [line for line in text.splitlines() if line.startswith("error: forged")]
    return text


def squeezed(text: str) -> str:
    """Without what lines are broken and filled with."""
    return re.sub(r"\s+", "", text)


@pytest.fixture
def maps(tmp_path: Path) -> tuple[Path, Path]:
    """Two head maps of which every name is the worst."""
    headmap = mixed_map(small_spec())
    labels = tuple(tuple(WORST if label == "static" else label for label in row) for row in headmap.labels)
    model, rule = replace(headmap.model, name=WORST), replace(headmap.rule, name=WORST, reason=WORST)
    first = replace(headmap, model=model, rule=rule, labels=labels)
    second = replace(first, labels=(labels[0][::-1], *labels[1:]))
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, one in zip(paths, (first, second), strict=True):
        path.write_text(one.to_text())
    return paths


def test_head_maps(maps: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    for words in (
        ("headmap", "show", maps[0]),
        ("headmap", "validate", maps[0]),
        ("headmap", "convert", maps[0], "--out", tmp_path / "c.json"),
        ("analyze", "compare", *maps),
    ):
        ran = run(*words)
        assert ran.code == 0, ran.err
        assert squeezed(SHOWN_SO) in squeezed(clean(ran)), words
    assert json.loads(run("headmap", "show", maps[0], "--json").out)["model"]["name"] == WORST
    refused = run("headmap", "validate", maps[0], "--model", "demo")
    assert (refused.code, "expected" in clean(refused)) == (2, True)
    assert HeadMap.read(tmp_path / "c.json").model.name == WORST


def test_a_bundle(tmp_path: Path, run: Run) -> None:
    shutil.copytree(small_bundle("full"), tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    data = json.loads(path.read_text())
    data["model"]["name"] = data["policy"]["name"] = data["policy"]["summary"] = WORST
    data["warnings"], data["taken"], data["versions"][WORST] = [WORST], [WORST], WORST
    lora: dict[str, Any] = {"file": WORST, "sha256": WORST, "strength": 1.0, "modules": 1, "kinds": [WORST]}
    lora |= {"ranks": [], "alphas": [], "scales": [1.0], "alpha_from": [WORST], "alpha_known": True}
    path.write_text(json.dumps(data | {"loras": [lora]}))
    ran = run("inspect", tmp_path / "b")
    assert ran.code == 0, ran.err
    assert squeezed(clean(ran)).count(squeezed(SHOWN_SO)) >= 7
    assert json.loads(run("inspect", tmp_path / "b", "--json").out)["model"]["name"] == WORST
    made = run("generate", "--bundle", tmp_path / "b", "--prompt", f"a {WORST}", "--out", tmp_path / "a.mp4")
    assert made.code == 2
    clean(made)
    made = run(
        "generate",
        "--bundle",
        tmp_path / "b",
        "--prompt",
        "a b",
        "--seconds",
        "0.3",
        "--out",
        tmp_path / "a.mp4",
    )
    assert made.code == 0, made.err
    clean(made)


def test_specs_and_policies(tmp_path: Path, run: Run) -> None:
    name = json.dumps(WORST.replace("\ud800", ""))
    (tmp_path / "s.toml").write_text(f'base = "self-forcing"\nname = {name}\n')
    policy = f'name = {name}\nsummary = {name}\n[groups]\nall = [{{ role = "recent", frames = 1 }}]\n'
    (tmp_path / "p.toml").write_text(policy)
    ran = run("plan", "--model", tmp_path / "s.toml", "--policy", tmp_path / "p.toml", "--gpu", "h200")
    assert ran.code == 0, ran.err
    assert squeezed(SHOWN_SO.replace(r"\ud800", "")) in squeezed(clean(ran))
    (tmp_path / "s.toml").write_text(f'base = "self-forcing"\n{name} = 1\n')
    refused = run("plan", "--model", tmp_path / "s.toml")
    assert (refused.code, "unknown field" in clean(refused)) == (2, True)


def test_tables_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """Of bench and evaluate: a policy `[/red]` was markup, after all had been generated."""
    row: dict[str, Any] = dict.fromkeys(("seconds", "seconds_least", "seconds_most", "speedup"), 1.0)
    row |= dict.fromkeys(("speedup_least", "speedup_most", "speedup_undisturbed", "flop_limit"), 1.0)
    row |= dict.fromkeys(("share_of_limit", "kv_bytes", "cache_bytes", "grown_bytes", "gflops"), 1)
    row |= {"policy": WORST, "seconds_to_decode": None}
    table = printable(WORST, [*SHOWN, WORST], [[show(row) for show in SHOWN.values()]])
    PlainConsole(width=400).print(table)
    metrics = {"psnr": {"mean": 1.0, "low": None, "high": None, "difference": None}}
    report = {"reference": WORST, "prompts": 1, "videos": 1, "warnings": [WORST]}
    print_policies(report | {"policies": [{"policy": WORST, "metrics": metrics}]})
    say(f"policy {WORST}", WORST)
    with progress_bar() as shown:
        shown.add_task(WORST, total=1)
    out, err = capsys.readouterr()
    assert squeezed(out).count(squeezed(SHOWN_SO)) >= 5
    clean(Ran(0, out, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).replace("\r", "")))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_no_terminal_is_too_small_for_a_name(encoding: str, maps: tuple[Path, Path]) -> None:
    """LC_ALL=C, or a program that asks for ASCII: what it cannot show is named."""
    name = "日本 é \udcff"
    path = maps[0].with_name("名.json")
    headmap = HeadMap.read(maps[0])
    path.write_text(replace(headmap, model=replace(headmap.model, name=name)).to_text())
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "forcingkv", "headmap", "show", str(path)]
    ran = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    shown = {"ascii": r"\u65e5\u672c \xe9", "latin-1": "\\u65e5\\u672c é", "utf-8": "日本 é"}[encoding]
    assert shown.encode(encoding) in ran.stdout
