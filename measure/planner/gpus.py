"""GPUs as data: `gpus.toml`, read into `Gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.reading import parse_toml


@dataclass(frozen=True)
class Gpu:
    """A GPU, in the numbers of its data sheet; `gpus.toml` says what they mean."""

    key: str
    """Its name on the command line."""
    name: str
    family: str
    """Its class: GPUs that share one efficiency constant (`published.efficiencies`)."""
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
def _gpus() -> Mapping[str, Gpu]:
    text = (resources.files(__package__) / "gpus.toml").read_bytes()
    return {key: Gpu(key, **one) for key, one in parse_toml(text, "gpus.toml").items()}


def gpu_names() -> list[str]:
    """Names that `load_gpu` knows, in the order of the file."""
    return list(_gpus())


def load_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises InputError naming those there are."""
    if name.lower() not in _gpus():
        raise InputError(f"there is no GPU {name!r}", where="gpu", expected=f"one of {', '.join(_gpus())}")
    return _gpus()[name.lower()]
