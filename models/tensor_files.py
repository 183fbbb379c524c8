"""Files of tensors: how they are opened, and whether they fit a model.

Files are opened lazily: names and shapes at once, contents one tensor at a time. Formats: safetensors,
sharded safetensors with an index, and torch's `.pt` / `.pth`, which is only ever read with
`weights_only=True`: a file with any other pickled object in it is refused.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forcingkv.headmaps.errors import InputError, first_line
from forcingkv.headmaps.files import inside, record_file
from forcingkv.runtime.dtypes import STORED_AS

KEYS = ("generator_ema", "generator", "model")
"""Entries of a `.pt` file that are tried, in this order, where none is asked for by name."""

RELOAD_BYTES = 512 * 2**20
"""A mapped file keeps every page that was read in memory; after so many bytes it is mapped anew."""

INDEX_SUFFIX = ".safetensors.index.json"
INDEX = "*" + INDEX_SUFFIX

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of files that torch wrote."""

_CODES = {code: record.name for code, record in STORED_AS.items()} | {
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""What safetensors calls a dtype -> what torch does."""

FLOATS = frozenset(name for name in _CODES.values() if "float" in name) - {"float8_e8m0fnu"}
"""Dtypes that weights may be stored in. An integer is a weight by a rule that the tensor does not say; e8m0,
a power of two, is a scale."""

DEEPEST = 16
"""Tables within tables that are looked through."""

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
    dtypes: Mapping[str, str]
    """Name -> dtype, as torch calls it; one that torch does not have, as safetensors does."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Name -> the entry of a torch file that holds the tensor, nested ones joined by dots."""
    entries: Sequence[str] = ()
    """The entries of a torch file, also those that hold no tensors."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file, what its header says beside the tensors."""

    def digest(self) -> str:
        """SHA-256 of the file; of several, of their digests in the order of their names."""
        digests = [record_file(path).sha256 for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_tensors(path: Path, key: str | None = None, preferred: str | None = None) -> TensorFiles:
    """Open a file, or a folder with sharded safetensors and their index, that holds one set of tensors.

    Args:
        path: a `.safetensors` file, a folder with one `*.safetensors.index.json`, such an index, or a torch
            file.
        key: entry of a torch file that holds the tensors. None: the first that it has of
            `preferred` and `KEYS`, else the file itself.
        preferred: entry that is looked for first.

    Raises InputError where the file cannot be read, holds something else than tensors, or lacks the key.
    """
    if _is_torch(path):
        keys = (preferred, *KEYS) if preferred else KEYS
        return _of_torch(path, lambda content: _Tables(_tensors(content, key, keys, str(path))))
    if key is not None:
        what = f"has no entry {key!r}: a safetensors file is flat"
        raise InputError(what, where=str(path), hint="Leave --key out.")
    return open_tables(path)


def open_tables(path: Path) -> TensorFiles:
    """Open a file, or a folder with shards, as `open_tensors` does, with all tensors of a torch file.

    Tensors of entries, nested up to `DEEPEST`, have their entry's name and a dot before their own.

    Raises InputError where the file cannot be read or holds no table.
    """
    if _is_torch(path):
        return _of_torch(path, lambda content: _flattened(content, str(path)))
    if path.is_dir() or path.name.endswith(INDEX_SUFFIX):
        return _sharded(path)
    header = _header(path)
    return TensorFiles(
        path, [path], header.shapes, partial(_read_stored, path), header.dtypes, metadata=header.metadata
    )


def _is_torch(path: Path) -> bool:
    return not path.is_dir() and path.suffix != ".safetensors" and not path.name.endswith(INDEX_SUFFIX)


@dataclass(frozen=True)
class _Header:
    """What a safetensors file says before its contents."""

    shapes: Shapes
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


def _header(path: Path) -> _Header:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            codes = {name: str(part.get_dtype()) for name, part in slices.items()}
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        what, expected = f"cannot be read as safetensors ({error})", "a whole .safetensors file"
        raise InputError(what, where=str(path), expected=expected) from error
    return _Header(shapes, {name: _CODES.get(code, code) for name, code in codes.items()}, metadata)


def _read_stored(path: Path, name: str) -> Tensor:
    # Opened for each tensor, so that what was read before leaves the memory.
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _sharded(place: Path) -> TensorFiles:
    folder = place if place.is_dir() else place.parent
    found = sorted(folder.glob(INDEX)) if place.is_dir() else [place]
    if len(found) != 1:
        names = f": {', '.join(file.name for file in found)}" if found else ""
        raise InputError(f"has {len(found)} files {INDEX}{names}", where=str(folder), expected="one")
    places = shard_places(found[0])
    files = sorted(set(places.values()))
    absent = sorted(file.name for file in files if not file.is_file())
    if absent:
        raise InputError(f"lacks the shard {', '.join(absent)}", where=str(folder))
    headers = {file: _header(file) for file in files}
    stored = {(name, file) for file, header in headers.items() for name in header.shapes}
    wrong = sorted(f"{name} ({file.name})" for name, file in places.items() ^ stored)
    if wrong:
        what = f"index and shards differ in {len(wrong)} tensors: {', '.join(wrong[:20])}"
        raise InputError(what, where=str(found[0]))
    shapes = {name: headers[file].shapes[name] for name, file in places.items()}
    dtypes = {name: headers[file].dtypes[name] for name, file in places.items()}
    metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}
    read = partial(_read_shard, places)
    return TensorFiles(folder, files, shapes, read, dtypes, metadata=metadata)


def shard_places(index: Path) -> dict[str, Path]:
    """Name -> the file beside an index of shards that it says holds the tensor, which need not be there.

    Raises InputError where it is no index, or names a file that is not in its folder (`files.inside`).
    """
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): inside(index.parent, str(file)) for name, file in where.items()}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = 'JSON with a table "weight_map"'
        raise InputError("is not an index of shards", where=str(index), expected=expected) from error


def _read_shard(places: Mapping[str, Path], name: str) -> Tensor:
    return _read_stored(places[name], name)


@dataclass(frozen=True)
class _Tables:
    """Tensors of a torch file by name, the entry of each, and all entries."""

    state: Mapping[str, Tensor]
    tables: Mapping[str, str] = field(default_factory=dict)
    entries: Sequence[str] = ()


def _of_torch(path: Path, pick: Callable[[Any], _Tables]) -> TensorFiles:
    """A torch file, of which `pick` finds the tensors in its content."""
    file = _TorchFile(path, pick)
    found = file.found
    shapes = {name: tuple(tensor.shape) for name, tensor in found.state.items()}
    dtypes = {name: _dtype(tensor) for name, tensor in found.state.items()}
    return TensorFiles(path, [path], shapes, file.read, dtypes, found.tables, found.entries)


def _dtype(tensor: Tensor) -> str:
    """What a tensor is stored as; what has no contents, or no strides, has no dtype of weights."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.device.type == "meta":
        return f"{kind} without contents"
    return kind if tensor.layout == torch.strided else f"{kind} ({tensor.layout})"


class _TorchFile:
    """A torch file, mapped where it can be. `found`: what was picked of its content."""

    def __init__(self, path: Path, pick: Callable[[Any], _Tables]) -> None:
        self._path, self._pick = path, pick
        self.found = self._load()
        self._read_bytes = 0

    def read(self, name: str) -> Tensor:
        if self._read_bytes > RELOAD_BYTES:
            self.found, self._read_bytes = _Tables({}), 0
            self.found = self._load()
        tensor = self.found.state[name]
        self._read_bytes += tensor.nbytes
        return tensor

    def _load(self) -> _Tables:
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
        return self._pick(content)


def _flattened(content: Any, where: str) -> _Tables:
    """All tensors of tables within tables; what is neither is passed over."""
    if not isinstance(content, Mapping):
        raise InputError(f"holds a {type(content).__name__}", where=where, expected="a table of tensors")
    state: dict[str, Tensor] = {}
    tables: dict[str, str] = {}
    entries: list[str] = []

    def walk(table: Mapping[Any, Any], path: tuple[str, ...]) -> None:
        if len(path) > DEEPEST:
            raise InputError(f"has tables within tables, more than {DEEPEST} deep", where=where)
        for key, value in table.items():
            name = ".".join((*path, str(key)))
            if isinstance(value, Tensor):
                if name in state:
                    raise InputError(f"two tensors are both {name}", where=where)
                state[name] = value.detach()
                if path:
                    tables[name] = ".".join(path)
            elif isinstance(value, Mapping):
                if len(path) < 2:  # states of optimizers have thousands, deeper down
                    entries.append(name)
                walk(value, (*path, str(key)))

    walk(content, ())
    return _Tables(state, tables, entries)


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
    files: TensorFiles,
    names: Mapping[str, str],
    wanted: Shapes,
    what: str,
    optional: Shapes | None = None,
    also: Sequence[str] = (),
    hint: str | None = None,
) -> None:
    """Compare names, shapes and dtypes in files with those of a model, which messages call `what`.

    `names`: the model's name of each tensor of the files -> the name in the files. Tensors in `optional` may
    be absent, but where they are there they too must have their shape. `also`: faults found before, which
    are listed with the others; `hint`: what to do about those.

    Raises InputError listing every tensor that is missing, unexpected, wrongly shaped, or stored as what is
    no number of a weight.
    """
    known = {**(optional or {}), **wanted}
    faults = [*also]
    faults += [f"missing {name}" for name in wanted.keys() - names.keys()]
    faults += [f"unexpected {name}" for name in names.keys() - known.keys()]
    for name in known.keys() & names.keys():
        found, dtype = files.shapes[names[name]], files.dtypes[names[name]]
        if found != known[name]:
            faults.append(f"{name} is {found} instead of {known[name]}")
        elif dtype not in FLOATS:
            faults.append(f"{name} is stored as {dtype}, which is no dtype of weights here")
    if faults:
        fault = f"does not fit {what}: {len(faults)} tensors: {listed(faults)}"
        raise InputError(fault, where=str(files.where), hint=hint if also else None)


def listed(faults: Sequence[str]) -> str:
    """The first twenty faults, in the order of their text."""
    return "; ".join(sorted(faults)[:20]) + ("; ..." if len(faults) > 20 else "")
