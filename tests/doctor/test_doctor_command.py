"""`forcingkv doctor`: what it says of whole machines, and that nothing brings it down."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forcingkv.doctor import bundle_probe
from forcingkv.doctor.text import WIDTH, lines
from forcingkv.runtime.backends import BACKENDS
from tests.bundle_with_engines import bundle_with_engines
from tests.conftest import Ran
from tests.doctor.machines import ORT_CUDA, driver, modules, only_the_base, torch
from tests.doctor.test_asking import Recorder
from tests.runtime.conftest import small_bundle

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("HF_HOME", raising=False)


def of(report: dict[str, Any], backend: str) -> dict[str, Any]:
    return next(one for one in report["backends"] if one["name"] == backend)


def shown(report: dict[str, Any]) -> str:
    """The text for people; no line is too long, and it says all that is wrong."""
    found = list(lines(report))
    assert [line for line in found if len(line) > WIDTH] == []
    words = " ".join(" ".join(found).split())
    for fault in report["faults"]:
        assert " ".join(fault.split()) in words
    return "\n".join(found)


def test_with_only_the_base_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    only_the_base(tmp_path / "packages", monkeypatch)
    ran = run("doctor", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0
    for name in ("onnxruntime", "onnxruntime-cpu"):
        assert of(report, name)["on"] == ["cpu"]
    assert report["faults"] == []
    libraries = report["libraries"]
    assert {name for name in libraries if libraries[name]["installed"]} == {"onnxruntime"}
    assert all(extra["missing"] for extra in report["extras"])
    assert report["next"][0] == "to write videos as .mp4: pip install 'forcingkv[video]'"
    assert report["places"][0]["folder"] == str(tmp_path / "caches" / "forcingkv")
    assert report["places"][0]["writes"] is True
    text = shown(report)
    assert text.startswith("backends of forcingkv")
    assert "not known without torch" in text
    # The page describes every field, and no other.
    assert re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == list(report)


def test_with_a_driver_that_aborts_and_modules_that_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    driver("abort", home, monkeypatch)
    raises = "raise RuntimeError('libcudart.so.13: undefined symbol')"
    ends = "import os; os.abort()"
    modules(
        tmp_path / "modules",
        monkeypatch,
        cuda=raises,
        onnxruntime=ends,
        tensorrt_rtx=raises,
        tensorrt=ends,
        huggingface_hub=raises,
        torch=ends,
    )
    (tmp_path / "caches").touch()  # a file where the folder should be
    ran = run("doctor", "--bundle", tmp_path / "nothing")
    assert ran.code == 2
    assert "Traceback" not in ran.out + ran.err
    assert ran.out.startswith("wrong\n  - no backend can run here\n")
    words = " ".join(ran.out.split())
    for sentence in (
        "the NVIDIA driver could not be asked for GPUs: its process ended by SIGABRT;",
        "cuda-core could not be asked to load: RuntimeError: libcudart.so.13: undefined symbol",
        "ONNX Runtime could not be asked to load: its process ended by SIGABRT",
        "tensorrt could not be asked to load: its process ended by SIGABRT",
        "torch could not be asked to load: its process ended by SIGABRT",
        "huggingface_hub could not be asked to load: RuntimeError",
        f"NotADirectoryError: {tmp_path}/caches is a file",
        "to run anything: pip install --force-reinstall onnxruntime",
    ):
        assert " ".join(sentence.split()) in words
    assert max(map(len, ran.out.splitlines())) <= WIDTH
    assert ran.err.splitlines()[-1].startswith("error: ")


def test_with_onnxruntime_that_lists_cuda_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    none = "raise ModuleNotFoundError('blocked')"
    modules(
        tmp_path / "modules",
        monkeypatch,
        onnxruntime=ORT_CUDA,
        torch=torch(),
        tensorrt_rtx=none,
        huggingface_hub=none,
    )
    ran = run("doctor", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0
    assert of(report, "onnxruntime")["runs"] is False
    assert of(report, "onnxruntime-cpu")["runs"] is True
    why = "the backend onnxruntime cannot run: it lists CUDAExecutionProvider, which does not start"
    assert any(fault.startswith(why) for fault in report["faults"])
    assert report["processor"]["bfloat16"] is False
    assert "21 against 150 GFLOP/s" in shown(report)
    assert "choose --backend onnxruntime-cpu" in shown(report)


def test_what_of_a_bundle_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that need 6 GB of weights and 0.5 GB of activations, made by 1.7.1 for sm_89 and sm_120."""
    plain = small_bundle("forcing-kv")

    def judged(path: Path, sm: str, free: str, *versions: str) -> dict[str, Any]:
        recorder = Recorder()
        bundle_probe.bundle(recorder, str(path), sm, free, *versions)
        assert [told for told in recorder.told if "fails" in told] == []
        return {told["name"]: told["value"] for told in recorder.told if "name" in told}

    monkeypatch.setattr("forcingkv.runtime.preflight.available_bytes", lambda: 10**9)
    told = judged(plain, "", "")
    assert told["about"]["engines"] == []
    assert told["runs onnxruntime on its own choice"]["fits"] is True
    assert 0 < told["runs onnxruntime on its own choice"]["needed_bytes"] < 10**9
    assert told["runs tensorrt-rtx on cuda:0"]["why"] == "it has no engines of tensorrt-rtx"
    assert {name.split()[1] for name in told if name.startswith("runs ")} == BACKENDS.keys()
    assert told["runs torch on cpu"]["fits"] is True
    monkeypatch.setattr("forcingkv.runtime.preflight.available_bytes", lambda: 1)
    for where in ("onnxruntime-cpu on its own choice", "torch on cpu"):
        assert "are available" in judged(plain, "", "")[f"runs {where}"]["why"]

    built = bundle_with_engines(plain, tmp_path / "built")
    fits = judged(built, "89", str(10**10), "tensorrt-rtx=1.7.1")["runs tensorrt-rtx on cuda:0"]
    assert fits["fits"] is True
    assert 6.4e9 < fits["needed_bytes"] < 6.6e9
    for sm, free, version, why in (
        ("89", "6400000000", "=1.7.1", "a session needs about 6.50 GB, and 6.40 GB are free on the GPU"),
        ("89", "", "=1.8", "expected one made by tensorrt-rtx 1.8 for sm_89, as on this machine"),
        ("90", "", "=1.7.1", "expected one made by tensorrt-rtx 1.7.1 for sm_90, as on this machine"),
        ("", "", "=1.7.1", "no GPU was found, so no engine can be chosen"),
    ):
        assert why in judged(built, sm, free, f"tensorrt-rtx{version}")["runs tensorrt-rtx on cuda:0"]["why"]
    assert judged(tmp_path, "", "")["refused"].startswith(str(tmp_path))
