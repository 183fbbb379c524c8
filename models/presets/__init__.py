"""Model presets as data: one TOML file each. A user's own file has the same form, and may be based
on a preset (`base = "self-forcing"`)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from forcingkv.runtime.shipped import read_named
from forcingkv.runtime.spec import ModelSpec


def load_spec(model: str) -> ModelSpec:
    """The spec of a preset, or of a TOML file. Raises InputError naming the fault."""
    return read_named(ModelSpec, "model", model, __name__)


def shipped_file(model: str, name: str) -> Path | None:
    """A file that ships with a model, such as its weights: in the package `models/MODEL/`, with "_" for "-".

    None where it does not.
    """
    models, folder = Path(str(resources.files("forcingkv.models"))), model.replace("-", "_")
    if folder not in {one.name for one in models.iterdir()}:  # a stranger's name may lead anywhere
        return None
    path = models / folder / name
    return path if path.is_file() else None
