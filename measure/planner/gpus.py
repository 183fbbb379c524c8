"""GPUs as data: `gpus.toml`, read into `Gpu`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

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
    """A GPU, in the numbers of its data sheet."""

    key: str
    """Its name on the command line."""
    name: str
    family: str
    """Its class, a name of `gpu_classes`."""
    sm: int
    """Compute capability, 90 for 9.0."""
    memory_bytes: int
    """All device memory that the driver reports."""
    peak_flops: float
    """Operations a second of dense bfloat16 or float16 matrix products summed in float32."""
    bandwidth: float
    """Bytes a second from and to device memory."""
    source: str


@dataclass(frozen=True)
class _Entry:
    name: str
    sm: int
    memory_mib: int
    bf16_tflops: float
    bandwidth_gbs: float
    source: str
    family: str


@dataclass(frozen=True)
class _File:
    classes: Mapping[str, GpuClass]
    gpus: Mapping[str, _Entry]


@cache
def _file() -> _File:
    text = resources.files(__package__).joinpath("gpus.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    for entry in data["gpus"].values():
        entry["family"] = entry.pop("class")  # which is a word of Python
    return from_data(_File, data, "gpus.toml")


def gpu_names() -> list[str]:
    """Names that `load_gpu` knows, in the order of the file."""
    return list(_file().gpus)


def gpu_classes() -> Mapping[str, GpuClass]:
    """All classes by name."""
    return _file().classes


def load_gpu(key: str) -> Gpu:
    """The GPU of that name. Raises InputError naming those there are."""
    entry = _file().gpus.get(key.lower())
    if entry is None:
        raise InputError(f"there is no GPU {key!r}", where="gpu", expected=f"one of {', '.join(gpu_names())}")
    return Gpu(
        key=key.lower(),
        name=entry.name,
        family=entry.family,
        sm=entry.sm,
        memory_bytes=entry.memory_mib << 20,
        peak_flops=entry.bf16_tflops * 1e12,
        bandwidth=entry.bandwidth_gbs * 1e9,
        source=entry.source,
    )
