"""Asking in a process of its own: what a library does there costs a sentence; what it said before stays."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forcingkv.doctor import asking
from forcingkv.doctor.asking import Asked, Probe, ask
from forcingkv.doctor.child import StepError, Telling
from forcingkv.doctor.probes import PROBES
from tests.doctor.machines import modules, torch


def asked(name: str, *arguments: str, seconds: float | None = None) -> Asked:
    return ask({"it": Probe(name, "it", arguments, seconds)})["it"]


class Recorder(Telling):
    """Tells a list."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def _tell(self, **what: Any) -> None:
        self.told.append(what)


RAISES = {
    "raises": ("raise ValueError('no such symbol\\nand more')", "ValueError: no such symbol"),
    "says nothing": ("raise AssertionError", "AssertionError"),
    "needs another": ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
    "exits": ("import sys; sys.exit('goodbye')", "SystemExit: goodbye"),
}


@pytest.mark.parametrize("kind", RAISES)
def test_a_module_that_raises_is_told(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, why = RAISES[kind]
    modules(tmp_path, monkeypatch, stand_in_that_raises=source)
    recorder = Recorder()
    with pytest.raises(StepError):
        PROBES["module"](recorder, "stand_in_that_raises")
    assert recorder.told[1:] == [
        {"name": "installed", "value": True},
        {"begins": "to load"},
        {"fails": "to load", "why": why},
    ]


WORKS = "__version__ = '3.1'\n"
BROKEN = {
    "ends": ("import os; os._exit(3)", "its process ended with exit code 3"),
    "aborts": (
        "import os, sys; sys.stderr.write('terminate called\\n'); sys.stderr.flush(); os.abort()",
        'its process ended by SIGABRT; the last it said: "terminate called"',
    ),
    "segfaults": ("import ctypes; ctypes.string_at(0)", "its process ended by SIGSEGV"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_module_that_ends_its_process_costs_a_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, why = BROKEN[kind]
    modules(tmp_path, monkeypatch, stand_in=source)
    got = asked("module", "stand_in")
    assert got.facts == {"installed": True}
    assert not got.loads
    assert len(got.faults) == 1
    assert got.faults[0].startswith(f"it could not be asked to load: {why}")


def test_a_module_that_prints_says_what_it_is_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = 'import os\nos.write(1, b\'forcingkv-doctor {"name": "version", "value": "9"}\\n\\xff\')\n'
    modules(tmp_path, monkeypatch, stand_in=noise + "print('hello' * 100000)\n" + WORKS)
    assert asked("module", "stand_in") == Asked({"installed": True, "loads": None, "version": "3.1"})
    assert capfd.readouterr() == ("", "")


def test_a_crash_when_python_ends_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules(tmp_path, monkeypatch, stand_in=f"import atexit, os\natexit.register(os.abort)\n{WORKS}")
    assert asked("module", "stand_in").faults == []


def test_what_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = f"subprocess.Popen([{sys.executable!r}, '-Sc', 'import time; time.sleep(9)'])"
    sleeps = f"import subprocess, time\n{child}\ntime.sleep(9)"
    modules(tmp_path, monkeypatch, stand_in=sleeps)
    began = time.monotonic()
    got = asked("module", "stand_in", seconds=1.0)
    assert time.monotonic() - began < 5
    assert got.faults == ["it could not be asked to load: there was no answer within 1 s"]


def test_a_folder_of_that_name_where_it_is_started_is_not_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "__init__.py").write_text(WORKS)
    (tmp_path / "stubs" / "left_over").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "stubs")
    both = ask({name: Probe("module", name, (name,)) for name in ("stand_in", "left_over")})
    assert [one.facts for one in both.values()] == [{"installed": False}] * 2
    assert [one.faults for one in both.values()] == [[], []]


def test_without_a_process_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    (fault,) = asked("module", "sys").faults
    assert fault.startswith("it could not be asked: no process could be started for it ([Errno 2]")


def test_torch_tells_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules(tmp_path, monkeypatch, torch=torch(gpus=2, built_for="13.0", bfloat16=True))
    got = asked("torch")
    assert got.facts["devices"] == ["cpu", "cuda:0", "cuda:1"]
    assert got.facts["built_for"] == ["CUDA 13.0"]
    assert got.facts["bfloat16"] is True
    assert got.facts["gpu cuda:0"] == {"name": "GPU 0 of torch", "total_bytes": 24 << 30}
    assert [got.facts.get(f"computes {device}") for device in got.facts["devices"]] == [True, True, None]
    (fault,) = got.faults
    assert fault.startswith("it could not be asked to compute on cuda:1: RuntimeError: CUDA error: no kernel")


@pytest.mark.parametrize(
    ("capable", "known"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_which_processors_multiply_bfloat16(capable: dict[str, bool], known: bool) -> None:
    from types import SimpleNamespace

    from forcingkv.doctor.probes import _multiplies_bfloat16

    asked = SimpleNamespace(cpu=SimpleNamespace(get_capabilities=lambda: capable))
    assert _multiplies_bfloat16(asked) is known
    assert _multiplies_bfloat16(SimpleNamespace(cpu=None)) is None


def test_the_graph_that_providers_are_tried_with_is_one() -> None:
    """Here, since the CPU's provider is there: it gives 42, and another sum would be refused."""
    import onnxruntime

    from forcingkv.doctor.probes import CPU, _provider_starts

    assert _provider_starts(onnxruntime, CPU)


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (fault,) = asked("place", str(tmp_path / "file" / "caches")).faults
    why = f"NotADirectoryError: {tmp_path}/file is a file"
    assert fault == f"it could not be asked about {tmp_path}/file/caches: {why}"
    fine = asked("place", str(tmp_path / "a" / "b"))
    assert fine.faults == []
    assert fine.facts["nearest"] == str(tmp_path)
    assert fine.facts["writes"] is True
    assert fine.facts["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_limits_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MOST_TOLD", 1000)
    modules(
        tmp_path, monkeypatch, stand_in="import sys\nsys.stderr.write('x' * 10**6)\nimport os; os.abort()"
    )
    (fault,) = asked("module", "stand_in").faults
    assert len(fault) < 400
