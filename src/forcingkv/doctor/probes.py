"""What is asked of each library: its steps, in the order in which they are taken (`child.Telling`).

Runs in a process of its own. The product's own functions are asked where it decides by them.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forcingkv.doctor.bundle_probe import bundle
from forcingkv.doctor.child import Telling
from forcingkv.doctor.driver import driver

CPU = "CPUExecutionProvider"
NO_HARDWARE = ("AzureExecutionProvider",)
"""Providers that compute somewhere else."""
BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx10_1", "avx10_2", "bf16", "sve_bf16")
"""Instructions of CPUs that multiply in bfloat16, as `torch.cpu.get_capabilities` calls them."""


def module(telling: Telling, name: str) -> None:
    """Steps: `installed`, `loads`, `version`."""
    loaded = telling.load(name)
    telling.may("version", "for its version", lambda: str(loaded.__version__))


def onnxruntime(telling: Telling) -> None:
    """Steps: `version`, `providers` (as listed), and for each `starts NAME`: whether it computes here."""
    ort: Any = telling.load("onnxruntime")
    telling.may("version", "for its version", lambda: str(ort.__version__))
    listed = telling.must(
        "providers", "for its providers", lambda: list(map(str, ort.get_available_providers()))
    )
    for name in [name for name in listed if name not in NO_HARDWARE]:
        telling.may(f"starts {name}", f"to start {name}", partial(_provider_starts, ort, name))


def _provider_starts(ort: Any, name: str) -> bool:
    """Whether a provider takes a graph, x + x, and computes it."""
    import numpy as np

    options = ort.SessionOptions()
    options.log_severity_level = 3
    others = [] if name == CPU else [CPU]
    session = ort.InferenceSession(_doubling(), options, providers=[name, *others], enable_fallback=0)
    if session.get_providers()[0] != name:
        return False
    (doubled,) = session.run(["y"], {"x": np.array([21.0], np.float32)})
    if doubled.tolist() != [42.0]:
        raise ValueError(f"21 + 21 is {doubled.tolist()}")
    return True


def _doubling() -> bytes:
    """An ONNX model: y = x + x, one number each (fields of onnx.proto by number)."""

    def message(*parts: tuple[int, bytes | int]) -> bytes:
        return b"".join(
            bytes([number << 3, value])
            if isinstance(value, int)
            else bytes([number << 3 | 2, len(value)]) + value
            for number, value in parts
        )

    def number(name: bytes) -> bytes:
        shape = message((1, message((1, 1))))
        return message((1, name), (2, message((1, message((1, 1), (2, shape))))))

    node = message((1, b"x"), (1, b"x"), (2, b"y"), (4, b"Add"))
    graph = message((1, node), (2, b"doubling"), (11, number(b"x")), (12, number(b"y")))
    return message((1, 8), (7, graph), (8, message((2, 17))))


def torch(telling: Telling) -> None:
    """Steps: `version`, `built_for`, `bfloat16` (whether the CPU multiplies in it; None: not known), and
    `devices`; for each `computes DEVICE`, and for GPUs `gpu DEVICE`."""
    library: Any = telling.load("torch")
    telling.may("version", "for its version", lambda: str(library.__version__))
    telling.may("built_for", "what it was built for", lambda: _built_for(library))
    telling.may("bfloat16", "for instructions of the CPU", lambda: _multiplies_bfloat16(library))
    devices = ["cpu"]
    for kind, words, count in _GPUS_OF_TORCH:
        found = telling.may(f"{kind} devices", f"for {words}", partial(count, library))
        devices += ["mps"] if kind == "mps" and found else [f"{kind}:{n}" for n in range(found or 0)]
    telling.must("devices", "for its devices", lambda: devices)
    for device in devices:
        telling.may(f"computes {device}", f"to compute on {device}", partial(_adds, library, device))
        if device.startswith(("cuda", "xpu")):
            telling.may(f"gpu {device}", f"about {device}", partial(_gpu_of_torch, library, device))


_GPUS_OF_TORCH: tuple[tuple[str, str, Callable[[Any], int]], ...] = (
    ("cuda", "GPUs (CUDA)", lambda torch: torch.cuda.device_count() if torch.cuda.is_available() else 0),
    ("mps", "an Apple GPU (MPS)", lambda torch: int(torch.backends.mps.is_available())),
    ("xpu", "Intel GPUs (XPU)", lambda torch: torch.xpu.device_count() if torch.xpu.is_available() else 0),
)


def _built_for(torch: Any) -> list[str]:
    """CUDA 13.0, ROCm 7.0, XPU ...; none of them: for the CPU alone."""
    names = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}
    given = {shown: getattr(torch.version, name, None) for name, shown in names.items()}
    return [f"{shown} {version}" for shown, version in given.items() if version]


def _multiplies_bfloat16(torch: Any) -> bool | None:
    able = getattr(torch.cpu, "get_capabilities", None)
    if able is None:
        return None
    return any(able().get(name, False) for name in BFLOAT16)


def _adds(torch: Any, device: str) -> bool:
    """Whether a device computes: torch may see a GPU that it has no kernels for."""
    total = torch.ones(3, device=device).sum().item()
    if total != 3:
        raise ValueError(f"1 + 1 + 1 is {total}")
    return True


def _gpu_of_torch(torch: Any, device: str) -> dict[str, Any]:
    of = torch.cuda if device.startswith("cuda") else torch.xpu
    properties = of.get_device_properties(int(device.partition(":")[2]))
    return {"name": str(properties.name), "total_bytes": int(properties.total_memory)}


def cuda(telling: Telling) -> None:
    """Steps: `version` of cuda-core, `bindings` (the version), and `sm`, as engines are chosen by it."""
    core: Any = telling.load("cuda.core")
    telling.may("version", "for its version", lambda: str(core.__version__))
    telling.may("bindings", "for cuda-bindings", _bindings_version)
    telling.may("sm", "for the GPU", _sm)


def _bindings_version() -> str:
    return str(importlib.import_module("cuda.bindings").__version__)


def _sm() -> int | None:
    from forcingkv.runtime.engines import device_sm

    return device_sm()


def hub(telling: Telling) -> None:
    """Steps: `version`, `folder`, and those of `place`: where what is fetched goes."""
    client: Any = telling.load("huggingface_hub")
    telling.may("version", "for its version", lambda: str(client.__version__))
    place(telling, telling.must("folder", "for its cache", _hub_cache))


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def place(telling: Telling, folder: str) -> None:
    """Steps: `nearest`, the folder that is there, itself or above; `free_bytes`; `writes`."""
    nearest = telling.must("nearest", f"about {folder}", lambda: _nearest(folder))
    telling.may("free_bytes", f"for room in {nearest}", lambda: shutil.disk_usage(nearest).free)
    telling.may("writes", f"to write into {nearest}", lambda: _writes(nearest))


def _nearest(folder: str) -> str:
    """Raises NotADirectoryError where a file is in the way."""
    path = Path(folder)
    found = next(one for one in (path, *path.parents) if one.exists())
    if not found.is_dir():
        raise NotADirectoryError(f"{found} is a file")
    return str(found)


def _writes(folder: str) -> bool:
    """Raises OSError where nothing can be written."""
    with tempfile.TemporaryFile(dir=folder) as file:  # gone with its last use, whatever happens
        file.write(bytes(4096))
        file.flush()
    return True


PROBES: dict[str, Callable[..., None]] = {
    "bundle": bundle,
    "cuda": cuda,
    "driver": driver,
    "hub": hub,
    "module": module,
    "onnxruntime": onnxruntime,
    "place": place,
    "torch": torch,
}
"""By name, as `child.main` is asked for them."""
