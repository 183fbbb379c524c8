"""GPUs as data: `gpus.toml`, read into `Gpu`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data


@dataclass(frozen=True)
class GpuClass:
    """GPUs that share one efficiency constant."""

    summary: str
    carried_from: str | None = None
    """The class whose constant it uses, where no published figure is from a GPU of its own."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, in the numbers of its data sheet; `gpus.toml` says what they mean."""

    key: str
    """Its name on the command line."""
    name: str
    family: str
    """Its class, a name of `gpu_classes`."""
    sm: int
    """Compute capability, 90 for 9.0."""
    memory_mib: int
    bf16_tflops: float
    bandwidth_gbs: float
    source: str

    @property
    def memory_bytes(self) -> int:
        """All device memory that the driver reports."""
        return self.memory_mib << 20

    @property
    def peak_flops(self) -> float:
        """Operations a second of dense bfloat16 or float16 matrix products summed in float32."""
        return self.bf16_tflops * 1e12

    @property
    def bandwidth(self) -> float:
        """Bytes a second from and to device memory."""
        return self.bandwidth_gbs * 1e9


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("gpus.toml").read_text(encoding="utf-8"))


@cache
def gpu_classes() -> Mapping[str, GpuClass]:
    """All classes by name."""
    return {name: from_data(GpuClass, one, f"gpus.toml: {name}") for name, one in _file()["classes"].items()}


def gpu_names() -> list[str]:
    """Names that `load_gpu` knows, in the order of the file."""
    return list(_file()["gpus"])


def load_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises InputError naming those there are."""
    key = name.lower()
    if key not in _file()["gpus"]:
        raise InputError(
            f"there is no GPU {name!r}", where="gpu", expected=f"one of {', '.join(gpu_names())}"
        )
    return from_data(Gpu, _file()["gpus"][key] | {"key": key}, f"gpus.toml: {key}")
