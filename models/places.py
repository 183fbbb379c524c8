"""Where the weights of a model lie: a file, a folder or a repository, and which files of it are meant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.files import there
from forcingkv.models.file_kinds import CONVERT
from forcingkv.models.hub import HubPlace, Listing, fetch, hub_place, list_files
from forcingkv.models.other_models import SHARD
from forcingkv.models.tensor_files import INDEX_SUFFIX, TORCH_FILES, shard_places
from forcingkv.runtime.footprint import readable
from forcingkv.runtime.spec import ModelSpec

PLACES = (".", "transformer")
"""Folders that are looked into first: the one that is named, and the one of diffusers."""

SUFFIXES = (*TORCH_FILES, ".safetensors")
_SECOND = ("transformer_2/", "low_noise_model/")
_ONE_OF_TWO = "To try one of them alone, name its folder."
DEEPEST = 4
"""Folders within folders that are looked through for weights under other names."""


@dataclass(frozen=True)
class Located:
    """Weights on this machine."""

    path: Path
    """A file of tensors, or an index of shards."""
    lora: Path | None
    """The LoRA that belongs to them, if any."""
    again: str | Path
    """What names the very same weights, from any folder and at any time."""
    taken: tuple[str, ...] = ()
    """What was chosen, in sentences; empty where there was no choice."""


@dataclass(frozen=True)
class _Meant:
    """Which of the files of a folder or repository are meant, by their names in it."""

    file: str
    lora: str | None = None
    why: str = ""


def locate(
    spec: ModelSpec, checkpoint: str | Path, progress: Callable[[str], None] = lambda text: None
) -> Located:
    """The weights of a checkpoint on this machine, and the LoRA that belongs to them, if any.

    A file is taken as it is. Of a folder that holds the model's public files under their own names these are
    taken (then also its LoRA, where it has one); else one `.safetensors` file or one index of shards, in the
    folder itself or in `transformer/`, as diffusers lays it out; else the only file of weights in it or in
    folders within. What is neither, but looks like a repository (`hub.FORM`), is listed, chosen from in the
    same way, and fetched: what is used, and nothing else. `progress` is told before that.

    Raises InputError where nothing is found or more than one file could be meant, MissingExtraError where
    huggingface_hub is needed and not installed.
    """
    path = Path(checkpoint)
    if there(checkpoint) and path.is_file():
        return Located(path, None, path.absolute())
    if there(checkpoint) and path.is_dir():
        return _in_folder(spec, path)
    return _on_hub(spec, hub_place(checkpoint, "a file, a folder"), progress)


def _in_folder(spec: ModelSpec, folder: Path) -> Located:
    named = [spec.source.file, spec.source.lora] if spec.source else []
    near = [name for name in named if name and (folder / name).is_file()]
    near += [
        (PurePosixPath(place) / file.name).as_posix()
        for place in PLACES
        for file in sorted((folder / place).glob("*"))
        if file.is_file()
    ]
    meant = _meant(spec, near, partial(_all_files, folder), str(folder), lambda name: name)
    taken = (f"{folder}: {meant.file}{meant.why}",) if meant.why else ()
    lora = folder / meant.lora if meant.lora else None
    return Located(folder / meant.file, lora, folder.absolute(), taken)


def _all_files(folder: Path) -> list[str]:
    """Names of the files in a folder and those within, but for hidden ones."""
    found = []
    for place, folders, files in os.walk(folder):
        inner = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and len(inner.parts) < DEEPEST - 1]
        found += [(inner / name).as_posix() for name in files if not name.startswith(".")]
    return found


def _on_hub(spec: ModelSpec, place: HubPlace, progress: Callable[[str], None]) -> Located:
    listing = list_files(place)
    meant = _meant_on_hub(spec, listing)
    folder = fetch(listing, [name for name in (meant.file, meant.lora) if name], progress)
    if meant.file.endswith(INDEX_SUFFIX) and not listing.folder:
        shards = {path.relative_to(folder).as_posix() for path in shard_places(folder / meant.file).values()}
        absent = sorted(shards - listing.sizes.keys())
        if absent:
            raise InputError(f"lacks the shard {', '.join(absent)}", where=str(place))
        folder = fetch(listing, [meant.file, *sorted(shards)], progress)
    lora = f" and {meant.lora}" if meant.lora else ""
    remark = f" ({listing.remark})" if listing.remark else ""
    taken = f"{place.repository}, revision {listing.commit[:12]}{remark}: {meant.file}{lora}{meant.why}"
    # A named file is taken without the LoRA of the model's own files, as a file on this machine is.
    pinned = place.revision if listing.folder else listing.commit
    again = HubPlace(place.repository, pinned, None if meant.lora else meant.file)
    return Located(folder / meant.file, folder / meant.lora if meant.lora else None, str(again), (taken,))


def _meant_on_hub(spec: ModelSpec, listing: Listing) -> _Meant:
    place, names = listing.place, list(listing.sizes)

    def sized(name: str) -> str:
        return f"{name} ({readable(listing.sizes[name])})"

    if place.path is None:
        return _meant(spec, names, lambda: names, str(place), sized)
    if place.path in names:
        return _Meant(place.path)
    inside = {name[len(place.path) + 1 :]: name for name in names if name.startswith(place.path + "/")}
    if not inside:
        what = f"holds no {place.path}"
        expected = f"one of {', '.join(sized(name) for name in _weights(names)) or 'its files'}"
        raise InputError(what, where=place.repository, expected=expected)
    meant = _meant(spec, list(inside), lambda: list(inside), str(place), lambda name: sized(inside[name]))
    return _Meant(inside[meant.file], inside[meant.lora] if meant.lora else None, meant.why)


def _meant(
    spec: ModelSpec,
    near: Sequence[str],
    everything: Callable[[], Sequence[str]],
    where: str,
    shown: Callable[[str], str],
) -> _Meant:
    """Which files are meant, of those in the places that are looked into first, else of all.

    Raises InputError where there is none, or nothing says which.
    """
    source = spec.source
    if source and source.file in near:
        if source.lora and source.lora not in near:
            what = f"holds {source.file} but not {source.lora}, which {spec.name} adds to it"
            hint = f"Fetch it too, or name {source.file} itself to use it alone."
            raise InputError(what, where=where, hint=hint)
        return _Meant(source.file, source.lora)
    all_names = everything()
    second = [name for name in _weights(all_names) if name.startswith(_SECOND)]
    if second:
        what = f"holds two transformers, the second as {shown(second[0])}: Wan 2.2's 14B models take each for"
        what += " some of the steps"
        raise InputError(what, where=where, expected="a model with one transformer", hint=_ONE_OF_TWO)
    for place in PLACES:
        here = [name for name in near if PurePosixPath(name).parent.as_posix() == place]
        indices = [name for name in here if name.endswith(INDEX_SUFFIX)]
        flat = indices or [name for name in here if name.lower().endswith(".safetensors")]
        if len(flat) == 1:
            others = [name for name in _weights(near) if name != flat[0]]
            return _Meant(flat[0], why=f", not {', '.join(others)}" if others else "")
        if flat:
            names = ", ".join(shown(name) for name in sorted(flat))
            kind = "indices of shards" if indices else "safetensors files"
            what = f"holds {len(flat)} {kind}: {names}"
            expected = "one, or an index of shards"
            raise InputError(what, where=where, expected=expected, hint=_which(flat))
    found = _weights(all_names)
    if len(found) == 1:
        return _Meant(found[0], why=", the only file of weights in it")
    own = f"{source.file}, " if source else ""
    expected = f"{own}one .safetensors file or an index of shards"
    if not found:
        raise _no_weights(all_names, where, expected)
    what = f"holds {len(found)} files of weights: {', '.join(shown(name) for name in found)}"
    raise InputError(what, where=where, expected=expected, hint=_which(found))


def _no_weights(names: Sequence[str], where: str, expected: str) -> InputError:
    """What a folder without weights holds instead, where that is known."""
    for suffix, kind, hint in (
        (".distcp", "a distributed checkpoint", f"Make one file of it: {CONVERT}"),
        (".gguf", "GGUF files", "Take the weights as .safetensors or .pt."),
    ):
        if any(name.lower().endswith(suffix) for name in names):
            what = f"holds {kind}, which {'is' if kind[0] == 'a' else 'are'} not read"
            return InputError(what, where=where, expected=expected, hint=hint)
    return InputError("holds no weights", where=where, expected=expected)


def _which(names: Sequence[str]) -> str:
    """What to do about several files."""
    if all(map(SHARD.search, names)):
        return "They look like shards: their index *.safetensors.index.json has to lie beside them."
    return "Name the file."


def _weights(names: Iterable[str]) -> list[str]:
    """The names of files of weights, an index in the place of its shards."""
    names = sorted(names)
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    folders = {PurePosixPath(name).parent for name in indices}
    files = [name for name in names if name.lower().endswith(SUFFIXES)]
    return indices + [
        name
        for name in files
        if not (name.endswith(".safetensors") and PurePosixPath(name).parent in folders)
    ]
