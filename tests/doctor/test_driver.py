"""NVIDIA's driver: one that works, and each way of failing."""

from __future__ import annotations

from pathlib import Path

import pytest

from forcingkv.doctor.asking import Asked, Probe, ask
from tests.doctor.machines import driver


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drivers")


@pytest.fixture
def home(built: Path, request: pytest.FixtureRequest) -> Path:
    """A folder beside the others, so that the library is compiled once."""
    place = built / f"home{len(list(built.iterdir()))}"
    place.mkdir()
    return place


def asked(kind: str, home: Path, patch: pytest.MonkeyPatch, seconds: float = 30) -> Asked:
    driver(kind, home, patch)
    return ask({"it": Probe("driver", "the driver", seconds=seconds)})["it"]


H200 = {"name": "NVIDIA H200", "sm": 90, "total_bytes": 150_000_000_000}
L4 = {"name": "NVIDIA L4", "sm": 89, "total_bytes": 24_000_000_000}


@pytest.mark.parametrize("kind", ["works", "noise"])
def test_what_a_driver_tells(kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(kind, home, monkeypatch) == Asked(
        {
            "loads": None,
            "library": "libcuda.so.1",
            "gpus": 2,
            "cuda": "13.2",
            "gpu 0": H200,
            "free 0": 99_000_000_000,
            "gpu 1": L4,
            "free 1": 99_000_000_000,
            "driver": "580.82.07",
        }
    )


def test_no_gpu_is_no_fault(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = asked("none", home, monkeypatch)
    assert (got.facts["gpus"], got.facts["driver"], got.faults) == (0, "580.82.07", [])


BROKEN = {
    "abort": 'to load: its process ended by SIGABRT; the last it said: "driver: assertion failed"',
    "hangs": "there was no answer within 1 s",
    "mismatch": "cuInit answers CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: system has unsupported display driver",
    "no library": "to load: OSError: ",
    "exit": "ended without having told all",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_driver_costs_a_sentence(kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = asked(kind, home, monkeypatch, seconds=1 if kind == "hangs" else 30)
    assert "gpus" not in got.facts
    assert got.faults[0].startswith("the driver could not be asked ")
    assert BROKEN[kind].removeprefix("to load: ") in got.faults[0]
    assert [
        fault for fault in got.faults[1:] if "nvmlInit_v2 answers Driver/library version" not in fault
    ] == []


def test_what_was_told_before_a_crash_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = asked("dies late", home, monkeypatch)
    assert (got.facts["gpu 0"], got.facts["gpu 1"], got.facts["free 0"]) == (H200, L4, 99_000_000_000)
    assert "free 1" not in got.facts
    assert got.faults == ["the driver could not be asked for memory of GPU 1: its process ended by SIGABRT"]
