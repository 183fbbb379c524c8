"""Where a checkpoint is: a file, a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.models.tensor_files import INDEX
from forcingkv.runtime.spec import ModelSpec

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Found:
    """A checkpoint on this machine."""

    weights: Path
    lora: Path | None = None
    """A LoRA that belongs to it."""


def is_hub_id(place: str | Path) -> bool:
    """Whether a place that is not on this machine can be a repository (`owner/name`) on the hub."""
    return bool(_HUB_ID.match(str(place))) and not str(place).endswith(_FILES)


def locate(spec: ModelSpec, checkpoint: str | Path) -> Found:
    """Find the files of a checkpoint.

    A file is taken as it is. A folder holds the model's public files under their own names (and
    then also its LoRA, where it has one), or one `.safetensors` file or one index of shards, itself
    or in `transformer/`, as diffusers lays it out. What is neither, but looks like a repository
    (`owner/name`), is downloaded.

    Raises:
        InputError: nothing is found, or more than one file could be meant.
        MissingExtraError: huggingface_hub is needed and not installed.
    """
    path = Path(checkpoint)
    if path.is_file():
        return Found(path)
    if path.is_dir():
        return _in_folder(spec, path)
    if is_hub_id(checkpoint):
        return _in_folder(spec, _downloaded(spec, str(checkpoint)))
    raise InputError(
        "cannot be read: there is no such file or folder",
        where=str(checkpoint),
        expected="a file, a folder, or a repository on the hub (owner/name)",
    )


def _in_folder(spec: ModelSpec, folder: Path) -> Found:
    if spec.source and (folder / spec.source.file).is_file():
        return Found(folder / spec.source.file, _lora(spec, folder))
    for place in (folder, folder / "transformer"):
        if any(place.glob(INDEX)):
            return Found(place)
        files = sorted(place.glob("*.safetensors"))
        if len(files) == 1:
            return Found(files[0])
        if files:
            raise InputError(
                f"holds {len(files)} safetensors files: {', '.join(file.name for file in files)}",
                where=str(place),
                expected="one, or an index of shards",
                hint="Name the file.",
            )
    own = f"{spec.source.file}, " if spec.source else ""
    raise InputError(
        "holds no weights", where=str(folder), expected=f"{own}one .safetensors file or an index of shards"
    )


def _lora(spec: ModelSpec, folder: Path) -> Path | None:
    assert spec.source
    if spec.source.lora is None:
        return None
    path = folder / spec.source.lora
    if not path.is_file():
        raise InputError(
            f"holds {spec.source.file} but not {spec.source.lora}, which {spec.name} adds to it",
            where=str(folder),
            hint="Fetch it too, or name the one file to use it alone.",
        )
    return path


def _downloaded(spec: ModelSpec, repository: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtraError("huggingface_hub", "hub")
    import huggingface_hub

    patterns = ["*.safetensors", INDEX]
    if spec.source and spec.source.hub == repository:
        patterns = [name for name in (spec.source.file, spec.source.lora) if name]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # HTTP, connection and repository errors are OSErrors
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"is no file or folder here, and cannot be fetched from the hub ({first})",
            where=repository,
            hint="Check the name, the network and the access rights, or fetch it by other means.",
        ) from error
