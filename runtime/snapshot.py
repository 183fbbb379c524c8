"""The state of a video on disk: `state.json`, and the tensors it names as safetensors beside it.

`state.json` is written last and replaces the one before in one step, so a folder always holds a whole
state, whenever the process ends. Its digest of itself shows that a value was changed by accident; it is no
protection against somebody who means to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, check_bounds, from_data, to_data
from forcingkv.headmaps.files import FileRecord, inside, record_file
from forcingkv.headmaps.reading import read_json
from forcingkv.headmaps.writing import (
    held_inside,
    is_ours,
    refuse_name,
    unwritable,
    unwritable_where,
    write_text,
)
from forcingkv.runtime.backends import Array, Tensor
from forcingkv.runtime.bundle import Bundle
from forcingkv.runtime.chunks import ChunkMaker
from forcingkv.runtime.context import check_held
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.given import check_start
from forcingkv.runtime.kv.rebuild import kept_chunks, replayed
from forcingkv.runtime.results import Chunk, Timing
from forcingkv.runtime.script import PromptRecord, Script, Switch
from forcingkv.runtime.snapshot_check import STATE, check_counts
from forcingkv.runtime.spec import Dtype
from forcingkv.runtime.tensors import new_tensors, read_arrays
from forcingkv.runtime.text import prompt_input

FADING = ("fading/old", "fading/new")
"""Tensors: the model's inputs of two prompts, of which the first fades."""
HELD = "start/held"
"""Tensor: given first frames of the first chunk."""
TENSORS = re.compile(r"\.?state-\d{6,}(-\d+)?\.safetensors(\.partial)?")
"""Files of tensors, with those that a process left half written."""


@dataclass(frozen=True)
class ReadyChunk:
    """A chunk that was made, but not handed out."""

    index: int
    timing: Timing


@dataclass(frozen=True)
class Snapshot:
    """The content of state.json."""

    bundle: str
    """Digest of the bundle; a state fits no other."""
    seed: int
    """Of the noise."""
    chunks: int | None
    index: int
    """Of the chunk that is handed out next."""
    made: int
    """Chunks that the caches know."""
    passes: int
    """Clean passes behind the KV cache; after a rebuild another number than `made`."""
    decoder_calls: int
    ready: tuple[ReadyChunk, ...]
    tensors: str
    """The file of tensors."""
    record: FileRecord
    """Its digest and size."""
    prompt: PromptRecord | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """The first. States of versions that did not know it have None here, and in the fields below."""
    switches: tuple[Switch, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Those that were made."""
    planned: tuple[Switch, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Those to come. The model's input for each is among the tensors."""
    notes: Mapping[str, str] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What the program that saved it wants to find again."""
    hollow: bool | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Whether the KV cache holds the sink alone (`KvCache.hollow`); None: it does not."""
    cuts: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """The clean passes behind the KV cache with which scenes begin (`KvCache.cuts`); None: there are none."""
    fading: bool | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Whether chunks are to come that follow two prompts; None: none are."""
    noise: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Digest of the noise that came in a file (`given.GivenNoise`); None: it is the seed's."""
    start: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Digest of the latents that the video began with; None: it began with none."""
    given: int | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """How many chunks those are; None, where the video began with some: fewer frames than a chunk has."""
    compute: Dtype | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """What the session computed in; None in states of versions in which a bundle had one dtype."""
    digest: str | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Of all other fields (`own_digest`)."""
    schema: Literal["forcingkv.snapshot/1"] = "forcingkv.snapshot/1"

    def __post_init__(self) -> None:
        numbers = ("chunks", "index", "made", "passes", "decoder_calls", "given")
        check_bounds(self, dict.fromkeys(numbers, (-(1 << 40), 1 << 40)), "the state")


def own_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of the content of a state.json but for its field `digest`, as JSON with sorted keys."""
    others = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_snapshot(
    folder: Path,
    maker: ChunkMaker,
    latents: Mapping[int, Array],
    ready: Sequence[Chunk],
    script: Script,
    to_come: Mapping[int, Array],
    held: Array | None,
    **known: Any,
) -> None:
    """Write a state, in the place of the one that the folder may hold.

    Args:
        folder: where.
        maker: the session's memory.
        latents: of the chunks that a rebuild needs, by index.
        ready: chunks that were made, but not handed out.
        script: the video's prompts.
        to_come: latents of given chunks that were not begun, by index.
        held: given frames of the first chunk, where that has others.
        known: the fields `bundle`, `seed`, `chunks`, `index`, `compute`, `noise`, `start`, `given` and
            `notes` of `Snapshot`.

    Raises InputError where the folder holds other files, cannot be written, or the state cannot be saved, or
    another process or thread is saving one there. The state before is whole then.
    """
    with _alone(folder):
        earlier, made = _earlier(folder), known["index"] + len(ready)
        # A name that no file has: one of them may be in use until the new state is whole.
        stem = f"state-{made:06}"
        names = (f"{stem}-{again}.safetensors" if again else f"{stem}.safetensors" for again in count())
        name = next(name for name in names if name not in earlier)
        stored: dict[str, Tensor | Array] = {**maker.state()}
        stored |= {f"latents/{index}": array for index, array in latents.items()}
        stored |= {f"start/{index}": array for index, array in to_come.items()}
        stored |= {} if held is None else {HELD: held}
        stored |= maker.context.held() if maker.context else {}
        for chunk in ready:
            if not isinstance(chunk.frames, np.ndarray):
                raise InputError(
                    "frames that stay on the device cannot be saved", where="frames", expected='frames="host"'
                )
            stored |= {f"ready/{chunk.index}/{part}": getattr(chunk, part) for part in ("frames", "latents")}
        planned_switches = [script.due[chunk] for chunk in sorted(script.due)]
        stored |= {f"planned/{number}": text for number, (_, text) in enumerate(planned_switches)}
        if script.text is not None:
            stored["text"] = script.text
        if script.fading:
            stored |= dict(zip(FADING, script.fading, strict=True))
        planned = {key: (DTYPES[str(value.dtype)].code, tuple(value.shape)) for key, value in stored.items()}
        with new_tensors(folder / name, planned) as writer:
            for key, value in stored.items():
                if not isinstance(value, np.ndarray):
                    value = value.fetch(maker.queue_of(key)).array()
                writer.write(key, value)
        try:
            snapshot = Snapshot(
                **known,
                made=made,
                passes=maker.cache.passes,
                decoder_calls=maker.decoder.called,
                ready=tuple(ReadyChunk(chunk.index, chunk.timing) for chunk in ready),
                tensors=name,
                record=record_file(folder / name),
                prompt=script.prompt,
                switches=None if script.prompt is None else tuple(script.made),
                planned=tuple(switch for switch, _ in planned_switches),
                hollow=maker.cache.hollow or None,
                cuts=maker.cache.cuts or None,
                fading=bool(script.fading) or None,
            )
            snapshot = replace(snapshot, digest=own_digest(to_data(snapshot)))
            write_text(folder / STATE, json.dumps(to_data(snapshot), indent=1) + "\n")
        except BaseException as error:
            if not _is_named(folder, name):
                with suppress(OSError):
                    (folder / name).unlink()  # it may be what filled the disk
            if isinstance(error, OSError):
                raise unwritable(folder, error) from error
            raise
        for file in earlier - {name}:
            with suppress(OSError):
                (folder / file).unlink()


def _is_named(folder: Path, name: str) -> bool:
    """Whether state.json names a file of tensors: an error may come just after it was put in its place."""
    try:
        return name.encode() in (folder / STATE).read_bytes()
    except FileNotFoundError:
        return False
    except OSError:
        return True  # nobody knows


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder while a state is saved, and remove what killed processes left in it."""
    refuse_name(folder)
    with unwritable_where(folder, within=folder), held_inside(folder, "saving", "state-", STATE):
        yield


def check_states(folder: Path) -> None:
    """Raise InputError unless states can be saved in a folder now. Nothing is left of the trial."""
    with _alone(folder):
        _earlier(folder)


def read_snapshot(
    folder: Path, bundle: Bundle
) -> tuple[Snapshot, dict[str, Array], dict[int, Array], list[Chunk], Script]:
    """Read a state that was saved of a bundle.

    Returns it with its arrays, by the names of `ChunkMaker.state` and others; the latents of the chunks that
    a rebuild needs, by index; the chunks that were made, but not handed out; and the video's prompts.

    Raises InputError for a folder without a state, a damaged one, and one of another bundle.
    """
    path = folder / STATE
    if not path.is_file():
        raise InputError("holds no saved state", where=str(folder), hint="Save one with Video.save.")
    data = read_json(path)
    snapshot = from_data(Snapshot, _in_words(data), str(path))
    if snapshot.digest is not None and snapshot.digest != own_digest(data):
        raise InputError(
            "was changed: it is not what its own digest says",
            where=str(path),
            hint="Restore an untouched copy, or save the state again.",
        )
    if snapshot.bundle != bundle.digest:
        raise InputError(
            f"was saved of the bundle {snapshot.bundle[:12]}...",
            where=str(path),
            expected=f"{bundle.digest[:12]}..., which {bundle.path} is",
            hint="Restore it with the bundle that it was saved of.",
        )
    if snapshot.compute not in (None, bundle.manifest.compute):
        raise InputError(
            f"was saved by a session that computed in {snapshot.compute}",
            where=str(path),
            expected=f"{bundle.manifest.compute}, as this session does",
            hint=f"Open the session with the dtype {snapshot.compute} (--dtype {snapshot.compute}).",
        )
    check_counts(snapshot, bundle, path)
    tensors = inside(folder, snapshot.tensors)
    if not tensors.is_file() or record_file(tensors) != snapshot.record:
        raise InputError(
            "is missing, or not the file that was saved",
            where=str(tensors),
            expected=f"{snapshot.record.bytes} bytes of the digest {snapshot.record.sha256[:12]}...",
            hint="Save the state again.",
        )
    arrays = read_arrays(tensors)

    def array(name: str) -> Array:
        if name not in arrays:
            raise InputError(f"has no tensor {name}", where=str(tensors))
        return arrays[name]

    needed = replayed(bundle.plan, snapshot.made)
    latents = {
        index: array(f"latents/{index}")
        for index in kept_chunks(bundle.plan, snapshot.made)
        if index in needed or f"latents/{index}" in arrays  # states of earlier versions have fewer
    }
    given = snapshot.given or 0
    for index in range(min(snapshot.made, given), given):
        array(f"start/{index}")
    check_held(bundle.plan, snapshot.made, arrays, str(tensors))
    if snapshot.start is not None and not given:
        check_start(array(HELD), bundle.plan, f"{tensors}: {HELD}")
    ready = [
        Chunk(
            one.index,
            array(f"ready/{one.index}/frames"),
            array(f"ready/{one.index}/latents"),
            one.timing,
            one.index < given,
        )
        for one in snapshot.ready
    ]
    script = Script(snapshot.prompt, snapshot.switches or ())
    if "text" in arrays:
        script.text = prompt_input(bundle.plan.spec, arrays["text"])
    if snapshot.fading:
        old, new = (prompt_input(bundle.plan.spec, array(name)) for name in FADING)
        script.fading = old, new
    for number, switch in enumerate(snapshot.planned or ()):
        record, text = PromptRecord.of(bundle.plan.spec, array(f"planned/{number}"))
        if record.digest != switch.prompt.digest:
            raise InputError(f"planned/{number} is not the input of {switch.prompt}", where=str(tensors))
        script.plan(switch, text, snapshot.made)
    return snapshot, arrays, latents, ready, script


def _in_words(data: Any) -> Any:
    """The content of a state, with words where earlier versions said yes or no of a rebuild."""
    if not isinstance(data, Mapping):
        return data

    def said(switch: Any) -> Any:
        known = {True: "replay", False: "none"}
        if not isinstance(switch, Mapping) or not isinstance(switch.get("recache"), bool):
            return switch
        return {**switch, "recache": known[switch["recache"]]}

    listed = {name: data[name] for name in ("switches", "planned") if isinstance(data.get(name), list)}
    return {**data, **{name: [said(switch) for switch in switches] for name, switches in listed.items()}}


def _earlier(folder: Path) -> set[str]:
    """The tensor files of the folder's earlier states."""
    try:
        there = {path.name for path in folder.iterdir() if not is_ours(path.name)}
    except OSError as error:
        raise unwritable(folder, error) from error
    ours = {name for name in there if TENSORS.fullmatch(name)}
    others = there - ours - {STATE, f".{STATE}.partial"}
    if others:
        raise InputError(
            f"holds other files than a saved state ({min(others)})",
            where=str(folder),
            hint="Choose a new or empty folder.",
        )
    return ours
