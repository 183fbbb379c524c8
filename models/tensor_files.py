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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forcingkv.headmaps.errors import InputError, MissingExtraError, first_line
from forcingkv.headmaps.files import inside, record_file
from forcingkv.runtime.spec import ModelSpec

KEYS = ("generator_ema", "generator", "model")
"""Entries of a `.pt` file that are tried, in this order, where none is asked for by name."""

RELOAD_BYTES = 512 * 2**20
"""A mapped file keeps every page that was read in memory; after so many bytes it is mapped anew."""

INDEX = "*.safetensors.index.json"

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape."""


@dataclass(frozen=True)
class TensorFiles:
    """Tensors of one file or of several that belong together."""

    where: Path
    """The file or folder, for messages."""
    files: Sequence[Path]
    """The files that hold them, sorted."""
    shapes: Shapes
    read: Callable[[str], Tensor]
    """The tensor of a name, on the CPU, in the file's dtype. It may be a view of the file."""

    def digest(self) -> str:
        """SHA-256 of the file; of several, of their digests in the order of their names."""
        digests = [record_file(path).sha256 for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_tensors(path: Path, key: str | None = None, preferred: str | None = None) -> TensorFiles:
    """Open a file, or a folder with sharded safetensors and their index.

    Args:
        path: a `.safetensors` file, a folder with one `*.safetensors.index.json`, or a torch file.
        key: entry of a torch file that holds the tensors. None: the first that it has of
            `preferred` and `KEYS`, else the file itself.
        preferred: entry that is looked for first.

    Raises InputError where the file cannot be read, holds something else than tensors, or lacks the key.
    """
    if path.is_dir():
        opened = _sharded(path)
    elif path.suffix == ".safetensors":
        opened = TensorFiles(path, [path], _stored_shapes(path), partial(_read_stored, path))
    else:
        file = _TorchFile(path, key, (preferred, *KEYS) if preferred else KEYS)
        shapes = {name: tuple(tensor.shape) for name, tensor in file.state.items()}
        return TensorFiles(path, [path], shapes, file.read)
    if key is not None:
        what = f"has no entry {key!r}: a safetensors file is flat"
        raise InputError(what, where=str(path), hint="Leave --key out.")
    return opened


def _stored_shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        what, expected = f"cannot be read as safetensors ({error})", "a whole .safetensors file"
        raise InputError(what, where=str(path), expected=expected) from error


def _read_stored(path: Path, name: str) -> Tensor:
    # Opened for each tensor, so that what was read before leaves the memory.
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _sharded(folder: Path) -> TensorFiles:
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
    files = sorted(set(places.values()))
    absent = sorted(file.name for file in files if not file.is_file())
    if absent:
        raise InputError(f"lacks the shard {', '.join(absent)}", where=str(folder))
    shards = {file: _stored_shapes(file) for file in files}
    stored = {(name, file) for file, shapes in shards.items() for name in shapes}
    wrong = sorted(f"{name} ({file.name})" for name, file in places.items() ^ stored)
    if wrong:
        what = f"index and shards differ in {len(wrong)} tensors: {', '.join(wrong[:20])}"
        raise InputError(what, where=str(index))
    shapes = {name: shards[file][name] for name, file in places.items()}
    return TensorFiles(folder, files, shapes, lambda name: _read_stored(places[name], name))


class _TorchFile:
    """A torch file, mapped where it can be. `state`: its tensors by name."""

    def __init__(self, path: Path, key: str | None, keys: Sequence[str]) -> None:
        self._path, self._key, self._keys = path, key, keys
        self.state = self._load()
        self._read_bytes = 0

    def read(self, name: str) -> Tensor:
        if self._read_bytes > RELOAD_BYTES:
            self.state, self._read_bytes = {}, 0
            self.state = self._load()
        tensor = self.state[name]
        self._read_bytes += tensor.nbytes
        return tensor

    def _load(self) -> Mapping[str, Tensor]:
        where = str(self._path)
        try:
            # Files of torch before 1.6 are not zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(self._path)
            content = torch.load(self._path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            what = "is refused: it is no torch file, or holds a pickled object that is not a tensor"
            raise InputError(
                f"{what} ({first_line(error)})",
                where=where,
                expected="tensors only (torch.load with weights_only=True)",
                hint="Save its state dict alone, best as .safetensors.",
            ) from error
        except Exception as error:  # the unpickler raises whatever a damaged file leads it to
            what, expected = (
                f"cannot be read as a torch file ({first_line(error)})",
                "a whole .pt, .pth or .safetensors file",
            )
            raise InputError(what, where=where, expected=expected) from error
        return _tensors(content, self._key, self._keys, where)


def _tensors(content: Any, key: str | None, keys: Sequence[str], where: str) -> Mapping[str, Tensor]:
    """The tensors under `key`; without one those under the first of `keys` that is there, or `content`."""
    table: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    entries = [name for name, value in table.items() if isinstance(value, Mapping)]
    if key is not None and key not in entries:
        expected = f"one of {', '.join(entries)}" if entries else "no --key, since the file has no entries"
        raise InputError(f"has no entry {key!r}", where=where, expected=expected)
    state = next((table[name] for name in (keys if key is None else (key,)) if name in entries), content)
    if not isinstance(state, Mapping):
        raise InputError(f"holds a {type(state).__name__}", where=where, expected="a table of tensors")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        what = f"holds what is not a tensor: {', '.join(sorted(others)[:20])}"
        expected = f"tensors, by themselves or in one of the entries {', '.join(KEYS)}"
        raise InputError(what, where=where, expected=expected, hint="Name the entry with --key.")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def check_fit(
    files: TensorFiles, names: Mapping[str, str], wanted: Shapes, what: str, optional: Shapes | None = None
) -> None:
    """Compare names and shapes in files with those of a model, which messages call `what`.

    `names`: the model's name of each tensor of the files -> the name in the files. Tensors in `optional` may
    be absent, but where they are there they too must have their shape. Raises InputError listing every tensor
    that is missing, unexpected or wrongly shaped.
    """
    known = {**(optional or {}), **wanted}
    faults = [f"missing {name}" for name in wanted.keys() - names.keys()]
    faults += [f"unexpected {name}" for name in names.keys() - known.keys()]
    for name in known.keys() & names.keys():
        found = files.shapes[names[name]]
        if found != known[name]:
            faults.append(f"{name} is {found} instead of {known[name]}")
    if faults:
        fault = f"does not fit {what}: {len(faults)} tensors: {listed(faults)}"
        raise InputError(fault, where=str(files.where))


def listed(faults: Sequence[str]) -> str:
    """The first twenty faults, in the order of their text."""
    return "; ".join(sorted(faults)[:20]) + ("; ..." if len(faults) > 20 else "")


def hub_id(place: str | Path, local: str) -> str:
    """The repository (`owner/name`) on the hub that a place which is not on this machine names.

    Raises InputError where it can be none; `local` is what may be on this machine.
    """
    name = str(place)
    if not _HUB_ID.match(name) or name.endswith(_FILES):
        what = "cannot be read: there is no such file or folder"
        raise InputError(what, where=name, expected=f"{local}, or a repository on the hub (owner/name)")
    return name


def locate(spec: ModelSpec, checkpoint: str | Path) -> tuple[Path, Path | None]:
    """The weights of a checkpoint on this machine, and the LoRA that belongs to them, if any.

    A file is taken as it is. A folder holds the model's public files under their own names (and
    then also its LoRA, where it has one), or one `.safetensors` file or one index of shards, itself
    or in `transformer/`, as diffusers lays it out. What is neither, but looks like a repository
    (`owner/name`), is downloaded.

    Raises InputError where nothing is found or more than one file could be meant, MissingExtraError where
    huggingface_hub is needed and not installed.
    """
    path = Path(checkpoint)
    if path.is_file():
        return path, None
    return _in_folder(spec, path if path.is_dir() else _downloaded(spec, checkpoint))


def _in_folder(spec: ModelSpec, folder: Path) -> tuple[Path, Path | None]:
    source = spec.source
    if source and (folder / source.file).is_file():
        lora = folder / source.lora if source.lora else None
        if lora and not lora.is_file():
            what = f"holds {source.file} but not {source.lora}, which {spec.name} adds to it"
            hint = f"Fetch it too, or name {source.file} itself to use it alone."
            raise InputError(what, where=str(folder), hint=hint)
        return folder / source.file, lora
    for place in (folder, folder / "transformer"):
        if any(place.glob(INDEX)):
            return place, None
        files = sorted(place.glob("*.safetensors"))
        if len(files) == 1:
            return files[0], None
        if files:
            what = f"holds {len(files)} safetensors files: {', '.join(file.name for file in files)}"
            expected = "one, or an index of shards"
            raise InputError(what, where=str(place), expected=expected, hint="Name the file.")
    own = f"{source.file}, " if source else ""
    expected = f"{own}one .safetensors file or an index of shards"
    raise InputError("holds no weights", where=str(folder), expected=expected)


def _downloaded(spec: ModelSpec, checkpoint: str | Path) -> Path:
    repository = hub_id(checkpoint, "a file, a folder")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtraError("huggingface_hub", "hub")
    import huggingface_hub

    patterns = ["*.safetensors", INDEX]
    if spec.source and spec.source.hub == repository:
        patterns = [name for name in (spec.source.file, spec.source.lora) if name]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # HTTP, connection and repository errors are OSErrors
        what = f"is no file or folder here, and cannot be fetched from the hub ({first_line(error)})"
        hint = "Check the name, the network and the access rights, or fetch it by other means."
        raise InputError(what, where=repository, hint=hint) from error
