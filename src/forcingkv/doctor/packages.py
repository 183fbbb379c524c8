"""What of the project's packages and extras is installed, as its own metadata says what they are."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

PROJECT = "forcingkv"
BASE = "base"
"""What is installed in any case."""
SERVES = {
    "video": "writing and reading video files (.mp4)",
    "models": "the torch models: weights, decoders, generating in torch",
    "text": "encoding prompts with UMT5 (forcingkv encode)",
    "hub": "fetching weights and encoders by name from the Hugging Face hub",
    "analyze": "measuring heads: statistics, head map, report (forcingkv analyze)",
    "ray": "measuring heads, or generating many videos, on several machines",
    "export": "exporting bundles for ONNX Runtime, timing presets (forcingkv export, bench)",
    "engines": "exporting TensorRT engines with DynamicPrune, whose kernels Triton compiles",
    "serve": "serving bundles over the network (forcingkv serve)",
    "ray-serve": "serving them from several GPUs or machines, on Ray Serve",
    "evaluate": "measuring the fidelity of videos (forcingkv evaluate)",
    "tensorrt": "running and building engines of TensorRT on an NVIDIA GPU",
    "tensorrt-rtx": "running and building engines of TensorRT-RTX on an NVIDIA GPU",
    "all": "all of these but TensorRT",
    "dev": "tests and checks of the project itself",
}
"""Extra -> what it is for."""
SAME = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm"),
    "opencv-python-headless": (
        "opencv-python",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    ),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
"""Package -> others that bring the same modules, any of which will do."""
RIVALS = ("onnxruntime", "opencv-python-headless")
"""Packages of `SAME` that are not to be installed beside another one: they write the same files."""


@dataclass(frozen=True)
class Package:
    """A package that the base or an extra asks for."""

    name: str
    wanted: str
    """Versions that will do: `>=2.9`."""
    installed: tuple[tuple[str, str], ...]
    """Name and version of what is installed of it, or of what will do in its place."""
    needed_by: tuple[str, ...]
    """`base`, and extras that name it themselves."""
    fits: bool
    """Whether one of the installed versions will do."""

    @property
    def told(self) -> str:
        """What is installed, for people: of its own name if it is, else in its place."""
        own = [f"{name} {version}" for name, version in self.installed if name == self.name]
        return (own or [f"{name} {version}" for name, version in self.installed])[0]


@dataclass(frozen=True)
class Extra:
    """An extra, as the installed package has it."""

    name: str
    serves: str
    missing: tuple[str, ...]
    """Requirements that nothing installed meets (`ray>=2.44`), those of extras that it consists of too."""
    consists_of: tuple[str, ...] = ()
    """Other extras, that it names."""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install '{PROJECT}[{self.name}]'"


@dataclass(frozen=True)
class Inventory:
    """All packages and extras of the project."""

    version: str
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]

    def package(self, name: str) -> Package | None:
        """The package of that name, if it is asked for anywhere."""
        return next((package for package in self.packages if package.name == name), None)

    def extra(self, name: str) -> Extra | None:
        """The extra of that name, if there is one."""
        return next((extra for extra in self.extras if extra.name == name), None)


def inventory() -> Inventory:
    """What is installed, imported by nobody.

    Raises importlib.metadata.PackageNotFoundError where the project itself is not installed (it may run from
    its folder all the same), and what packaging raises for requirements that are none.
    """
    project = importlib.metadata.distribution(PROJECT)
    requirements = [Requirement(text) for text in project.requires or ()]
    extras = project.metadata.get_all("Provides-Extra") or []
    asked: dict[str, dict[str, Requirement]] = {}
    for extra in ("", *extras):
        for requirement in requirements:
            if _belongs(requirement, extra) and not _is_project(requirement):
                name = canonicalize_name(requirement.name)
                asked.setdefault(name, {})[extra or BASE] = requirement
    return Inventory(
        version=project.version,
        packages=tuple(_package(name, by) for name, by in asked.items()),
        extras=tuple(_extra(name, requirements) for name in extras),
    )


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Whether an extra asks for it, here; "": the base does."""
    if requirement.marker is None:
        return not extra
    of_base = requirement.marker.evaluate({"extra": ""})
    return of_base if not extra else not of_base and requirement.marker.evaluate({"extra": extra})


def _is_project(requirement: Requirement) -> bool:
    return canonicalize_name(requirement.name) == PROJECT


def _extra(name: str, requirements: list[Requirement]) -> Extra:
    wanted = _all_of(name, requirements, {})
    missing = {
        _written(one): None
        for one in wanted
        if not any(_fits(one, version) for _, version in _installed(canonicalize_name(one.name)))
    }
    others = [one.extras for one in requirements if _belongs(one, name) and _is_project(one)]
    consists_of = sorted({extra for extras in others for extra in extras})
    return Extra(name, SERVES.get(name, ""), tuple(missing), tuple(consists_of))


def _all_of(name: str, requirements: list[Requirement], seen: dict[str, None]) -> Iterator[Requirement]:
    """What an extra asks for, and the extras that it consists of."""
    if name in seen:
        return
    seen[name] = None
    for requirement in requirements:
        if _belongs(requirement, name):
            if not _is_project(requirement):
                yield requirement
            for inner in sorted(requirement.extras) if _is_project(requirement) else ():
                yield from _all_of(inner, requirements, seen)


def _written(requirement: Requirement) -> str:
    """A requirement as pip takes it: cuda-core[cu13]>=1.0."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{canonicalize_name(requirement.name)}{extras}{requirement.specifier}"


def _package(name: str, by: Mapping[str, Requirement]) -> Package:
    installed = _installed(name)
    wanted = ",".join(dict.fromkeys(str(one.specifier) for one in by.values() if one.specifier))
    fits = any(all(_fits(one, version) for one in by.values()) for _, version in installed)
    return Package(name, wanted, tuple(installed), tuple(by), fits)


def _installed(name: str) -> list[tuple[str, str]]:
    """Name and version of what is installed of a package, or in its place."""
    found = []
    for one in (name, *SAME.get(name, ())):
        try:
            version = importlib.metadata.version(one)
        except Exception:  # not there, or half removed
            continue
        if isinstance(version, str):
            found.append((one, version))
    return found


def _fits(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False
