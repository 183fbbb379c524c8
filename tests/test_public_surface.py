"""What the packages promise: names others may use. A change here is a change for users."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import forcingkv
from forcingkv.commands.console import need
from forcingkv.headmaps import MissingExtraError

SURFACE = {
    "forcingkv.headmaps": {
        "DYNAMIC",
        "STATIC",
        "Budget",
        "Choices",
        "HeadMap",
        "InputError",
        "MissingExtraError",
        "ModelIdentity",
        "Rule",
        "Source",
        "Statistics",
        "read_headmap",
    },
    "forcingkv.runtime": {
        "Bundle",
        "Chunk",
        "DeviceError",
        "GoingOnWarning",
        "InUseError",
        "InputError",
        "MemoryShortError",
        "MissingExtraError",
        "NoiseSource",
        "NotFiniteError",
        "Prompt",
        "Session",
        "SessionError",
        "Timing",
        "Video",
    },
    "forcingkv.analyze": {
        "Analysis",
        "Job",
        "Labelling",
        "analyze_heads",
        "analyze_statistics",
        "record_samples",
        "write_analysis",
    },
    "forcingkv.export": {"EngineError", "VerificationError", "export_bundle"},
}


@pytest.mark.parametrize("package", SURFACE)
def test_a_package_offers_what_it_promises(package: str) -> None:
    assert set(importlib.import_module(package).__all__) == SURFACE[package]


def modules() -> list[str]:
    found = pkgutil.walk_packages(forcingkv.__path__, "forcingkv.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


@pytest.mark.parametrize("name", modules())
def test_every_public_name_of_a_module_is_explained(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", [known for known in vars(module) if not known.startswith("_")]):
        thing = getattr(module, public)
        if callable(thing) and getattr(thing, "__module__", "").startswith("forcingkv"):
            assert thing.__doc__, f"{name}.{public} has no docstring"


def test_a_missing_extra_is_named_with_its_install_command() -> None:
    with pytest.raises(MissingExtraError, match=r"needs nosuchlibrary.*pip install 'forcingkv\[video\]'"):
        need("video", "json", "nosuchlibrary")
