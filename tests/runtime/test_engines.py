"""Which engine of a bundle a machine may load, and which TensorRT a process uses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.fields import from_data, to_data
from forcingkv.runtime import flavour
from forcingkv.runtime.engines import EngineRecord, device_model, device_sm, find_engine, tuned_elsewhere

ENGINE = EngineRecord(
    graph="step",
    flavour="tensorrt-rtx",
    version="1.7.1",
    sm=89,
    file="engines/step.engine",
    layers=100,
    plugin_layers=2,
    needs_plugin=True,
    phases=4,
    weight_bytes=1,
    activation_bytes=2,
    scratch_bytes=1,
    seconds=1.0,
    peak_bytes=1,
)
ENGINES = [ENGINE, replace(ENGINE, sm=120)]


def test_the_engine_of_this_gpu_is_found() -> None:
    assert find_engine(ENGINES, "step", "tensorrt-rtx", "1.7.1", 120, "bundle") is ENGINES[1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("step", "tensorrt-rtx", "1.8.0", 89), "expected one made by tensorrt-rtx 1.8.0 for sm_89"),
        (("step", "tensorrt-rtx", "1.7.1", 86), "expected one made by tensorrt-rtx 1.7.1 for sm_86"),
        (("step", "tensorrt", "1.7.1", 89), "expected one made by tensorrt 1.7.1 for sm_89"),
        (("decode", "tensorrt-rtx", "1.7.1", 89), "has no engine of the graph decode"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_refused(
    asked: tuple[str, flavour.FlavourName, str, int], words: str
) -> None:
    with pytest.raises(InputError, match="bundle has ") as raised:
        find_engine(ENGINES, *asked, "bundle")
    assert words in str(raised.value)
    if asked[0] == "step":
        assert "tensorrt-rtx 1.7.1 for sm_120, tensorrt-rtx 1.7.1 for sm_89" in str(raised.value)


def test_an_engine_that_was_tuned_on_another_gpu_is_told_of() -> None:
    """An H100 and an H200 have one compute capability; so has a slice of a GPU."""
    tuned = replace(ENGINE, device="NVIDIA H100 80GB HBM3", multiprocessors=132)
    assert tuned_elsewhere(tuned, ("NVIDIA H100 80GB HBM3", 132)) is None
    for found in (("NVIDIA H200", 132), ("NVIDIA H100 80GB HBM3", 60)):
        words = tuned_elsewhere(tuned, found)
        assert words is not None
        assert "step was tuned on NVIDIA H100 80GB HBM3 with 132 multiprocessors" in words
        assert f"this GPU is {found[0]} with {found[1]}: one exported here may be faster" in words
    assert tuned_elsewhere(tuned, None) is None
    assert tuned_elsewhere(ENGINE, ("NVIDIA H200", 132)) is None, (
        "built without a GPU, or before it was noted"
    )


def test_records_of_before_are_read_and_written_as_they_were() -> None:
    before = to_data(ENGINE)
    assert set(before) & {"device", "multiprocessors", "decomposed"} == set()
    assert from_data(EngineRecord, before, "manifest") == ENGINE
    noted = replace(ENGINE, device="NVIDIA H200", multiprocessors=132, decomposed=("one",))
    assert from_data(EngineRecord, json.loads(json.dumps(to_data(noted))), "manifest") == noted
    with pytest.raises(InputError, match="multiprocessors is -1"):
        replace(ENGINE, multiprocessors=-1)


class Core:
    """cuda.core whose driver answers as given."""

    name = "NVIDIA H200"
    properties = SimpleNamespace(multiprocessor_count=132)

    def __init__(self, answer: tuple[int, int] | Exception) -> None:
        self.answer = answer

    def Device(self, number: int) -> Core:  # noqa: N802
        assert number == 0
        return self

    @property
    def compute_capability(self) -> tuple[int, int]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_the_gpu_is_asked_for_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", Core((12, 0)))
    assert device_sm() == 120
    assert device_model() == ("NVIDIA H200", 132)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert device_model() is None


# What cuda-core 1.2 with cuda-bindings 13.5 raises where there is no driver, no device, and none that counts;
# and cuda-bindings 12 without a driver.
NO_GPU = [
    RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search.'),
    Exception("CUDA_ERROR_NO_DEVICE: This indicates that no CUDA-capable devices were detected"),
    ValueError("device_id must be within [0, 0), got 0"),
    RuntimeError("Failed to dlopen libcuda.so.1"),
]


@pytest.mark.parametrize("error", NO_GPU, ids=str)
def test_without_a_driver_or_a_device_there_is_no_gpu(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", Core(error))
    assert device_sm() is None


def test_without_cuda_core_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert device_sm() is None


def test_a_driver_that_fails_is_not_taken_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Exception("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: the versions of the drivers differ")
    monkeypatch.setitem(sys.modules, "cuda.core", Core(broken))
    with pytest.raises(InputError, match=r"its driver answers 'CUDA_ERROR_SYSTEM.*nvidia-smi"):
        device_sm()


def test_a_flavour_that_is_not_installed_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = replace(flavour.FLAVOURS["tensorrt"], module="tensorrt_that_is_not_there")
    monkeypatch.setitem(flavour.FLAVOURS, "tensorrt", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'forcingkv\[tensorrt\]'"):
        flavour.require("tensorrt")


def test_an_empty_namespace_package_is_no_tensorrt(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Type stubs leave a folder `tensorrt` without an __init__.py."""
    place = tmp_path_factory.mktemp("site")
    (place / "tensorrt_stubbed").mkdir()
    monkeypatch.syspath_prepend(str(place))
    only_stubs = replace(flavour.FLAVOURS["tensorrt"], module="tensorrt_stubbed")
    monkeypatch.setitem(flavour.FLAVOURS, "tensorrt", only_stubs)
    with pytest.raises(MissingExtraError):
        flavour.require("tensorrt")


CHOICE = """
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime import flavour
try:
    flavour.trt.Builder
except RuntimeError as error:
    print(error)
flavour.choose("tensorrt-rtx"), flavour.choose("tensorrt-rtx")
print(flavour.chosen().name, flavour.trt.Builder.__name__)
try:
    flavour.choose("tensorrt")
except InputError as error:
    print(error)
"""


def test_a_process_uses_one_flavour() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    # The other flavour is found too, were it only by its name.
    prepared = "import forcingkv.runtime.flavour as f; real = f.require\n"
    prepared += "f.require = lambda name: f.FLAVOURS[name]\n"
    done = subprocess.run(
        [sys.executable, "-c", prepared + CHOICE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == "no flavour of TensorRT was chosen: call choose() first"
    assert second == "tensorrt-rtx Builder"
    assert third.startswith("tensorrt cannot be used: this process already uses tensorrt-rtx")
