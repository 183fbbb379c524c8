"""Model presets as data: one TOML file each. A user's own file has the same form, and may be based
on a preset (`base = "self-forcing"`)."""

from __future__ import annotations

from forcingkv.runtime.shipped import read_named, shipped_names
from forcingkv.runtime.spec import ModelSpec

__all__ = ["load_spec", "preset_names"]


def preset_names() -> list[str]:
    """Names that `load_spec` knows."""
    return shipped_names(__name__)


def load_spec(model: str) -> ModelSpec:
    """The spec of a preset, or of a TOML file. Raises InputError naming the fault."""
    return read_named(ModelSpec, "model", model, __name__)
