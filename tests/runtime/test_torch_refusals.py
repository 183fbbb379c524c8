"""What the backend torch refuses (weights, manifests, devices, options), and how it tells torch's errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from forcingkv.headmaps import InputError
from forcingkv.runtime import Bundle, MemoryShortError, Session
from forcingkv.runtime.backends import torch_device, torch_lane
from forcingkv.runtime.backends.torch_tensors import TorchTensor
from forcingkv.runtime.faults import DeviceError
from tests.hostile.bundles import remade, write
from tests.runtime.conftest import small_bundle

Bundles = Callable[[str], Path]
CPU = torch.device("cpu")


def spoilt(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "full") -> Path:
    """A bundle whose weights were changed, with digests that fit."""
    bundle = remade(small_bundle(name, "torch"), tmp_path / "bundle")
    file = Bundle.open(bundle).weights("step")
    assert file is not None
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "new")
    write(bundle, file.name, (tmp_path / "new").read_bytes())
    return bundle


NAME = "blocks.1.ffn.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"has no {NAME}"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), rf"it has {NAME} of the shape \(35, 40\)"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), f"holds {NAME} in torch.int8"),
        (lambda t: t.update(other=torch.zeros(())), r"it has other of the shape \(\); expected no tensor"),
        (
            lambda t: t.update({"blocks.0.ffn.0.weight_scale": torch.zeros(1)}),
            "holds linear layers in 8 bits",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Session.open(spoilt(tmp_path, change))


def test_a_file_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    bundle = remade(small_bundle("full", "torch"), tmp_path / "bundle")
    write(bundle, "weights.safetensors", b"no tensors at all")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        Session.open(bundle)


def test_manifests_that_leave_something_out_are_refused(tmp_path: Path) -> None:
    def without(*graphs: str) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            for graph in graphs:
                data["graphs"][graph]["weights"] = None

        return change

    lean = small_bundle("taehv", "torch")
    for number, graphs in enumerate([("step",), ("decode",)]):
        bundle = remade(lean, tmp_path / str(number), without(*graphs))
        with pytest.raises(InputError, match=rf"has no weights of {graphs[0]}|uses|of no use|not used"):
            Session.open(bundle)

    def mixed(data: dict[str, Any]) -> None:
        data["graphs"]["prompt"]["file"] = None

    with pytest.raises(InputError, match="has files of some graphs only"):
        Bundle.open(remade(small_bundle("full"), tmp_path / "mixed", mixed))

    def renamed(data: dict[str, Any]) -> None:
        decode = data["graphs"]["decode"]
        old = next(name for name in decode["inputs"] if name not in ("latents", "first"))
        decode["inputs"]["other"] = decode["inputs"].pop(old)
        decode["outputs"]["next.other"] = decode["outputs"].pop(f"next.{old}")

    with pytest.raises(InputError, match=r"carries .* from call to call"):
        Session.open(remade(lean, tmp_path / "renamed", renamed))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "finds no device cuda here"),
        ("cuda:1", "finds no device cuda here"),
        ("mps", "finds no device mps here"),
        ("xpu", "finds no device xpu here"),
        ("gpu", "there is no device 'gpu'; expected cpu, cuda, cuda:1, mps or xpu"),
        ("cpu:0", "there is no device 'cpu:0'"),
        ("cuda:-1", "there is no device 'cuda:-1'"),
        ("", "there is no device ''"),
    ],
)
def test_devices_that_are_not_there_are_refused(bundles: Bundles, device: str, message: str) -> None:
    if device.split(":")[0] in torch_device.KINDS and device != "cpu:0":
        kind = device.split(":")[0]
        if device != "cuda:-1" and torch.get_device_module(kind).is_available():
            pytest.skip(f"there is a device {kind}")
    with pytest.raises(InputError, match=message):
        Session.open(bundles("full"), backend="torch", device=device, preflight=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "cpu"}, "--provider"),
        ({"cuda_graphs": True}, "are of no use on the device cpu"),
        ({"dtype": "float8"}, "there is no dtype 'float8'; expected one of float32"),
    ],
)
def test_options_of_no_use_are_refused(bundles: Bundles, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Session.open(bundles("full"), backend="torch", **options)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            MemoryShortError,
            "ran out of memory in a pass",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryShortError, "memory"),
        (MemoryError(), MemoryShortError, "memory"),
        (RuntimeError("CUDA error: an illegal memory access was"), DeviceError, "start a new one"),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceError, "start a new one"),
        (RuntimeError("CUDA error: no kernel image"), DeviceError, "failed in a pass"),
        (NotImplementedError("not for MPS"), DeviceError, "failed in a pass"),
    ],
)
def test_what_torch_raises_is_told_apart(raised: Exception, kind: type[Exception], message: str) -> None:
    def work() -> None:
        raise raised

    bound = torch_lane.TorchPass(torch_device.CpuQueue(), work, "step in phase 0", None, None)
    with pytest.raises(kind, match=message) as found:
        bound.run()
    assert found.value.__cause__ is raised
    assert ("start a new one" in str(found.value)) == ("start a new one" in message)


def test_memory_that_is_not_there_is_told() -> None:
    with pytest.raises(
        MemoryShortError, match=r"taking memory for a tensor of float32 \(1099511627776, 1024\)"
    ):
        TorchTensor.make((2**40, 1024), "float32", CPU)
