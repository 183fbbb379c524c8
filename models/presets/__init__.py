"""Model presets as data: one TOML file each. A user's own file has the same form."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data
from forcingkv.runtime.spec import ModelSpec

__all__ = ["load_spec", "preset_names"]


def preset_names() -> list[str]:
    """Names that `load_spec` knows."""
    folder = resources.files(__package__)
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_spec(model: str) -> ModelSpec:
    """The spec of a preset, or of a TOML file. Raises InputError naming the fault."""
    if model in preset_names():
        text = resources.files(__package__).joinpath(f"{model}.toml").read_text(encoding="utf-8")
    elif model.endswith(".toml") and Path(model).is_file():
        text = Path(model).read_text(encoding="utf-8")
    else:
        raise InputError(
            f"there is no model {model!r}",
            where="model",
            expected=f"one of {', '.join(preset_names())}, or a spec file ending in .toml",
        )
    try:
        return from_data(ModelSpec, tomllib.loads(text), f"model {model}")
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is not TOML: {error}", where=f"model {model}") from error
