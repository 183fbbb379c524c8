"""Extras as the installed metadata has them, what each is for, and what is missing of it."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from forcingkv.doctor.packages import SERVES, Inventory, inventory

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
REQUIRES = (
    "numpy>=1.26",
    "onnxruntime>=1.24.1",
    "torch>=2.9; extra == 'models'",
    "forcingkv[models]; extra == 'text'",
    "ftfy>=6.2; extra == 'text'",
    "cuda-core[cu13]>=1.0; extra == 'tensorrt'",
    "pywin32>=1; sys_platform == 'nowhere' and extra == 'text'",
)


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Inventory]:
    """The inventory where those packages are installed, by name with _ for -."""

    def call(**installed: str | None) -> Inventory:
        def version(name: str) -> str | None:
            if name.replace("-", "_") not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name.replace("-", "_")]

        extras = ["models", "text", "tensorrt"]
        project = SimpleNamespace(
            version="0.1.0", requires=REQUIRES, metadata=SimpleNamespace(get_all=lambda _: extras)
        )
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: project)
        monkeypatch.setattr(importlib.metadata, "version", version)
        return inventory()

    return call


def test_every_extra_of_the_project_has_a_purpose() -> None:
    assert list(SERVES) == list(PROJECT["optional-dependencies"])
    assert all(SERVES.values())


def test_what_is_missing_of_an_extra_and_of_those_it_consists_of(of: Callable[..., Inventory]) -> None:
    found = of(numpy="2.4.6", onnxruntime="1.32.0", ftfy="6.3.1")
    assert {extra.name: extra.missing for extra in found.extras} == {
        "models": ("torch>=2.9",),
        "text": ("torch>=2.9",),
        "tensorrt": ("cuda-core[cu13]>=1.0",),
    }
    assert {package.name: package.needed_by for package in found.packages} == {
        "numpy": ("base",),
        "onnxruntime": ("base",),
        "torch": ("models",),
        "ftfy": ("text",),
        "cuda-core": ("tensorrt",),
    }
    assert {extra.name: extra.consists_of for extra in found.extras if extra.consists_of} == {
        "text": ("models",)
    }
    assert found.extras[0].install == "pip install 'forcingkv[models]'"


@pytest.mark.parametrize(
    ("version", "fits"), [("2.13.0+cpu", True), ("2.9.0rc1", False), ("2.8.0", False), ("odd", False)]
)
def test_versions(version: str, fits: bool, of: Callable[..., Inventory]) -> None:
    torch = of(torch=version).package("torch")
    assert torch is not None
    assert torch.installed == (("torch", version),)
    assert torch.fits is fits


def test_another_package_with_the_same_modules_will_do(of: Callable[..., Inventory]) -> None:
    package = of(onnxruntime_gpu="1.32.0").package("onnxruntime")
    assert package is not None
    assert (package.fits, package.told) == (True, "onnxruntime-gpu 1.32.0")


def test_a_package_whose_metadata_are_half_gone_is_not_there(of: Callable[..., Inventory]) -> None:
    torch = of(torch=None).package("torch")
    assert torch is not None
    assert torch.installed == ()
