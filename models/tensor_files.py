"""Files of tensors: where a checkpoint lies, how it is opened, and whether it fits a model.

Files are opened lazily: names and shapes at once, contents one tensor at a time. Formats: safetensors,
sharded safetensors with an index, and torch's `.pt` / `.pth`, which is only ever read with
`weights_only=True`: a file with any other pickled object in it is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forcingkv.headmaps.errors import InputError, MissingExtraError, first_line
from forcingkv.headmaps.files import inside
from forcingkv.runtime.spec import ModelSpec

KEYS = ("generator_ema", "generator", "model")
"""Entries of a `.pt` file that are tried, in this order, where none is asked for by name."""

RELOAD_BYTES = 512 * 2**20
"""A mapped file keeps every page that was read in memory; after so many bytes it is mapped anew."""

INDEX = "*.safetensors.index.json"

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

Shapes = Mapping[str, Sequence[int]]


class TensorFiles(ABC):
    """Tensors of one file or of several that belong together.

    Attributes:
        where: the file or folder, for messages.
        shapes: name -> shape of every tensor.
        files: the files that hold them.
    """

    def __init__(self, where: Path, files: Sequence[Path]) -> None:
        self.where, self.files = where, tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, in the file's dtype. It may be a view of the file."""

    def digest(self) -> str:
        """SHA-256 of the file; of several, of their digests in the order of their names."""
        digests = []
        for path in sorted(self.files):
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_tensors(path: Path, key: str | None = None, preferred: str | None = None) -> TensorFiles:
    """Open a file, or a folder with sharded safetensors and their index.

    Args:
        path: a `.safetensors` file, a folder with one `*.safetensors.index.json`, or a torch file.
        key: entry of a torch file that holds the tensors. None: the first that it has of
            `preferred` and `KEYS`, else the file itself.
        preferred: entry that is looked for first.

    Raises:
        InputError: the file cannot be read, holds something else than tensors, or lacks the key.
    """
    if path.is_dir():
        opened: TensorFiles = _Shards(path)
    elif path.suffix == ".safetensors":
        opened = _Safetensors(path)
    else:
        return _Torch(path, key, (preferred, *KEYS) if preferred else KEYS)
    if key is not None:
        raise InputError(
            f"has no entry {key!r}: a safetensors file is flat", where=str(path), hint="Leave --key away."
        )
    return opened


class _Safetensors(TensorFiles):
    def __init__(self, path: Path) -> None:
        super().__init__(path, [path])
        try:
            with safe_open(path, "pt") as file:
                self.shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            what, expected = f"cannot be read as safetensors ({error})", "a whole .safetensors file"
            raise InputError(what, where=str(path), expected=expected) from error

    def read(self, name: str) -> Tensor:
        # Opened for each tensor, so that what was read before leaves the memory.
        with safe_open(self.where, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


class _Shards(TensorFiles):
    def __init__(self, folder: Path) -> None:
        found = sorted(folder.glob(INDEX))
        if len(found) != 1:
            raise InputError(f"has {len(found)} files {INDEX}", where=str(folder), expected="one")
        index = found[0]
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {str(name): inside(folder, str(file)) for name, file in where.items()}
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            expected = 'JSON with a table "weight_map"'
            raise InputError("is not an index of shards", where=str(index), expected=expected) from error
        absent = sorted({path.name for path in places.values() if not path.is_file()})
        if absent:
            raise InputError(f"lacks the shard {', '.join(absent)}", where=str(folder))
        super().__init__(folder, sorted(set(places.values())))
        shards = {path: _Safetensors(path) for path in self.files}
        self._shard = {name: shards[path] for name, path in places.items()}
        indexed = {(path, name) for name, path in places.items()}
        stored = {(path, name) for path, shard in shards.items() for name in shard.shapes}
        wrong = sorted(f"{name} ({path.name})" for path, name in indexed ^ stored)
        if wrong:
            raise InputError(
                f"index and shards differ in {len(wrong)} tensors: {', '.join(wrong[:20])}", where=str(index)
            )
        self.shapes = {name: shard.shapes[name] for name, shard in self._shard.items()}

    def read(self, name: str) -> Tensor:
        return self._shard[name].read(name)


class _Torch(TensorFiles):
    def __init__(self, path: Path, key: str | None, keys: Sequence[str]) -> None:
        super().__init__(path, [path])
        self._key, self._keys = key, keys
        self._state = self._load()
        self._read_bytes = 0
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        if self._read_bytes > RELOAD_BYTES:
            self._state, self._read_bytes = {}, 0
            self._state = self._load()
        tensor = self._state[name]
        self._read_bytes += tensor.nbytes
        return tensor

    def _load(self) -> Mapping[str, Tensor]:
        where = str(self.where)
        try:
            # Files of torch before 1.6 are not zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(self.where)
            content = torch.load(self.where, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"is refused: it is no torch file, or holds a pickled object that is not a tensor"
                f" ({first_line(error)})",
                where=where,
                expected="tensors only (torch.load with weights_only=True)",
                hint="Save its state dict alone, best as .safetensors.",
            ) from error
        except Exception as error:  # the unpickler raises whatever a damaged file leads it to
            raise InputError(
                f"cannot be read as a torch file ({first_line(error)})",
                where=where,
                expected="a whole .pt, .pth or .safetensors file",
            ) from error
        return _tensors(_entry(content, self._key, self._keys, where), where)


def _entry(content: Any, key: str | None, keys: Sequence[str], where: str) -> Any:
    table: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    entries = [name for name, value in table.items() if isinstance(value, Mapping)]
    if key is not None and key not in entries:
        expected = f"one of {', '.join(entries) or 'none: it is flat'}"
        raise InputError(f"has no entry {key!r}", where=where, expected=expected)
    return next((content[name] for name in (keys if key is None else (key,)) if name in entries), content)


def _tensors(state: Any, where: str) -> Mapping[str, Tensor]:
    if not isinstance(state, Mapping):
        raise InputError(f"holds a {type(state).__name__}", where=where, expected="a table of tensors")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"holds what is not a tensor: {', '.join(sorted(others)[:20])}",
            where=where,
            expected=f"tensors, flat or under one of {', '.join(KEYS)}",
            hint="Name the entry with --key.",
        )
    return {str(name): tensor.detach() for name, tensor in state.items()}


def check_fit(
    found: Shapes, wanted: Shapes, *, optional: Shapes | None = None, where: str, what: str
) -> None:
    """Compare names and shapes in a file with those of a model.

    Tensors in `optional` may be absent, but where they are there they too must have their shape. Raises
    InputError listing every tensor that is missing, unexpected or wrongly shaped.
    """
    known = {**(optional or {}), **wanted}
    faults = [f"missing {name}" for name in wanted.keys() - found.keys()]
    faults += [f"unexpected {name}" for name in found.keys() - known.keys()]
    faults += [
        f"{name} is {tuple(found[name])} instead of {tuple(known[name])}"
        for name in known.keys() & found.keys()
        if tuple(found[name]) != tuple(known[name])
    ]
    if faults:
        raise InputError(f"does not fit {what}: {len(faults)} tensors: {listed(faults)}", where=where)


def listed(faults: Sequence[str]) -> str:
    """The first twenty faults, in the order of their text."""
    return "; ".join(sorted(faults)[:20]) + ("; ..." if len(faults) > 20 else "")


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on this machine."""

    weights: Path
    lora: Path | None = None
    """A LoRA that belongs to it."""


def is_hub_id(place: str | Path) -> bool:
    """Whether a place that is not on this machine can be a repository (`owner/name`) on the hub."""
    return bool(_HUB_ID.match(str(place))) and not str(place).endswith(_FILES)


def locate(spec: ModelSpec, checkpoint: str | Path) -> CheckpointFiles:
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
        return CheckpointFiles(path)
    if path.is_dir():
        return _in_folder(spec, path)
    if is_hub_id(checkpoint):
        return _in_folder(spec, _downloaded(spec, str(checkpoint)))
    raise InputError(
        "cannot be read: there is no such file or folder",
        where=str(checkpoint),
        expected="a file, a folder, or a repository on the hub (owner/name)",
    )


def _in_folder(spec: ModelSpec, folder: Path) -> CheckpointFiles:
    source = spec.source
    if source and (folder / source.file).is_file():
        lora = folder / source.lora if source.lora else None
        if lora and not lora.is_file():
            raise InputError(
                f"holds {source.file} but not {source.lora}, which {spec.name} adds to it",
                where=str(folder),
                hint="Fetch it too, or name the one file to use it alone.",
            )
        return CheckpointFiles(folder / source.file, lora)
    for place in (folder, folder / "transformer"):
        if any(place.glob(INDEX)):
            return CheckpointFiles(place)
        files = sorted(place.glob("*.safetensors"))
        if len(files) == 1:
            return CheckpointFiles(files[0])
        if files:
            raise InputError(
                f"holds {len(files)} safetensors files: {', '.join(file.name for file in files)}",
                where=str(place),
                expected="one, or an index of shards",
                hint="Name the file.",
            )
    own = f"{source.file}, " if source else ""
    expected = f"{own}one .safetensors file or an index of shards"
    raise InputError("holds no weights", where=str(folder), expected=expected)


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
        raise InputError(
            f"is no file or folder here, and cannot be fetched from the hub ({first_line(error)})",
            where=repository,
            hint="Check the name, the network and the access rights, or fetch it by other means.",
        ) from error
