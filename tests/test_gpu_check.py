"""The check for GPUs: its driver, whatever a step does to its process, and what it says without a GPU."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_check.check import Check, SkipError
from tools.gpu_check.driver import ROOT, Settings, Step, run_steps
from tools.gpu_check.kit import CONTENTS, Kit, sources
from tools.gpu_check.machine import Machine
from tools.gpu_check.published_steps import known_gpu
from tools.gpu_check.steps import STEPS


def steps(*names: str, limit: float = 30, **changes: Any) -> list[Step]:
    return [Step(name, f"tests.gpu_check_steps:{name}", limit, "a test", **changes) for name in names]


def run(*given: Step, **changes: Any) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    return run_steps(given, Settings(say=said.append, **changes)), said


@pytest.mark.skipif(os.name != "posix", reason="steps end by signals")
def test_whatever_a_step_does_costs_that_step_alone(tmp_path: Path) -> None:
    given = steps("hangs", limit=2.5, least=1)
    given += steps("aborts", "aborts_late", "garbage", "fails", "raises", "absent", "quick")
    began = time.monotonic()
    lines, said = run(*given, out=tmp_path / "lines.jsonl")
    assert time.monotonic() - began < 25
    assert [json.loads(text) for text in said] == lines
    assert (tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines() == said
    ended = {line["step"]: line for line in lines if "part" not in line}
    assert {name: line["status"] for name, line in ended.items()} == {
        "hangs": "timed out",
        "aborts": "crashed",
        "aborts_late": "crashed",
        "garbage": "failed",
        "fails": "failed",
        "raises": "failed",
        "absent": "skipped",
        "quick": "passed",
        "summary": "failed",
    }
    assert 2.4 < ended["hangs"]["seconds"] < 10
    assert "in hangs" in ended["hangs"]["told"], "the stack where it hung"
    assert "SIGABRT before it said" in ended["aborts"]["why"]
    assert "the last words" in ended["aborts"]["told"]
    assert "SIGABRT after it had said 'passed'" in ended["aborts_late"]["why"]
    assert ended["garbage"]["why"] == "it wrote what is no result: 'no JSON'"
    assert ended["fails"]["why"] == "one and one is two"
    assert ended["raises"]["why"] == "ZeroDivisionError: of the test's own"
    assert "this needs cuda-core" in ended["absent"]["why"]
    assert ended["quick"]["inf"] == "inf", "JSON has no infinity"
    parts = [line for line in lines if "part" in line]
    named = [(line["step"], line["part"]) for line in parts]
    assert named == [("hangs", "before it hangs"), ("quick", "half")]
    assert parts[1]["figure"] == 0.333333
    told = lines[-1]
    assert told["steps"] == {"passed": 1, "failed": 3, "skipped": 1, "timed out": 1, "crashed": 2}
    assert told["not_right"] == ["hangs", "aborts", "aborts_late", "garbage", "fails", "raises"]
    assert told["skipped"] == ["absent"]


def test_what_no_longer_fits_is_skipped_and_time_is_kept_for_later_steps() -> None:
    first, second = steps("absent", least=20)[0], steps("quick", kept=12, least=1)[0]
    (line, *_, told), _ = run(first, second, seconds=30)
    assert line["status"] == "skipped"
    assert re.fullmatch(r"1[78] s are left for it, and it needs 20", line["why"])
    assert told["steps"] == {"skipped": 1, "passed": 1}


def test_the_command_lists_runs_and_refuses(tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.gpu_check", *words]
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert call("--list").stdout.count("\n") == len(STEPS)
    assert "there is no step other" in call("--only", "versions,other").stderr
    done = call("--only", "sanitizer", "--out", str(tmp_path / "out.jsonl"), "--kit", str(tmp_path))
    assert done.returncode == 0, done.stderr
    line, told = map(json.loads, done.stdout.splitlines())
    assert (line["step"], told["step"]) == ("sanitizer", "summary")
    assert "1 skipped" in done.stderr or line["status"] != "skipped"


def test_every_step_is_there_and_is_on_the_page() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for step in STEPS:
        module, name = step.place.split(":")
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert f"def {name}(check: Check)" in source, step.name
        assert f"| `{step.name}` | {step.limit:.0f} |" in page, step.name
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert sum(step.kept for step in STEPS) < 480 - 100


def test_without_a_gpu_a_step_says_that_it_stands_in_or_why_it_is_skipped() -> None:
    out = io.StringIO()
    check = Check(out, 10, None, Machine(fault="cuInit of the driver answers 999"))
    with pytest.raises(SkipError, match=r"there is no GPU \(cuInit of the driver answers 999\): of use"):
        check.needs_gpu("of use")
    check.part("one", figure=float("nan"))
    line = json.loads(out.getvalue())
    assert line == {"part": "one", "status": "passed", "on": "cpu stand-in", "figure": "nan"}
    assert Check(out, 10, None, Machine("NVIDIA H200", 90)).figures["on"] == "NVIDIA H200"


def test_a_kit_of_other_sources_is_not_used(tmp_path: Path) -> None:
    assert "holds no kit.json" in str(Kit(tmp_path).fault)
    (tmp_path / CONTENTS).write_text(json.dumps({"sources": "others"}), encoding="utf-8")
    assert "made from other sources" in str(Kit(tmp_path).fault)
    (tmp_path / CONTENTS).write_text(json.dumps({"sources": sources()}), encoding="utf-8")
    (tmp_path / "demo").mkdir()
    kit = Kit(tmp_path)
    assert (kit.fault, kit.has("demo"), kit.wheels()) == (None, tmp_path / "demo", [])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        (None, None),
    ],
)
def test_a_card_is_planned_for_where_its_data_sheet_is_known(name: str | None, key: str | None) -> None:
    found = known_gpu(name)
    assert (found.key if found else None) == key
