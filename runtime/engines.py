"""What a bundle records of its engines and kernels, this machine's GPU, and which engine it may load."""

from __future__ import annotations

import importlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, check_bounds, shown
from forcingkv.runtime.flavour import FlavourName
from forcingkv.runtime.spec import Dtype

KernelName: TypeAlias = Literal[
    "token_cosines",
    "select_segments",
    "compact_segments",
    "select_uneven_segments",
    "compact_uneven_segments",
]


@dataclass(frozen=True)
class EngineRecord:
    """What a build reported of an engine."""

    graph: str
    flavour: FlavourName
    version: str
    """Of TensorRT; an engine runs in that version only."""
    sm: int
    """Compute capability it was built for: 89 for 8.9."""
    file: str
    layers: int
    """Of the network, as parsed."""
    plugin_layers: int
    needs_plugin: bool
    """Whether the plugins (`prune/plugin.py`) have to be registered before it is loaded."""
    phases: int
    """Phases of the cache that it runs in; of graphs other than `step` 1."""
    weight_bytes: int
    activation_bytes: int
    """Device memory a context needs, in the profile that needs most."""
    scratch_bytes: int
    """The part of it that single layers use within themselves."""
    seconds: float
    peak_bytes: int
    """Host memory of the process that built it."""
    device: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Name of the GPU that it was tuned on; None where it was built without one, or before this was noted."""
    multiprocessors: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """How many that GPU has."""
    decomposed: tuple[str, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Attention that no fused kernel serves: it writes its scores to memory, which is slow."""
    profiles: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """The first phase of each optimization profile, where phases share some (`runtime/kv/profiles.py`); None:
    each phase has one of its own."""

    def __post_init__(self) -> None:
        numbers = ("sm", "layers", "plugin_layers", "phases", "seconds", "multiprocessors")
        sizes = ("weight_bytes", "activation_bytes", "scratch_bytes", "peak_bytes")
        bounds = dict.fromkeys(numbers, (0, 10**9)) | dict.fromkeys(sizes, (0, 1 << 50))
        check_bounds(self, bounds, f"the engine of {self.graph}")
        starts = self.profiles
        if starts is not None and not (
            starts[:1] == (0,)
            and all(one < other for one, other in pairwise(starts))
            and starts[-1] < self.phases
        ):
            raise InputError(
                f"has profiles that begin with the phases {shown(list(starts))}",
                where=f"the engine of {self.graph}",
                expected=f"0, then later ones in order, of {self.phases}",
            )

    @property
    def starts(self) -> Sequence[int]:
        """The first phase of each optimization profile."""
        return range(self.phases) if self.profiles is None else self.profiles

    def profile_of(self, phase: int) -> int:
        """The number of the profile that a phase runs in."""
        return bisect_right(self.starts, phase) - 1

    @property
    def sharing(self) -> str | None:
        """Which phases share profiles, as in 0, 1-19, 20; None where each has its own."""
        if self.profiles is None:
            return None
        stops = [*self.profiles[1:], self.phases]
        ends = zip(self.profiles, stops, strict=True)
        return ", ".join(f"{start}-{stop - 1}" if stop - start > 1 else f"{start}" for start, stop in ends)


@dataclass(frozen=True)
class KernelRecord:
    """One compiled kernel of a bundle (`prune/kernel_compiler.py`)."""

    kernel: KernelName
    dtype: Dtype
    """Of keys and values."""
    width: int
    """Of a head: the size of a key."""
    sm: int
    """Compute capability it was compiled for, 89 for 8.9."""
    file: str
    """The cubin, named relative to the bundle."""
    symbol: str
    """The kernel's name in it."""
    warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    """Local memory a thread spills to; 0, since export refuses to write a kernel that spills."""

    def __post_init__(self) -> None:
        numbers = ("width", "sm", "warps", "shared_bytes", "registers", "spill_bytes")
        check_bounds(self, dict.fromkeys(numbers, (0, 10**9)), f"the kernel {self.kernel}")


def find_engine(
    engines: Sequence[EngineRecord], graph: str, flavour: FlavourName, version: str, sm: int, where: str
) -> EngineRecord:
    """The engine of a graph that this TensorRT can run on this GPU.

    Raises InputError where the bundle `where` has none, or only for another flavour, version or GPU.
    """
    built = [engine for engine in engines if engine.graph == graph]
    for engine in built:
        if (engine.flavour, engine.version, engine.sm) == (flavour, version, sm):
            return engine
    if not built:
        raise InputError(
            f"has no engine of the graph {graph}",
            where=where,
            hint=f"Build it with: forcingkv export ... --target {flavour}",
        )
    there = sorted({f"{engine.flavour} {engine.version} for sm_{engine.sm}" for engine in built})
    raise InputError(
        f"has engines of the graph {graph} made by {', '.join(there)}",
        where=where,
        expected=f"one made by {flavour} {version} for sm_{sm}, as on this machine",
        hint="An engine runs only with the version and on the GPU it was built for: export the bundle again.",
    )


def tuned_elsewhere(record: EngineRecord, found: tuple[str, int] | None) -> str | None:
    """A sentence where an engine was tuned on another GPU than `found` (`device_model`); None if not known.

    One of the same compute capability runs it, such as an H200 what an H100 built, or a slice of a GPU what
    the whole one did. What was fastest there need not be here.
    """
    if found is None or record.device is None or (record.device, record.multiprocessors) == found:
        return None
    return (
        f"the engine of {record.graph} was tuned on {record.device} with {record.multiprocessors}"
        f" multiprocessors, and this GPU is {found[0]} with {found[1]}: one exported here may be faster"
    )


OLDEST_CUDA_CORE = (1, 0)
"""Before it names and arguments were others."""


def cuda_core() -> Any:
    """The module `cuda.core`, imported when it is first needed.

    Raises MissingExtraError without it, InputError where it is too old.
    """
    try:
        core = importlib.import_module("cuda.core")
    except ImportError as error:
        raise MissingExtraError("cuda-core", "tensorrt-rtx") from error
    version = str(getattr(core, "__version__", ""))
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers and numbers < OLDEST_CUDA_CORE:
        raise InputError(
            f"is version {version}",
            where="cuda-core",
            expected=".".join(map(str, OLDEST_CUDA_CORE)) + " or newer",
            hint="Install it: pip install -U 'cuda-core[cu13]' ([cu12] for a driver of CUDA 12).",
        )
    return core


# What cuda-core raises where there is no GPU: no device, a driver that counts none, and no driver at all
# (cuda-bindings 13, and 12). Its error types are several and not documented, so the messages are compared.
NO_GPU = ("CUDA_ERROR_NO_DEVICE", "within [0, 0)", "NVIDIA driver library", "Failed to dlopen")


def device_sm(device: int = 0) -> int | None:
    """Compute capability of a GPU of this machine: 89 for 8.9.

    None where cuda-core is not installed, or there is no driver or no GPU; `why_no_gpu` says which. Raises
    InputError where there is a driver that fails, cuda-core is too old, or there are GPUs, but not that one.
    """
    found = _sm_or_reason(device)
    return found if isinstance(found, int) else None


def why_no_gpu(device: int = 0) -> str | None:
    """Why `device_sm` knows none, as the end of a sentence: what cuda-core or the driver said; None where
    there is one."""
    found = _sm_or_reason(device)
    return None if isinstance(found, int) else found


def _sm_or_reason(device: int) -> int | str:
    try:
        major, minor = cuda_core().Device(device).compute_capability
    except MissingExtraError as error:
        return str(error)
    except InputError:
        raise
    except Exception as error:
        said = str(error) or type(error).__name__
        if any(words in said for words in NO_GPU):
            return said
        if counted := re.search(r"within \[0, (\d+)\)", said):
            raise InputError(
                f"there is no GPU cuda:{device}",
                where="--device",
                expected=f"one of {counted[1]}, from cuda:0 on",
                hint="nvidia-smi lists them; CUDA_VISIBLE_DEVICES chooses which of them a process sees.",
            ) from error
        raise InputError(
            f"the GPU cannot be used: its driver answers {said!r}",
            hint="See whether nvidia-smi works, and whether the driver is new enough for the cuda-core"
            " that is installed.",
        ) from error
    return int(major) * 10 + int(minor)


def device_model(number: int = 0) -> tuple[str, int] | None:
    """Name and multiprocessors of a GPU of this machine; None where cuda-core does not say."""
    try:
        device = cuda_core().Device(number)
        return str(device.name), int(device.properties.multiprocessor_count)
    except Exception:  # it is for a note only: `device_sm` tells a GPU that cannot be used
        return None
