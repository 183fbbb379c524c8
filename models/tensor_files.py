"""Files of tensors: how they are opened, and whether they fit a model.

Files are opened lazily: names and shapes at once, contents one tensor at a time. Formats: safetensors,
sharded safetensors with an index, and torch's `.pt` / `.pth`, which is only ever read with
`weights_only=True`: a file with any other pickled object in it is refused.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import inside, record_file
from forcingkv.headmaps.reading import read_json
from forcingkv.models.file_kinds import format_of, torch_fault
from forcingkv.runtime.dtypes import STORED_AS

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

NOT_THE_MODEL = (
    *("critic", "fake_score", "real_score", "fake_model", "tea_model", "teacher", "discriminator"),
    *("optimizer", "exp_avg", "exp_avg_sq", "momentum"),
)
"""Entries that may have the model's very shapes and are not it: what training holds a generator against, and
what it keeps of each weight."""

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


def open_tensors(path: Path, counts: Callable[[str], bool] = lambda name: True) -> TensorFiles:
    """Open a file, or a folder with sharded safetensors and their index, that holds one set of tensors.

    Args:
        path: a `.safetensors` file, a folder with one `*.safetensors.index.json`, such an index, or a torch
            file. Of a torch file the one entry is taken that holds what is sought, or the file itself.
        counts: whether a name is one of those that are sought.

    Raises InputError where the file cannot be read, or several entries could be meant.
    """
    files = open_tables(path)
    if not files.tables:
        return files
    entries: dict[str, dict[str, str]] = {}
    for name in files.shapes:
        table = files.tables.get(name, "")
        entries.setdefault(table, {})[name.removeprefix(f"{table}.") if table else name] = name
    holding = sorted(table for table, names in entries.items() if any(map(counts, names)))
    real = [table for table in holding if not any(other in table for other in NOT_THE_MODEL)]
    if holding and not real:
        what = f"holds what is sought only as {', '.join(holding)}, which is not what generates"
        raise InputError(what, where=str(path), hint="If it is meant, save it by itself.")
    holding = real
    if len(holding) > 1:
        told = ", ".join(table or "the file itself" for table in holding)
        what = f"holds {len(holding)} entries that could be meant: {told}"
        raise InputError(what, where=str(path), expected="one", hint="Save the one that is meant by itself.")
    if not holding:
        return files
    names = entries[holding[0]]
    shapes = {short: files.shapes[name] for short, name in names.items()}
    dtypes = {short: files.dtypes[name] for short, name in names.items()}
    return replace(files, shapes=shapes, read=lambda name: files.read(names[name]), dtypes=dtypes, tables={})


def open_tables(path: Path) -> TensorFiles:
    """Open a file, or a folder with shards, as `open_tensors` does, with all tensors of a torch file.

    Tensors of entries, nested up to `DEEPEST`, have their entry's name and a dot before their own.

    Raises InputError where the file cannot be read or holds no table.
    """
    if path.is_dir() or path.name.endswith(INDEX_SUFFIX):
        return _sharded(path)
    if format_of(path) == "torch":
        return _of_torch(path)
    header = _header(path)
    return TensorFiles(
        path, [path], header.shapes, partial(_read_stored, path), header.dtypes, metadata=header.metadata
    )


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
        where = read_json(index)["weight_map"]
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


def _of_torch(path: Path) -> TensorFiles:
    file = _TorchFile(path)
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
    """A torch file, mapped where it can be. `found`: the tensors in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
        return _flattened(content_of_torch(self._path), str(self._path))


def content_of_torch(path: Path) -> Any:
    """What torch saved in a file, tensors mapped; nothing of it is run. Raises InputError naming faults."""
    try:
        # Files of torch before 1.6 are not zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise torch_fault(error, path) from error


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
    are listed with the others; `hint`: what to do, or what the files are instead.

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
        shown = 5 if hint and not also else 20
        fault = f"does not fit {what}: {len(faults)} tensors: {listed(faults, shown)}"
        raise InputError(fault, where=str(files.where), hint=hint)


def listed(faults: Sequence[str], most: int = 20) -> str:
    """The first faults in the order of their text, at most so many."""
    return "; ".join(sorted(faults)[:most]) + ("; ..." if len(faults) > most else "")
